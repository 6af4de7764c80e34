"""World rows survive being written and read, for every task with a view, in both spellings, and without a view."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from preconcert.core import (
    GrammarError,
    Message,
    Move,
    Observation,
    Slot,
    TaskLanguage,
    UnknownNameError,
    View,
    ViewField,
)
from preconcert.envs import make_env, tasks
from preconcert.models.starter import word_tokenizer
from preconcert.prompts import (
    OWN_TEAM,
    PARTNERS,
    SILENCE,
    Earlier,
    SpanSettings,
    TurnFormat,
    WorldAnswer,
    WorldFormat,
    WorldPart,
    starter_words,
)
from tests.models.checkpoints import build_chat_tokenizer

SPELLINGS = ("compact", "labelled")
TOY = TaskLanguage(
    actions=("left", "right"),
    message=(Slot("one", ("x", "y")), Slot("two", ("x", "z"))),
    rewards=("-1", "0", "0.5"),
    view=View(
        (
            ViewField("left", tuple(str(n) for n in range(13)), "left", number=True, determined=True),
            ViewField("door", ("open", "shut"), "the door"),
            ViewField("mood", ("x", "y", "z")),
        )
    ),
)
OTHERS = ("b", "c")


@lru_cache
def format_of(name: str, spelling: str) -> WorldFormat:
    if name in ("toy", "free"):
        language = TOY if name == "toy" else replace(TOY, view=None)
        words = starter_words(["the left door is open"], TOY, ("a", *OTHERS), digits=True)
    else:
        env: Any = make_env(name, {}, 0)
        language, words = env.language, starter_words(env.words, env.language, env.agents, digits=True)
    tokenizer = build_chat_tokenizer() if spelling == "labelled" else word_tokenizer(words, 512)
    return WorldFormat(TurnFormat(tokenizer, language, SpanSettings(), 2))


def agents_of(name: str) -> tuple[str, ...]:
    return ("a", *OTHERS) if name in ("toy", "free") else make_env(name, {}, 0).agents


def random_answer(
    rng: random.Random, form: WorldFormat, others: tuple[str, ...], asked: tuple[str, ...]
) -> WorldAnswer:
    language = form.language
    done = rng.random() < 0.3
    if language.view is None:
        view = " ".join(rng.choice(("the", "left", "door", "is", "open", "0")) for _ in range(rng.randint(0, 5)))
    else:
        view = language.view.render([rng.choice(item.choices) for item in language.view.fields])
    heard = {other: " ".join(rng.choice(slot.choices) for slot in language.message) for other in others}
    return WorldAnswer(
        view=view,
        reward=rng.choice(language.rewards) if language.rewards else None,
        done=done,
        others={other: rng.choice(language.actions) for other in asked},
        heard={o: words for o, words in heard.items() if form.talks and not done and rng.random() < 0.7},
        value=rng.randrange(10) if form.valued and not done else None,
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["toy", "free", *(t for t in tasks() if make_env(t, {}, 0).language.view)])
def test_write_and_parse_are_inverse(name: str, spelling: str) -> None:
    form, rng = format_of(name, spelling), random.Random(name)
    others = agents_of(name)[1:]
    for number in range(25):
        asked = tuple(rng.sample(others, len(others))) if number % 2 else ()
        answer = random_answer(rng, form, others, asked)
        written = form.write(answer, others, asked)
        parsed, spans = form.parse(written.ids, others, asked)
        assert parsed == answer
        assert [(span.part, span.slot) for span in spans] == [(span.part, span.slot) for span in written.spans]
        if spelling == "compact" or name != "free":  # elsewhere spans are found in the text, without its punctuation
            assert spans == written.spans
        parts = [span.part for span in written.spans]
        assert parts == sorted(parts, key=list(WorldPart).index), "the order of the parts is fixed"
        assert written.ids[-1] == form.turns.eos
        assert len(written.chosen) == len(written.ids)
        automaton = form.automaton(others, asked)
        assert (automaton is None) == (name == "free")
        if automaton is not None:
            states = automaton.walk(written.ids)
            assert automaton.is_final(states[-1])
            assert len(written.ids) <= automaton.longest
            for place, chosen in enumerate(written.chosen):
                assert chosen == (len(automaton.transitions[states[place]]) > 1)
        if answer.done:
            assert not {WorldPart.HEAR, WorldPart.VALUE} & set(parts)


def test_a_row_reads_as_it_should() -> None:
    form = format_of("toy", "compact")
    seen = Observation("a", "left 12 the door shut z", TOY.actions, 3)
    inbox = (Message("b", ("a",), "x z", 0.0, 2, 2),)
    move = Move("left", "y x", {"c": "right"})
    assert form.asked(OTHERS, move) == ("b",)
    prompt = form.prompt_ids("a", seen, inbox, OTHERS, ("right",), move)
    answer = WorldAnswer("left 7 the door open x", "0.5", False, {"b": "left"}, {"c": "y x"}, 4)
    ids = form.write(answer, OTHERS, ("b",)).ids
    assert form.tokenizer.decode(prompt + ids) == (
        "<from> b x z <from> c quiet quiet <did> quiet right <me> a <see> left 12 the door shut z <turn> "
        "<say> y x <act> left <intend> c right "
        "<intend> b left <foresee> left 0 7 the door open x 0.5 no <say> b quiet <say> c y x 4 <eos>"
    )
    quiet = form.prompt_ids("a", seen, (), OTHERS, (), Move("left"))
    assert form.tokenizer.decode(quiet).endswith("<turn> <say> quiet <act> left")


def test_given_and_asked_actions_are_spelled_alike() -> None:
    """What stands on which side of the line changes nothing about the whole."""
    for spelling in SPELLINGS:
        form = format_of("toy", spelling)
        seen = Observation("a", "left 12 the door shut z", TOY.actions, 3)
        both = {"b": "left", "c": "right"}
        one = form.prompt_ids("a", seen, (), OTHERS, (), Move("left", None, both))
        one += form.write(WorldAnswer("left 7 the door open x", "0", True), OTHERS, ()).ids
        other = form.prompt_ids("a", seen, (), OTHERS, (), Move("left"))
        other += form.write(WorldAnswer("left 7 the door open x", "0", True, both), OTHERS, OTHERS).ids
        assert one == other


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["toy", "free"])
def test_what_is_no_answer_is_refused(name: str, spelling: str) -> None:
    form, rng = format_of(name, spelling), random.Random(3)
    written = form.write(random_answer(rng, form, OTHERS, OTHERS), OTHERS, OTHERS)
    with pytest.raises(GrammarError):
        form.parse(written.ids[:-2], OTHERS, OTHERS)
    with pytest.raises(GrammarError):
        form.parse(written.ids, OTHERS, ("b",))
    with pytest.raises(GrammarError):
        form.parse((), OTHERS, OTHERS)
    with pytest.raises(GrammarError, match="no message"):
        form.write(WorldAnswer("", "0", False, {}, {"b": "x"}, 1), OTHERS, ()) if name == "free" else form.write(
            WorldAnswer("left 7 the door open x", "0", False, {}, {"b": "x"}, 1), OTHERS, ()
        )
    if name == "toy":
        with pytest.raises(GrammarError, match="no value of left"):
            form.write(WorldAnswer("left 13 the door open x", "0", True), OTHERS, ())


def test_free_words_end_at_their_mark() -> None:
    for spelling, mark in (("compact", "the <turn> door"), ("labelled", "the\ndoor")):
        form = format_of("free", spelling)
        text = mark if spelling == "compact" else "the door"
        if spelling == "compact":
            with pytest.raises(GrammarError, match="ends it"):
                form.write(WorldAnswer(text, "0", True), OTHERS, ())
        written = form.write(WorldAnswer("the door", "0", True), OTHERS, ())
        chosen = [token for token, free in zip(written.ids, written.chosen, strict=True) if free]
        assert len(chosen) > 2


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_values_keep_their_expectation(spelling: str) -> None:
    form = WorldFormat(format_of("toy", spelling).turns, (-2.0, 7.0))
    dice = [(index + 0.5) / 1000 for index in range(1000)]
    for value in (-2.0, -1.3, 0.0, 3.25, 7.0):
        mean = sum(form.value_of(form.digit_of(value, one)) for one in dice) / len(dice)
        assert mean == pytest.approx(value, abs=0.01)
    assert form.digit_of(-5.0, 0.9) == 0
    assert form.digit_of(50.0, 0.0) == 9
    found = form.value_state(OTHERS, ("b",))
    assert found is not None
    automaton = form.automaton(OTHERS, ("b",))
    assert automaton is not None
    assert set(automaton.transitions[found[0]]) == set(found[1])
    assert sorted(found[1].values()) == list(range(10))


def test_default_range_is_that_of_one_reward() -> None:
    assert format_of("toy", "compact").value_range == (-1.0, 0.5)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_prompts_say_whose_play_it_is_only_where_they_are_to(spelling: str) -> None:
    quiet = format_of("toy", spelling)
    telling = WorldFormat(quiet.turns, tells_partners=True)
    asked = ("a", Observation("a", "the left door is open", TOY.actions, 0), (), OTHERS, (), Move(TOY.actions[0]))
    prompts = {kind: telling.prompt_ids(*asked, partners=kind) for kind in PARTNERS}
    assert len(set(prompts.values())) == len(PARTNERS)
    assert prompts[OWN_TEAM] == telling.prompt_ids(*asked)
    assert {quiet.prompt_ids(*asked, partners=kind) for kind in PARTNERS} == {quiet.prompt_ids(*asked)}
    for kind, ids in prompts.items():
        text = quiet.tokenizer.decode(ids)
        assert kind in text.partition("<by>")[2].split("<", 1)[0]
    with pytest.raises(UnknownNameError, match="nobody"):
        quiet.prompt_ids(*asked, partners="nobody")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_prompts_say_what_oneself_has_said_only_where_they_are_to(spelling: str) -> None:
    quiet = format_of("toy", spelling)
    telling = WorldFormat(quiet.turns, own_words=True)
    move = Move(TOY.actions[0], "y z")
    asked = ("a", Observation("a", "the left door is open", TOY.actions, 0), (), OTHERS, (), move)
    prompts = {said: telling.prompt_ids(*asked, said=said) for said in (None, "x x", "y x", "y z")}
    assert len(set(prompts.values())) == len(prompts)
    assert {quiet.prompt_ids(*asked, said=said) for said in prompts} == {quiet.prompt_ids(*asked)}
    moved = telling.move_ids(OTHERS, move)
    view = quiet.prompt_ids(*asked)[: -len(moved)]
    for said, ids in prompts.items():
        assert (ids[: len(view)], ids[-len(moved) :]) == (view, moved)
        own = quiet.tokenizer.decode(ids[len(view) : -len(moved)])
        assert own.split("<from>")[1].replace(":", " ").split()[0] == "a"
        assert [word for word in own.replace(";", " ").split() if word in ("x", "y", "z")] == (said or "").split()
    speechless = TurnFormat(quiet.tokenizer, TOY, SpanSettings(say=False), 2)
    assert not WorldFormat(speechless, own_words=True).own_words


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_prompts_show_the_last_earlier_moments_in_their_order(spelling: str) -> None:
    quiet = format_of("toy", spelling)
    (other, *_) = OTHERS
    move = Move(TOY.actions[0], "y z")
    asked = ("a", Observation("a", "the left door is open", TOY.actions, 0), (), OTHERS, (), move)
    first = Earlier("the left door is shut", ((other, "x x"),), "y x", TOY.actions[0])
    second = Earlier("the right door is shut", (), None, TOY.actions[1])
    plain, moved = quiet.prompt_ids(*asked), quiet.move_ids(OTHERS, move)
    assert quiet.prompt_ids(*asked, earlier=(first, second)) == plain
    one, two = (WorldFormat(quiet.turns, recall=recall) for recall in (1, 2))
    assert one.prompt_ids(*asked) == plain
    assert one.prompt_ids(*asked, earlier=(first, second)) == one.prompt_ids(*asked, earlier=(second,))
    view, shown = plain[: -len(moved)], {}
    for name, ids in (
        ("second", one.prompt_ids(*asked, earlier=(second,))),
        ("both", two.prompt_ids(*asked, earlier=(first, second))),
    ):
        assert (ids[: len(view)], ids[-len(moved) :]) == (view, moved)
        shown[name] = ids[len(view) : -len(moved)]
    begins = shown["both"][: -len(shown["second"])]
    assert (*begins, *shown["second"]) == shown["both"]
    for ids, moment in ((begins, first), (shown["second"], second)):
        text = quiet.tokenizer.decode(ids).replace(";", " ").replace(":", " ")
        heard, _, rest = text.partition("<see>")
        seen, _, rest = rest.partition("<say>")
        said, _, did = rest.partition("<act>")
        assert [each.split()[0] for each in heard.split("<from>")[1:]] == list(OTHERS)
        words = [[word for word in each.split() if word in ("x", "y", "z")] for each in heard.split("<from>")[1:]]
        assert words == [dict(moment.heard).get(name, "").split() for name in OTHERS]
        assert seen.split() == moment.view.split()
        assert [word for word in said.split() if word in ("x", "y", "z")] == (moment.said or "").split()
        assert " ".join(did.split()) == moment.action


def test_digits_are_words_only_where_they_are_asked_for() -> None:
    plain = starter_words(["a"], TOY, ("a",))
    with_digits = starter_words(["a"], TOY, ("a",), digits=True)
    assert with_digits[: len(plain)] == plain
    assert {"3", "12", "door", "shut"} <= set(with_digits) - set(plain)


def test_unknown_rewards_and_fields_are_named() -> None:
    form = format_of("toy", "compact")
    assert form.reward_word(0.5) == "0.5"
    with pytest.raises(GrammarError, match=r"0\.7 has no word"):
        form.reward_word(0.7)
    turns = TurnFormat(form.tokenizer, replace(TOY, forecast=(Slot("row", ("0",)),)), SpanSettings())
    with pytest.raises(GrammarError, match="'row', which is no field of the view"):
        WorldFormat(turns)
    loud = WorldFormat(TurnFormat(form.tokenizer, replace(TOY, message=(Slot("one", (SILENCE,)),)), SpanSettings()))
    with pytest.raises(GrammarError, match="stands for silence"):
        loud.automaton(OTHERS, ())
