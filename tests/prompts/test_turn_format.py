"""Turns survive being written and read, for every task, in both spellings; anything else is refused."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import pytest

from preconcert.agents import ChannelSettings
from preconcert.core import Env, GrammarError, Message, SpanKind, TaskLanguage
from preconcert.envs import make_env, tasks
from preconcert.models.starter import word_tokenizer
from preconcert.prompts import END_OF_PLAY, SILENCE, SpanSettings, TurnContent, TurnFormat, starter_words
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy, rollout
from tests.models.checkpoints import build_chat_tokenizer

SPELLINGS = ("compact", "labelled")
SETTINGS = (
    SpanSettings(),
    SpanSettings(intend_steps=3),
    SpanSettings(intend=False, say=False),
    SpanSettings(intend=False, foresee=False, say=False),
)


@lru_cache
def env_of(task: str) -> Env:
    return make_env(task, {}, 0)


@lru_cache
def tokenizer_of(task: str, spelling: str) -> Any:
    if spelling == "labelled":
        return build_chat_tokenizer()
    env: Any = env_of(task)
    return word_tokenizer(starter_words(env.words, env.language, env.agents), 512)


def format_of(task: str, spelling: str, spans: SpanSettings | None = None, memory: int = 0) -> TurnFormat:
    return TurnFormat(tokenizer_of(task, spelling), env_of(task).language, spans or SpanSettings(), memory)


def random_content(
    rng: random.Random, language: TaskLanguage, spans: SpanSettings, others: tuple[str, ...], legal: tuple[str, ...]
) -> TurnContent:
    foretold = language.actions if spans.intend_steps == 1 else (*language.actions, END_OF_PLAY)
    foresee = spans.foresee
    return TurnContent(
        action=rng.choice(legal),
        intentions={o: tuple(rng.choice(foretold) for _ in range(spans.intend_steps)) for o in others}
        if spans.intend
        else {},
        forecast=tuple(rng.choice(slot.choices) for slot in language.forecast) if foresee else (),
        reward=rng.choice(language.rewards) if foresee and language.rewards else None,
        done=rng.choice(("yes", "no")) if foresee and language.rewards else None,
        message=tuple(rng.choice(slot.choices) for slot in language.message) if spans.say else (),
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("task", tasks())
@pytest.mark.parametrize("spans", SETTINGS)
def test_write_and_parse_are_inverse(task: str, spelling: str, spans: SpanSettings) -> None:
    env, turn_format, rng = env_of(task), format_of(task, spelling, spans), random.Random(task)
    for number in range(12):
        me = env.agents[number % len(env.agents)]
        others = tuple(agent for agent in env.agents if agent != me)
        legal = tuple(rng.sample(env.language.actions, rng.randint(1, len(env.language.actions))))
        content = random_content(rng, env.language, spans, others, legal)
        written = turn_format.write(content, others, legal)
        assert turn_format.parse(written.ids, others, legal) == (content, written.spans)
        assert written.ids[-1] == turn_format.eos
        kinds = [span.kind for span in written.spans]
        assert kinds == sorted(kinds, key=list(SpanKind).index), "the order of the parts is fixed"
        assert all(a.end <= b.start for a, b in zip(written.spans, written.spans[1:], strict=False))
        automaton = turn_format.automaton(others, legal)
        assert automaton.is_final(automaton.walk(written.ids)[-1])
        assert len(written.ids) <= automaton.longest


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("task", tasks())
def test_every_mutation_is_refused_or_means_something_else(task: str, spelling: str) -> None:
    """No two sequences of the constrained grammar stand for one turn, and most are no turn at all."""
    env, turn_format, rng = env_of(task), format_of(task, spelling), random.Random(1)
    others, legal = tuple(env.agents[1:]), env.language.actions
    content = random_content(rng, env.language, SpanSettings(), others, legal)
    ids = turn_format.write(content, others, legal).ids
    refused = 0
    for _ in range(150):
        mutant = list(ids)
        place = rng.randrange(len(ids))
        kind = rng.choice(("drop", "double", "swap", "replace"))
        if kind == "drop":
            del mutant[place]
        elif kind == "double":
            mutant.insert(place, ids[place])
        elif kind == "swap":
            other = rng.randrange(len(ids))
            mutant[place], mutant[other] = mutant[other], mutant[place]
        else:
            mutant[place] = rng.choice(sorted(set(ids)))
        if tuple(mutant) == ids:
            continue
        try:
            parsed, _ = turn_format.parse(mutant, others, legal)
        except GrammarError:
            refused += 1
            continue
        if spelling == "compact" or mutant[-1] == turn_format.eos:
            text = turn_format.text(mutant).replace(" ", "").replace("\n", "")
            same_text = text == turn_format.text(ids).replace(" ", "").replace("\n", "")
            assert parsed != content or (spelling == "labelled" and same_text)
    assert refused > 75


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_incomplete_turns_and_illegal_actions_are_refused(spelling: str) -> None:
    turn_format, others = format_of("rendezvous", spelling), ("agent_1",)
    env = env_of("rendezvous")
    content = random_content(random.Random(0), env.language, SpanSettings(), others, ("stay",))
    ids = turn_format.write(content, others, ("stay",)).ids
    for end in range(len(ids) - 1):
        with pytest.raises(GrammarError):
            turn_format.parse(ids[:end], others, ("stay",))
    with pytest.raises(GrammarError):
        turn_format.parse(ids, others, ("north",))
    with pytest.raises(GrammarError):
        turn_format.parse((*ids, ids[0]), others, ("stay",))
    with pytest.raises(GrammarError, match="stay"):
        turn_format.write(content, others, ("north",))
    wrong = TurnContent("stay", content.intentions, ("9", "0"), "0", "no", ("a", "stay"))
    with pytest.raises(GrammarError, match="row"):
        turn_format.write(wrong, others, ("stay",))


def test_free_text_of_a_chat_model_is_read_with_its_spans() -> None:
    """Whatever the tokenisation: white space and line breaks are loose, words and labels are not."""
    turn_format, env = format_of("rendezvous", "labelled"), env_of("rendezvous")
    tokenizer, legal = turn_format.tokenizer, env.language.actions
    text = (
        "<intend> agent_1: north;\n<foresee> row: 2; col:  0; reward: 0; done: no;\n\n"
        "<say> target: b; next: stay; <act> east;"
    )
    ids = [*tokenizer.encode(text, add_special_tokens=False), turn_format.eos]
    written = turn_format.write(turn_format.parse(ids, ("agent_1",), legal)[0], ("agent_1",), legal)
    assert tuple(ids) != written.ids, "this would be the grammar's own spelling"
    for variant in (ids, ids[:-1], [*tokenizer.encode("\n " + text, add_special_tokens=False), turn_format.eos]):
        content, spans = turn_format.parse(variant, ("agent_1",), legal)
        assert content == TurnContent("east", {"agent_1": ("north",)}, ("2", "0"), "0", "no", ("b", "stay"))
        words = [tokenizer.decode(variant[span.start : span.end]) for span in spans]
        expected = ["north", "2", "0", "0", "no", "b", "stay", "east"]
        assert all(word in found for word, found in zip(expected, words, strict=True)), words
        assert [(span.kind, span.slot) for span in spans] == [(span.kind, span.slot) for span in written.spans]
    for wrong in (
        text.replace("row: 2", "row: 9"), text.replace("agent_1", "agent_2"), text.replace("<say>", "say"),
        text.replace("east;", "east"), text.replace("col:", "column:"), text + " and so on", "I go east.",
    ):  # fmt: skip
        with pytest.raises(GrammarError):
            turn_format.parse([*tokenizer.encode(wrong, add_special_tokens=False), ids[-1]], ("agent_1",), legal)


@pytest.mark.parametrize("ended_with_eos", [True, False])
def test_followups_keep_the_special_tokens_of_the_template(ended_with_eos: bool) -> None:
    """A transcript put together piece by piece is the template's own rendering of the whole conversation."""
    turn_format, env = format_of("rendezvous", "labelled"), env_of("rendezvous")
    tokenizer = turn_format.tokenizer
    first, others = make_env("rendezvous", {}, 0).reset()["agent_0"], ("agent_1",)
    inbox = (Message("agent_1", ("agent_0",), "b stay", 1.0, 2, 0),)
    prompt = turn_format.prompt_ids("agent_0", first, (), others)
    content = random_content(random.Random(2), env.language, SpanSettings(), others, first.legal_actions)
    answer = turn_format.write(content, others, first.legal_actions).ids
    if not ended_with_eos:
        answer = answer[:-1]
    whole = prompt + answer + turn_format.followup_ids("agent_0", first, inbox, others, ended_with_eos)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [whole.count(start), whole.count(end)] == [5, 4]  # system, user, assistant, user, and the open answer
    text = tokenizer.decode(whole)
    heard = "agent_1 said: b stay"
    assert heard in text
    assert heard not in tokenizer.decode(prompt)
    parts = [part.partition("\n") for part in text.split("<|im_start|>")[1:]]
    assert [role for role, _, _ in parts] == ["system", "user", "assistant", "user", "assistant"]
    chat = [{"role": r, "content": c.replace("<|im_end|>\n", "")} for r, _, c in parts[:-1]]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == text


def test_unknown_words_are_named() -> None:
    env = env_of("rendezvous")
    blind = word_tokenizer([*starter_words((), env.language, env.agents), "left", "open"], 512)
    turn_format = TurnFormat(blind, env.language, SpanSettings())
    with pytest.raises(GrammarError) as raised:
        turn_format.prompt_ids("agent_0", make_env("rendezvous", {}, 0).reset()["agent_0"], (), ("agent_1",))
    assert "'col'" in str(raised.value)
    assert "'row'" in str(raised.value)
    assert "'left'" not in str(raised.value)


@pytest.mark.parametrize("memory", [0, 3])
def test_the_inbox_comes_before_what_it_refers_to_and_silence_has_its_shape(memory: int) -> None:
    turn_format = format_of("rendezvous", "compact", memory=memory)
    seen = make_env("rendezvous", {}, 0).reset()["agent_0"]
    mail = (Message("agent_1", ("agent_0",), "b stay", 1.0, 2, 0),)
    silent = turn_format.prompt_ids("agent_0", seen, (), ("agent_1",), ["north"])
    spoken = turn_format.prompt_ids("agent_0", seen, mail, ("agent_1",), ["north"])
    assert len(silent) == len(spoken)
    words = turn_format.tokenizer.decode(spoken).split()
    assert words[:4] == ["<from>", "agent_1", "b", "stay"]
    assert turn_format.tokenizer.decode(silent).split()[:4] == ["<from>", "agent_1", SILENCE, SILENCE]
    assert words[-1] == "<turn>"
    assert ("<did>" in words) == bool(memory)
    if memory:
        assert words[words.index("<did>") + 1 :][:memory] == [SILENCE, SILENCE, "north"]


@pytest.mark.parametrize("task", tasks())
def test_the_vocabulary_covers_every_text_of_200_episodes(task: str) -> None:
    """Words come from a few dozen episodes and the task's own list; no later episode needs another."""
    env: Any = env_of(task)
    turn_format = TurnFormat(tokenizer_of(task, "compact"), env.language, SpanSettings(), 2)
    known = set(turn_format.tokenizer.get_vocab())
    specs = [EpisodeSpec(task, {}, 10_000 + i, "heldout" if i % 2 else "train") for i in range(200)]
    for episode in rollout(specs, ScriptedPolicy("random"), ChannelSettings(), 0):
        assert set(" ".join(episode.states).split()) <= known
        for agent, trajectory in episode.trajectories.items():
            others = tuple(other for other in episode.trajectories if other != agent)
            for turn in trajectory.turns:
                ids = turn_format.prompt_ids(agent, turn.observation, turn.inbox, others, [turn.action])
                assert turn_format.tokenizer.unk_token_id not in ids
            assert set(trajectory.final_observation.text.split()) <= known
