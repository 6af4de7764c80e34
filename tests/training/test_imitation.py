"""Scripted play in the words of each codec, and that what is heard is what was said."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from preconcert.agents import AgentSettings, ChannelHarm, TurnCodec, codec_of, turn_format_of
from preconcert.agents.codecs import LearnedCodec
from preconcert.core import Episode, Slot, SpanKind, TaskLanguage
from preconcert.envs import make_env, tasks
from preconcert.models.starter import word_tokenizer
from preconcert.prompts import SpanSettings, starter_words
from preconcert.training.imitation import scripted_episodes
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Silent
from preconcert.training.warm_start import supervised_examples

TALKING = [task for task in tasks() if make_env(task, {}, 0).language.message]
FREE = {"type": "learned", "words": "free"}
NAMES = {"slots": "slots", "learned": "learned", "free": FREE, "raw-state": "raw-state", "intention": "intention"}


def imitated(task: str, codec: Any, count: int = 24, **params: Any) -> tuple[list[Episode], TurnCodec, Recipe]:
    recipe = Recipe.model_validate({"task": task, "params": params, "agent": {"codec": codec}})
    found = codec_of(recipe.agent.codec, make_env(task, params, 0).language, recipe.agent.spans)
    return scripted_episodes(recipe, found, count, Silent()), found, recipe


def turns_of(episodes: list[Episode]) -> list[Any]:
    return [turn for e in episodes for t in e.trajectories.values() for turn in t.turns]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", TALKING)
def test_what_is_heard_is_what_was_said_one_step_before(task: str, name: str) -> None:
    episodes, _, _ = imitated(task, NAMES[name])
    for episode in episodes:
        for turn in turns_of([episode]):
            heard = {message.sender: message for message in turn.inbox}
            assert len(heard) == (len(episode.trajectories) - 1 if turn.step else 0)
            for sender, message in heard.items():
                assert message.sent_at == turn.step - 1
                assert message == episode.trajectories[sender].turns[turn.step - 1].message


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", TALKING)
def test_examples_show_messages_in_the_codecs_form(task: str, name: str) -> None:
    """Every turn can be written in the team's grammar, and its prompt shows the words that the codec gave."""
    episodes, codec, recipe = imitated(task, NAMES[name], 8)
    env: Any = make_env(task, {}, 0)
    tokenizer = word_tokenizer(starter_words(env.words, env.language, env.agents), 512)
    turn_format = turn_format_of(tokenizer, recipe.agent, codec)
    examples = supervised_examples(episodes, turn_format, recipe.agent)
    for example, turn in zip(examples, turns_of(episodes), strict=True):
        text = tokenizer.decode(example["input_ids"])
        for message in turn.inbox:
            assert f"<from> {message.sender} {message.payload or 'quiet'} <" in text
        if name == "raw-state":
            assert turn.message.payload == turn.observation.text
        assert ("<say>" in text) == bool(codec.speech.slots)


@pytest.mark.parametrize("name", ["slots", "learned", "free"])
@pytest.mark.parametrize("task", TALKING)
def test_what_is_played_costs_what_the_codec_says(task: str, name: str) -> None:
    episodes, codec, _ = imitated(task, NAMES[name])
    lengths = set()
    for turn in turns_of(episodes):
        assert turn.message == codec.encode(turn)
        count = len(turn.message.payload.split())
        slots = codec.speech.slots
        end = 0 if name == "slots" else 1
        expected = [math.log2(len(slot.choices) + end) for slot in slots][: count + end]
        assert turn.message.word_bits == tuple(expected)
        lengths.add(count)
        assert all(message.word_bits for message in turn.inbox)
    assert name == "slots" or len(codec.speech.slots) == 1 or len(lengths) > 1, "some are shortened"


def test_slots_are_played_as_they_always_were() -> None:
    episodes, _, _ = imitated("rendezvous", "slots")
    assert {len(turn.message.payload.split()) for turn in turns_of(episodes)} == {2}


def test_a_plan_is_what_then_happened() -> None:
    episodes, _, _ = imitated("rendezvous", {"type": "intention", "reward": True})
    for episode in episodes:
        for agent, mine in episode.trajectories.items():
            (other,) = episode.trajectories.keys() - {agent}
            for index, turn in enumerate(mine.turns):
                last = index + 1 == len(mine.turns)
                after = mine.final_observation if last else mine.turns[index + 1].observation
                seen = [after.fields["row"], after.fields["col"], f"{turn.reward:g}", "yes" if last else "no"]
                assert turn.message is not None
                expected = episode.trajectories[other].turns[index].action
                assert turn.message.payload.split() == [turn.action, *seen, expected]


LANGUAGE = TaskLanguage(
    actions=("go",),
    message=(
        Slot("what", ("a", "b", "unknown"), null="unknown"),
        Slot("where", ("0", "none"), null="none"),
        Slot("next", ("go",)),
    ),
)


def shortened(said: str, **settings: Any) -> Counter[str]:
    codec = codec_of(AgentSettings(codec={"type": "learned", **settings}).codec, LANGUAGE, SpanSettings())  # type: ignore[arg-type]
    assert isinstance(codec, LearnedCodec)
    return Counter(codec.shortened(said, seed) for seed in range(600))


def test_messages_are_cut_after_a_word_and_lose_what_says_nothing() -> None:
    found = shortened("a 0 go")
    assert found.keys() == {"a", "a 0", "a 0 go"}
    assert 0.4 < (found["a"] + found["a 0"]) / 600 * 1.5 < 0.6, "half of them are cut, a third of these at the end"
    assert shortened("a none go").keys() == {"a", "a none go"}
    assert shortened("unknown none go").keys() == {"", "unknown none go"}, "silence, where nothing is said"
    assert "" not in shortened("b none go"), "what is known is not kept back"
    assert shortened("a 0 go", shorten=0.0).keys() == {"a 0 go"}
    assert shortened("unknown none go", shorten=1.0)["unknown none go"] > 150, "a cut after the last word cuts nothing"
    assert shortened("a 0 go", max_words=2).keys() == {"a", "a 0"}


def test_free_words_leave_out_all_that_says_nothing() -> None:
    assert shortened("unknown 0 go", words="free").keys() == {"0", "0 go"}
    assert shortened("unknown none go", words="free").keys() == {"go"}
    assert shortened("a 0 go", words="free", max_words=1).keys() == {"a"}


def test_players_act_on_what_they_really_heard() -> None:
    """Who hears silence has no target and mostly stays; who hears a name walks, also where the message was cut."""
    episodes, _, _ = imitated("rendezvous", "learned", 300)
    moved: dict[bool, list[bool]] = {True: [], False: []}
    for turn in turns_of(episodes):
        words = turn.observation.text.split()
        if words[words.index("open") + 1] == "unknown" and turn.inbox:
            said = turn.inbox[0].payload.split()[:1]
            signs = dict(zip(words[8::2], words[9::2], strict=True))
            if said in (["a"], ["b"], ["c"]):
                if signs[said[0]] != "here":
                    moved[True].append(turn.action != "stay")
            else:
                moved[False].append(turn.action != "stay")
    assert len(moved[True]) > 100
    assert sum(moved[True]) / len(moved[True]) > 0.9
    assert sum(moved[False]) / len(moved[False]) < 0.25


def test_rounds_of_talk_are_observed_too() -> None:
    episodes, codec, _ = imitated("signal", "raw-state", 4, talk_rounds=2)
    assert {"talk", "0", "1"} <= set(codec.language.words)
    assert all(turn.message.payload == turn.observation.text for turn in turns_of(episodes))


def test_spans_of_what_was_said_are_learned() -> None:
    """The end carries loss where it is a choice."""
    episodes, codec, recipe = imitated("rendezvous", "learned", 8)
    env: Any = make_env("rendezvous", {}, 0)
    tokenizer = word_tokenizer(starter_words(env.words, env.language, env.agents), 512)
    turn_format = turn_format_of(tokenizer, recipe.agent, codec)
    ends = 0
    for example, turn in zip(supervised_examples(episodes, turn_format, recipe.agent), turns_of(episodes), strict=True):
        start = example["input_ids"].index(tokenizer.convert_tokens_to_ids("<turn>")) + 1
        others = tuple(agent for agent in env.agents if agent != turn.agent)
        _, spans = turn_format.parse(example["input_ids"][start:], others, turn.observation.legal_actions)
        said = [span for span in spans if span.kind is SpanKind.SAY]
        assert all(example["labels"][start + span.start] >= 0 for span in said)
        ends += len(said) > len(turn.message.payload.split())
    assert ends > 0


def test_scripts_are_shown_where_messages_are_lost_or_late_and_never_where_they_are_wrong() -> None:
    recipe = Recipe.model_validate({"task": "rendezvous"})
    codec = codec_of(recipe.agent.codec, make_env("rendezvous", {}, 0).language, recipe.agent.spans)
    harms = {
        "clean": ChannelHarm(),
        "dead": ChannelHarm(drop=1.0),
        "late": ChannelHarm(delay=2),
        "garbled": ChannelHarm(substitute=1.0, cap_bits=0.0),
    }
    episodes = scripted_episodes(recipe, codec, 40, Silent(), harms)
    kinds: Counter[str] = Counter()
    for episode in episodes:
        turns = [turn for turn in turns_of([episode]) if turn.step >= 3]
        ages = {turn.step - message.sent_at for turn in turns for message in turn.inbox}
        assert len(ages) <= 1
        kinds[{(): "dead", (1,): "arrives", (3,): "late"}[tuple(ages)]] += 1
        for turn in turns_of([episode]):
            for message in turn.inbox:
                assert message == episode.trajectories[message.sender].turns[message.sent_at].message
    assert kinds == {"dead": 10, "late": 10, "arrives": 20}
    assert scripted_episodes(recipe, codec, 4, Silent(), {"clean": ChannelHarm()}) == scripted_episodes(
        recipe, codec, 4, Silent()
    )
