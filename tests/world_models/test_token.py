"""The token world model says what its language model says: no batch matters, no seed is shared, nothing is made up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from preconcert.agents import ChannelSettings
from preconcert.core import Judgement, Message, Move, Outcome, TurnRequest, UnknownNameError, WorldModel
from preconcert.envs import make_env
from preconcert.models import LoraSettings, ScoreRequest, TransformersModel, build_starter
from preconcert.prompts import SpanSettings, TurnFormat, WorldAnswer, WorldFormat, starter_words
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy, rollout
from preconcert.training.world_rows import Step, world_row, world_steps
from preconcert.world_models import LegalActions, TokenBelief, TokenWorldModel, TokenWorldSettings
from tests.training.teams import LORA, PARAMS, SHAPE, TASK, chat_checkpoint, load

PARAMS_3 = {**PARAMS, "agents": 3}
Make = Callable[..., TokenWorldModel]


@pytest.fixture(scope="module", params=["starter", "qwen3"])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Token world models of a three-agent rendezvous on one random model, by their settings."""
    env = make_env(TASK, PARAMS_3, 0)
    folder = tmp_path_factory.mktemp("token") / request.param
    if request.param == "starter":
        words = starter_words(env.words, env.language, env.agents, digits=True)  # type: ignore[attr-defined]
        build_starter(words, folder, seed=3, settings=SHAPE)
    else:
        chat_checkpoint(folder, "qwen3")
    model = load(folder, ("world",))

    def world(view: bool = True, recall: int = 0, **settings: object) -> TokenWorldModel:
        language = env.language if view else replace(env.language, view=None)
        turns = TurnFormat(model.tokenizer, language, SpanSettings(), 1)
        form = WorldFormat(turns, (0.0, 1.0), own_words=True, recall=recall)
        return TokenWorldModel(model, form, "world", settings=TokenWorldSettings(**settings))  # type: ignore[arg-type]

    return world


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    specs = [EpisodeSpec(TASK, PARAMS_3, seed) for seed in range(3)]
    episodes = rollout(specs, ScriptedPolicy("scripted"), ChannelSettings(), 0)
    return [step for episode in episodes for chain in world_steps(episode, 1) for step in chain]


def blind(step: Step) -> Move:
    return replace(step.move, others=None)


def test_answers_do_not_depend_on_the_batch(make: Make, steps: list[Step]) -> None:
    world = make()
    assert isinstance(world, WorldModel)
    beliefs = [step.belief for step in steps[:8]]
    moves = [step.move if place % 2 else blind(step) for place, step in enumerate(steps[:8])]
    seeds = list(range(100, 108))
    together = world.advance(beliefs, moves, seeds)
    backwards = world.advance(beliefs[::-1], moves[::-1], seeds[::-1])[::-1]
    for place, one in enumerate(together):
        (alone,) = world.advance(beliefs[place : place + 1], moves[place : place + 1], seeds[place : place + 1])
        for other in (alone, backwards[place]):
            assert replace(one, value=None) == replace(other, value=None)
            assert one.value == pytest.approx(other.value, abs=1e-4)


def test_what_is_imagined_is_like_what_is_real(make: Make, steps: list[Step]) -> None:
    world = make()
    language = world.format.language
    assert language.view is not None
    starts = steps[:12] * 4
    imagined = world.advance([s.belief for s in starts], [blind(s) for s in starts], list(range(len(starts))))
    for start, step in zip(starts, imagined, strict=True):
        assert not step.malformed
        assert step.observation is not None
        assert language.view.render(language.view.parse(step.observation.text)) == step.observation.text
        assert step.observation.step == start.belief.observation.step + 1
        assert set(step.observation.fields) == {slot.name for slot in language.forecast}
        assert step.observation.legal_actions == language.actions
        assert step.observation.sees == ()
        assert set(step.others) == set(start.belief.others)
        assert step.belief.memory == (start.move.action,)
        assert step.belief.inbox == step.inbox
        assert step.belief.observation == step.observation
        assert step.value is not None
        assert 0 <= step.value <= 1
        if step.done:
            assert step.value == 0
            assert step.inbox == start.belief.inbox
    assert any(step.done for step in imagined)
    assert any(not step.done for step in imagined)
    assert len({step.observation.text for step in imagined if step.observation}) > 12, "seeds matter"


def test_given_actions_are_taken_as_they_are(make: Make, steps: list[Step]) -> None:
    world = make()
    part = Move("stay", None, {"agent_2": "up" if "up" in steps[0].move.action else "stay"})
    for move in (steps[0].move, part):
        (step,) = world.advance([steps[0].belief], [move], [1])
        for other, action in (move.others or {}).items():
            assert step.others[other] == action
        assert set(step.others) == set(steps[0].belief.others)


def test_partners_are_the_own_team_unless_it_is_said(make: Make, steps: list[Step]) -> None:
    """What a request says of them stays through an imagination."""
    world = make()
    step = steps[0]
    asked = TurnRequest(
        "e", step.belief.agent, step.belief.observation, step.belief.inbox, step.belief.others, world.format.language,
        0, None,  # type: ignore[arg-type]
    )  # fmt: skip
    own, others = world.begin([asked, replace(asked, partners="random")], [(), ()])
    assert (own.partners, others.partners) == ("learner", "random")
    (after,) = world.advance([others], [step.move], [1])
    assert after.belief.partners == "random"


def test_imagined_views_allow_what_real_ones_did(make: Make, steps: list[Step]) -> None:
    world = make()
    first, *others = world.format.language.actions
    world.legal = LegalActions(world.format.language.actions, {steps[0].belief.agent: ((first,), tuple(others))}, {})
    beliefs = [replace(step.belief, observation=replace(step.belief.observation, step=0)) for step in steps[:8]]
    imagined = world.advance(beliefs, [blind(s) for s in steps[:8]], list(range(8)))
    for belief, step in zip(beliefs, imagined, strict=True):
        assert step.observation is not None
        known = belief.agent == steps[0].belief.agent
        assert step.observation.legal_actions == (tuple(others) if known else world.format.language.actions)
    assert {belief.agent for belief in beliefs} > {steps[0].belief.agent}


def test_own_words_stay_until_others_are_said(make: Make, steps: list[Step]) -> None:
    """From the past into the belief, through imagined steps, and in rows as in beliefs."""
    world = make()
    spec = EpisodeSpec(TASK, PARAMS_3, 0)
    (episode,) = rollout([spec], ScriptedPolicy("scripted"), ChannelSettings(), 0)
    for agent, chain in zip(episode.trajectories, world_steps(episode, 1), strict=True):
        turns = episode.trajectories[agent].turns
        others = tuple(other for other in episode.trajectories if other != agent)
        asked = [
            TurnRequest(
                "e", agent, turn.observation, turn.inbox, others, world.format.language, 0, None,  # type: ignore[arg-type]
            )
            for turn in turns
        ]  # fmt: skip
        begun = world.begin(asked, [turns[:index] for index in range(len(turns))])
        assert begun == [step.belief for step in chain]
        assert begun[0].said is None
        for belief, before in zip(begun[1:], turns, strict=False):
            assert before.message is not None
            assert belief.said == before.message.payload
        silent = [replace(turn, message=None) for turn in turns[1:2]]
        assert world.begin(asked[2:3], [(turns[0], *silent)])[0].said == begun[1].said
    (said,) = world.advance([steps[0].belief], [Move("stay", "b stay")], [1])
    (kept,) = world.advance([said.belief], [Move("stay")], [1])
    assert (said.belief.said, kept.belief.said) == ("b stay", "b stay")


def test_earlier_moments_are_those_of_the_past_and_then_the_imagined_ones(make: Make) -> None:
    """In rows as in beliefs, and shown: what is imagined depends on them."""
    world = make(recall=2)
    (episode,) = rollout([EpisodeSpec(TASK, PARAMS_3, 0)], ScriptedPolicy("scripted"), ChannelSettings(), 0)
    agent, chain = next(iter(zip(episode.trajectories, world_steps(episode, 1, recall=2), strict=True)))
    turns = episode.trajectories[agent].turns
    others = tuple(other for other in episode.trajectories if other != agent)
    asked = [
        TurnRequest(
            "e", agent, turn.observation, turn.inbox, others, world.format.language, 0, None,  # type: ignore[arg-type]
        )
        for turn in turns
    ]  # fmt: skip
    begun = world.begin(asked, [turns[:index] for index in range(len(turns))])
    assert begun == [step.belief for step in chain]
    assert [len(belief.earlier) for belief in begun[:3]] == [0, 1, 2]
    assert [len(step.belief.earlier) for step in world_steps(episode, 1, recall=1)[0][:3]] == [0, 1, 1]
    for index, belief in enumerate(begun):
        for moment, turn in zip(belief.earlier, turns[max(0, index - 2) : index], strict=True):
            assert moment.view == turn.observation.text
            assert dict(moment.heard) == {message.sender: message.payload for message in turn.inbox}
            assert turn.message is not None
            assert (moment.said, moment.action) == (turn.message.payload, turn.action)
    belief = begun[2]
    for _ in range(3):
        (step,) = world.advance([belief], [Move("stay", "b stay")], [1])
        assert step.observation is not None
        now = (belief.observation.text, "b stay", "stay")
        after = step.belief
        assert isinstance(after, TokenBelief)
        assert after.earlier[:-1] == belief.earlier[-1:]
        assert (after.earlier[-1].view, after.earlier[-1].said, after.earlier[-1].action) == now
        assert dict(after.earlier[-1].heard) == {message.sender: message.payload for message in belief.inbox}
        belief = after
    forgetful = replace(begun[2], earlier=())
    said = [judgement.view_nll for judgement in judge_both(world, [begun[2], forgetful], chain[2])]
    assert said[0] != pytest.approx(said[1], abs=1e-4)
    assert world_row(world.format, chain[2], True).ids[:3] == world_row(make().format, chain[2], True).ids[:3]
    assert len(world_row(world.format, chain[2], True).ids) > len(world_row(make().format, chain[2], True).ids)


def judge_both(world: TokenWorldModel, beliefs: list[TokenBelief], step: Step) -> list[Judgement]:
    outcome = Outcome(world.observe(step.belief, step.view), dict(step.move.others or {}), step.reward, step.done)
    found = world.judge(beliefs, [step.move] * len(beliefs), [outcome] * len(beliefs))
    return [judgement for judgement in found if judgement is not None]


def test_the_last_message_of_every_sender_stays(make: Make, steps: list[Step]) -> None:
    world = make()
    me = steps[0].belief.agent
    one, two = steps[0].belief.others
    held = (Message(one, (me,), "a stay", 1.0, 2, 0), Message(two, (me,), "b stay", 1.0, 2, 0))
    belief = replace(steps[0].belief, inbox=held)
    nothing = world._inbox(belief, WorldAnswer("", None, False))
    assert nothing == held
    news = world._inbox(belief, WorldAnswer("", None, False, {}, {one: "b stay", two: "b stay"}))
    assert [(message.sender, message.payload) for message in news] == [(two, "b stay"), (one, "b stay")]


def test_the_value_is_the_expectation_of_its_digit(make: Make, steps: list[Step]) -> None:
    world = make()
    form = world.format
    starts = steps[:10]
    requests = [world._request(s.belief, s.move, seed) for seed, s in enumerate(starts)]
    completions = world.model.generate(requests)
    imagined = world.advance([s.belief for s in starts], [s.move for s in starts], list(range(len(starts))))
    checked = 0
    for start, request, completion, step in zip(starts, requests, completions, imagined, strict=True):
        if step.done:
            continue
        state, digits = form.value_state(start.belief.others, ()) or (0, {})
        assert request.automaton is not None
        place = request.automaton.walk(completion.ids)[:-1].index(state)
        scores = world.model.score(
            [
                ScoreRequest(request.prompt_ids, (*completion.ids[:place], token), "world", request.automaton)
                for token in digits
            ]
        )
        wanted = sum(
            math.exp(score[-1]) * form.value_of(digit) for score, digit in zip(scores, digits.values(), strict=True)
        )
        assert step.value == pytest.approx(wanted, abs=1e-4)
        checked += 1
    assert checked


def test_judgements_are_probabilities_of_what_would_be_written(make: Make, steps: list[Step]) -> None:
    world = make()
    chosen = [steps[0], steps[1], steps[2], steps[5]]
    outcomes = [
        Outcome(world.observe(s.belief, s.view), dict(s.move.others or {}), s.reward, s.done) for s in chosen
    ]
    judged = world.judge([s.belief for s in chosen], [blind(s) for s in chosen], outcomes)
    for step, judgement in zip(chosen, judged, strict=True):
        assert judgement is not None
        others = step.belief.others
        for other in others:
            assert sum(judgement.others[other].values()) == pytest.approx(1.0, abs=1e-5)
            assert tuple(judgement.others[other]) == world.format.language.actions
        answer = WorldAnswer(step.view, world.format.reward_word(step.reward), step.done, heard={})
        if not step.done:
            answer = replace(answer, heard=dict(step.heard), value=0)
        written = world.format.write(answer, others, ())
        prompt = world.format.prompt_ids(
            step.belief.agent,
            step.belief.observation,
            step.belief.inbox,
            others,
            step.belief.memory,
            step.move,
            said=step.belief.said,
        )
        automaton = world.format.automaton(others, ())
        (logprobs,) = world.model.score([ScoreRequest(prompt, written.ids, "world", automaton)])
        by_part = {
            part: sum(sum(logprobs[s.start : s.end]) for s in written.spans if s.part == part)
            for part in ("view", "reward", "done")
        }
        assert judgement.view_nll == pytest.approx(-by_part["view"], abs=1e-3)
        assert judgement.reward_probability == pytest.approx(math.exp(by_part["reward"]), abs=1e-5)
        over = math.exp(by_part["done"])
        assert judgement.done_probability == pytest.approx(over if step.done else 1 - over, abs=1e-4)
    again = world.judge([chosen[0].belief], [blind(chosen[0])], outcomes[:1])
    assert again[0] is not None
    assert judged[0] is not None
    assert again[0].view_nll == pytest.approx(judged[0].view_nll, abs=1e-4)


def test_without_a_grammar_a_random_model_writes_no_answer(make: Make, steps: list[Step]) -> None:
    world = make(constrained=False, max_tokens=24)
    imagined = world.advance([s.belief for s in steps[:6]], [s.move for s in steps[:6]], list(range(6)))
    for start, step in zip(steps[:6], imagined, strict=True):
        assert step.malformed
        assert step.observation is None
        assert step.value is None
        assert step.belief == start.belief


def test_a_task_without_a_view_is_written_in_plain_words(make: Make, steps: list[Step]) -> None:
    world = make(view=False, max_tokens=24)
    assert world.format.automaton(steps[0].belief.others, ()) is None
    (step,) = world.advance([steps[0].belief], [steps[0].move], [1])
    assert step.malformed, "a random model does not end its words"
    outcome = Outcome(world.observe(steps[0].belief, "left 2 row 1"), dict(steps[0].move.others or {}), 0.0, False)
    (judgement,) = world.judge([steps[0].belief], [blind(steps[0])], [outcome])
    assert judgement is not None
    assert judgement.view_nll > 0
    answer = WorldAnswer("left 2 row 1", "0", True)
    written = world.format.write(answer, steps[0].belief.others, ())
    assert world.format.parse(written.ids, steps[0].belief.others, ())[0] == answer


def test_unknown_adapters_are_named(tmp_path: Path) -> None:
    env = make_env(TASK, PARAMS, 0)
    words = starter_words(env.words, env.language, env.agents, digits=True)  # type: ignore[attr-defined]
    model = TransformersModel.load(build_starter(words, tmp_path / "m", 1, SHAPE), LoraSettings(r=LORA.r))
    form = WorldFormat(TurnFormat(model.tokenizer, env.language, SpanSettings()))
    with pytest.raises(UnknownNameError, match="'world'"):
        TokenWorldModel(model, form, "world")
    world = TokenWorldModel(model, form, None)
    seen = env.reset()["agent_0"]
    belief = TokenBelief("agent_0", ("agent_1",), seen, (), ())
    assert len(world.advance([belief], [Move("stay")], [0])) == 1
