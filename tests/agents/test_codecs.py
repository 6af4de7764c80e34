"""What messages are made of: grammar, payload, bits and prompts of every codec, in both spellings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from preconcert.agents import AgentSettings, ChannelMode, ChannelSettings, Context, TurnCodec, codec_of, turn_format_of
from preconcert.core import (
    ConfigError,
    Episode,
    Forecast,
    GrammarError,
    Intention,
    Message,
    Slot,
    SpanKind,
    TaskLanguage,
    Turn,
    UnknownNameError,
)
from preconcert.envs import make_env, tasks
from preconcert.models.starter import word_tokenizer
from preconcert.prompts import SILENCE, STOP, SpanSettings, TurnContent, TurnFormat, starter_words
from preconcert.training.rollout import rollout
from tests.models.checkpoints import build_chat_tokenizer
from tests.training.teams import AGENTS, chat_checkpoint, load, specs, starter_checkpoint, team_on

SPELLINGS = ("compact", "labelled")
TALKING = [task for task in tasks() if make_env(task, {}, 0).language.message]
CODECS: dict[str, Any] = {
    "slots": "slots",
    "learned": "learned",
    "free": {"type": "learned", "words": "free", "max_words": 3},
    "raw-state": "raw-state",
    "intention": "intention",
}
WRITTEN = ("slots", "learned", "free")
ACT = SpanSettings(intend=False, foresee=False)


def settings_of(codec: str, **more: Any) -> AgentSettings:
    return AgentSettings(codec=CODECS[codec], **more)


@lru_cache
def tokenizer_of(task: str, spelling: str) -> Any:
    if spelling == "labelled":
        return build_chat_tokenizer()
    env: Any = make_env(task, {}, 0)
    return word_tokenizer(starter_words(env.words, env.language, env.agents), 512)


def made(task: str, spelling: str, codec: str, spans: SpanSettings | None = None) -> tuple[TurnFormat, TurnCodec]:
    settings = settings_of(codec, spans=spans or SpanSettings())
    found = codec_of(settings.codec, make_env(task, {}, 0).language, settings.spans)
    return turn_format_of(tokenizer_of(task, spelling), settings, found), found


def messages(slots: tuple[Slot, ...], stops: bool) -> Iterator[tuple[str, ...]]:
    """Every message that can be written."""
    for length in range(0 if stops else len(slots), len(slots) + 1):
        yield from product(*(slot.choices for slot in slots[:length]))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("codec", WRITTEN)
@pytest.mark.parametrize("task", TALKING)
def test_turns_are_read_as_they_were_written(task: str, codec: str, spelling: str) -> None:
    """A sample of all messages of every task: every length, the span of each word, and the end where it was chosen."""
    turn_format, found = made(task, spelling, codec, ACT)
    legal = found.language.actions[:2]
    slots, stops = found.speech.slots, found.speech.stops
    rng = np.random.default_rng(0)
    for length in range(0 if stops else len(slots), len(slots) + 1):
        for _ in range(12):
            said = tuple(str(rng.choice(slot.choices)) for slot in slots[:length])
            content = TurnContent(legal[0], message=said)
            written = turn_format.write(content, (), legal)
            assert turn_format.parse(written.ids, (), legal) == (content, written.spans)
            spoken = [span for span in written.spans if span.kind is SpanKind.SAY]
            ended = stops and length < len(slots)
            assert [span.slot for span in spoken] == [slot.name for slot in slots[: length + ended]]
            texts = [turn_format.text(written.ids[span.start : span.end]).rstrip(";") for span in spoken]
            assert texts[:length] == list(said)
            if ended:
                assert texts[length] == (SILENCE if spelling == "compact" else STOP)
                assert written.chosen[spoken[-1].start : spoken[-1].end].count(True) >= 1, "the end is a choice"


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("codec", WRITTEN)
def test_the_automaton_accepts_exactly_the_messages(codec: str, spelling: str) -> None:
    """All paths of the automaton, one by one, are all messages."""
    turn_format, found = made("rendezvous", spelling, codec, ACT)
    legal = ("stay",)
    automaton = turn_format.automaton((), legal)

    def paths(state: int, ids: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if automaton.is_final(state):
            yield ids
        for token, target in automaton.transitions[state].items():
            yield from paths(target, (*ids, token))

    expected = {
        turn_format.write(TurnContent("stay", message=said), (), legal).ids
        for said in messages(found.speech.slots, found.speech.stops)
    }
    assert set(paths(0, ())) == expected
    sizes = [len(slot.choices) for slot in found.speech.slots]
    stopped = sum(int(np.prod(sizes[:n])) for n in range(len(sizes))) if found.speech.stops else 0
    assert len(expected) == int(np.prod(sizes)) + stopped


def test_text_of_a_chat_model_may_stop_anywhere_in_a_message() -> None:
    turn_format, _ = made("rendezvous", "labelled", "learned", ACT)
    tokenizer, eos = turn_format.tokenizer, turn_format.eos
    for text, said in (
        ("<say> target:  stop;\n<act> east;", ()),
        ("<say> target: b; next: stop; <act> east;", ("b",)),
        ("<say> target: b; next: stay;\n\n<act> east;", ("b", "stay")),
    ):
        ids = [*tokenizer.encode(text, add_special_tokens=False), eos]
        content, spans = turn_format.parse(ids, (), ("east",))
        assert content == TurnContent("east", message=said)
        assert sum(span.kind is SpanKind.SAY for span in spans) == min(2, len(said) + 1)
    for wrong in ("target: stop; next: stay;", "target: b;", ""):
        ids = [*tokenizer.encode(f"<say> {wrong}\n<act> east;", add_special_tokens=False), eos]
        with pytest.raises(GrammarError):
            turn_format.parse(ids, (), ("east",))


def test_a_message_that_is_too_long_or_has_the_last_word_is_refused() -> None:
    turn_format, _ = made("rendezvous", "compact", "learned", ACT)
    with pytest.raises(GrammarError, match="no message of 2 words"):
        turn_format.write(TurnContent("stay", message=("a", "stay", "stay")), (), ("stay",))
    language = TaskLanguage(actions=("go",), message=(Slot("word", ("a", SILENCE)),))
    settings = settings_of("learned", spans=ACT)
    codec = codec_of(settings.codec, language, ACT)
    loud = turn_format_of(word_tokenizer(starter_words((), language, ("me",)), 64), settings, codec)
    with pytest.raises(GrammarError, match="which ends messages"):
        loud.automaton((), ("go",))


# ---- messages of turns that were played


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    folder = tmp_path_factory.mktemp("codecs")

    @lru_cache
    def make(spelling: str) -> Any:
        if spelling == "compact":
            return load(starter_checkpoint(folder / "starter"))
        return load(chat_checkpoint(folder / "chat", "qwen3"))

    return make


def played(models: Callable[[str], Any], spelling: str, codec: str, **more: Any) -> list[Episode]:
    team = team_on(models(spelling), settings_of(codec, max_tokens=400, **more))
    return rollout(games(spelling), team, ChannelSettings(), 0)


def games(spelling: str) -> list[Any]:
    """Fewer on the chat model, whose prompts are long."""
    return specs(3, 3) if spelling == "compact" else specs(1, 1)


def turns_of(episodes: list[Episode]) -> list[Turn]:
    return [turn for e in episodes for t in e.trajectories.values() for turn in t.turns]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("codec", CODECS)
def test_messages_say_what_the_codec_promises_at_lengths_counted_by_hand(
    models: Callable[[str], Any], codec: str, spelling: str
) -> None:
    """Rendezvous with two landmarks on a 3 × 3 grid, three steps: target a, b or unknown; five actions."""
    lengths = set()
    for turn in turns_of(played(models, spelling, codec)):
        assert not turn.malformed
        message = turn.message
        assert message is not None
        words = message.payload.split()
        lengths.add(len(words))
        spoken = [span for span in turn.spans if span.kind is SpanKind.SAY]
        own = -sum(sum(turn.logprobs[span.start : span.end]) for span in spoken) / np.log(2.0)
        if codec == "slots":
            assert message.word_bits == (np.log2(3), np.log2(5))
        elif codec == "learned":
            assert message.word_bits == (np.log2(4), np.log2(6))[: len(words) + 1]
        elif codec == "free":  # a, b, unknown and five actions
            assert message.word_bits == (np.log2(9),) * min(3, len(words) + 1)
        elif codec == "raw-state":
            assert message.payload == turn.observation.text
            # left 0-3, row 0-2, col 0-2, open a/b/unknown, and a sign for each landmark, each after its label
            expected = [4, 3, 3, 3, 17, 17]
            assert message.word_bits == tuple(bits for n in expected for bits in (0.0, float(np.log2(n))))
            own = 0.0
        else:
            assert turn.forecast is not None
            (intention,) = turn.intentions
            fields = turn.forecast.fields
            assert words == [turn.action, fields["row"], fields["col"], *intention.actions]
            assert message.word_bits == (np.log2(5), np.log2(3), np.log2(3), np.log2(5))
            told = [s for s in turn.spans if s.kind is not SpanKind.FORESEE or s.slot in ("row", "col")]
            own = -sum(sum(turn.logprobs[span.start : span.end]) for span in told) / np.log(2.0)
        if codec in WRITTEN:
            assert len(spoken) == len(message.word_bits)
        else:
            assert not spoken
        assert message.bits == pytest.approx(own)
        assert message.raw_bits == sum(message.word_bits)
    if codec == "learned" and spelling == "compact":
        assert 0 in lengths
        assert len(lengths) > 1


@pytest.mark.parametrize("context", Context)
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("codec", CODECS)
def test_the_inbox_shows_the_words_or_one_for_silence(
    models: Callable[[str], Any], codec: str, spelling: str, context: Context
) -> None:
    team = team_on(models(spelling), settings_of(codec, context=context, max_tokens=400))
    for episode in rollout(games(spelling), team, ChannelSettings(), 0):
        for agent, trajectory in episode.trajectories.items():
            (other,) = set(AGENTS) - {agent}
            before: Message | None = None
            start = 0
            for step, turn in enumerate(trajectory.turns):
                assert turn.inbox == (() if before is None else (before,))
                new = turn.prompt_ids[start:]
                text = team.format.tokenizer.decode(new)
                many = len(team.codec.speech.slots) if codec == "slots" and spelling == "compact" else 1
                words = (before.payload if before is not None else "") or " ".join([SILENCE] * many)
                shown = f"<from> {other} {words} <me>" if spelling == "compact" else f"{other} said: {words}\n"
                assert shown in text
                if context is Context.TRANSCRIPT:
                    start = len(turn.prompt_ids) + len(turn.completion_ids)
                before = episode.trajectories[other].turns[step].message


@pytest.mark.parametrize("codec", CODECS)
def test_shuffling_exchanges_whole_messages(models: Callable[[str], Any], codec: str) -> None:
    """The control works for messages of any length: what arrives was sent by the same agent in another group."""
    team = team_on(models("compact"), settings_of(codec))
    episodes = rollout(specs(4, 1), team, ChannelSettings(mode=ChannelMode.SHUFFLED), 0)
    sent = {(e.group, t.agent, t.step): t.message for e in episodes for t in turns_of([e])}
    arrived = 0
    for episode in episodes:
        for turn in turns_of([episode]):
            for message in turn.inbox:
                arrived += 1
                others = [
                    m.payload for (group, agent, _), m in sent.items()
                    if group != episode.group and agent == message.sender and m is not None
                ]  # fmt: skip
                assert message.payload in others
    assert arrived == 4 * 2 * 2


def test_the_system_prompt_explains_the_messages(models: Callable[[str], Any]) -> None:
    found = {}
    for codec in CODECS:
        turn = turns_of(played(models, "labelled", codec))[0]
        found[codec] = models("labelled").tokenizer.decode(turn.prompt_ids)
    assert "<say> target: VALUE; next: VALUE;\n" in found["slots"]
    assert STOP not in found["slots"]
    assert f"write {STOP}; in the place of a VALUE" in found["learned"]
    assert "<say> word1: VALUE; word2: VALUE; word3: VALUE;\n" in found["free"]
    assert "<say>" not in found["raw-state"] + found["intention"]
    assert "is what it saw" in found["raw-state"]
    assert "what it does, what it foresees of row, what it foresees of col, what it expects" in found["intention"]


# ---- settings


def test_intentions_say_what_the_settings_ask_for() -> None:
    language = make_env("rendezvous", {}, 0).language
    for settings, spans, sizes in (
        ({}, SpanSettings(), (5, 5, 5, 5)),
        ({"forecast": False}, SpanSettings(), (5, 5)),
        ({"reward": True, "about": []}, SpanSettings(), (5, 5, 5, 2, 2)),
        ({}, SpanSettings(intend_steps=2), (5, 5, 5, 6, 6)),
        ({"reward": True}, ACT, (5,)),
        ({"about": ["agent_1"]}, SpanSettings(foresee=False), (5, 5)),
    ):
        codec = AgentSettings(codec={"type": "intention", **settings}, spans=spans).codec  # type: ignore[arg-type]
        found = codec_of(codec, language, spans)
        content = TurnContent(
            "stay", {"agent_1": ("north",) * spans.intend_steps}, ("1", "2"), "0", "no"
        )
        message = found.encode(_turn(content, spans))
        assert message is not None
        assert message.word_bits == tuple(map(np.log2, sizes))
        assert len(message.payload.split()) == len(sizes)
    named = codec_of(AgentSettings(codec={"type": "intention", "about": ["agent_7"]}).codec, language, SpanSettings())  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="agent_7"):
        named.check(AGENTS)


def test_an_action_without_an_alternative_costs_nothing() -> None:
    """In a round of talk everybody listens."""
    env = make_env("rendezvous", {"talk_rounds": 2}, 0)
    codec = codec_of(settings_of("intention").codec, env.language, SpanSettings())
    view = env.reset()["agent_0"]
    assert view.legal_actions == ("listen",)
    content = TurnContent("listen", {"agent_1": ("stay",)}, ("1", "2"), "0", "no")
    talk = codec.encode(replace(_turn(content, SpanSettings()), observation=view))
    world = codec.encode(_turn(replace(content, action="stay"), SpanSettings()))
    assert talk is not None
    assert world is not None
    assert talk.payload == "listen 1 2 stay", "it is said all the same: every message has the same form"
    assert talk.word_bits == (0.0, np.log2(5), np.log2(5), np.log2(6))
    assert world.word_bits == (np.log2(6), np.log2(5), np.log2(5), np.log2(6)), "five moves, or to listen"


def _turn(content: TurnContent, spans: SpanSettings) -> Turn:
    view = make_env("rendezvous", {}, 0).reset()["agent_0"]
    forecast = Forecast(dict(zip(("row", "col"), content.forecast, strict=True)), content.reward, False)
    intentions = tuple(Intention(about, actions, 1.0) for about, actions in content.intentions.items())
    return Turn(
        agent="agent_0", step=0, observation=view, inbox=(), prompt_ids=(), completion_ids=(), logprobs=(),
        sampled=(), spans=(), intentions=intentions if spans.intend else (),
        forecast=forecast if spans.foresee else None,
        message=Message("agent_0", ("agent_1",), "", 0.0, 0, 0), action=content.action, malformed=False, reward=0.0,
    )  # fmt: skip


def test_observations_cost_by_the_view_of_who_sees_them() -> None:
    """The two roles of `signal` see different fields: labels and the role are no news."""
    env = make_env("signal", {}, 0)
    views = env.reset()
    codec = codec_of(settings_of("raw-state").codec, env.language, SpanSettings())
    base = _turn(TurnContent("stay", {}, ("1", "2"), "0", "no"), SpanSettings())
    things = {"agent_0": 1 + 4, "agent_1": 4}
    for agent, view in views.items():
        message = codec.encode(replace(base, agent=agent, observation=view))
        assert message is not None
        assert message.payload == view.text
        # Won, lost or neither; and things with 4 colours, 4 shapes, or nothing.
        assert message.raw_bits == pytest.approx(np.log2(3) + 2 * things[agent] * np.log2(5))
        slots = codec.slots([other for other in views if other != agent])
        assert len(slots) == len(view.text.split())
        assert all(word in slot.choices for word, slot in zip(view.text.split(), slots, strict=True))


def test_observations_without_a_view_cost_by_the_tasks_words() -> None:
    env = make_env("signal", {}, 0)
    views = env.reset()
    language = replace(env.language, views=())
    codec = codec_of(settings_of("raw-state").codec, language, SpanSettings())
    assert codec.slots(["agent_1"]) == ()
    base = _turn(TurnContent("stay", {}, ("1", "2"), "0", "no"), SpanSettings())
    for view in views.values():
        message = codec.encode(replace(base, observation=view, malformed=True))
        assert message is not None
        assert message.payload == view.text
        # 9 fixed words, 4 colours, 4 shapes, 4 picks, or the end
        assert message.word_bits == (np.log2(22),) * (len(view.text.split()) + 1)
    with pytest.raises(ConfigError, match="lack 'upside'"):
        codec.encode(replace(base, observation=replace(view, text="upside down")))
    with pytest.raises(ConfigError, match="neither a view nor words"):
        codec_of(settings_of("raw-state").codec, replace(language, words=()), SpanSettings())


@pytest.mark.parametrize("task", [task for task in TALKING if make_env(task, {}, 0).language.view is None])
def test_declared_words_cover_what_is_seen(task: str) -> None:
    for seed in range(20):
        env = make_env(task, {}, seed)
        views, done, rng = env.reset(), False, np.random.default_rng(seed)
        while not done:
            assert {word for view in views.values() for word in view.text.split()} <= set(env.language.words)
            result = env.step({agent: str(rng.choice(view.legal_actions)) for agent, view in views.items()})
            views, done = result.observations, result.done


def test_a_name_is_enough_and_unknown_ones_are_refused() -> None:
    assert AgentSettings(codec="learned").codec.type == "learned"  # type: ignore[arg-type]
    assert AgentSettings().codec.type == "slots"
    for wrong, said in (("lerned", "unknown 'lerned'"), ({"type": "lerned"}, "learned"), ({"words": "free"}, "type")):
        with pytest.raises(ValidationError, match=said):
            AgentSettings(codec=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="extra"):
        AgentSettings(codec={"type": "slots", "words": "free"})  # type: ignore[arg-type]


def test_who_is_not_to_speak_says_nothing(models: Callable[[str], Any]) -> None:
    for codec in CODECS:
        turns = turns_of(played(models, "compact", codec, spans=SpanSettings(say=False)))
        assert all(turn.message is None and not turn.inbox for turn in turns)
