"""Planners on a task whose best plan is known, with its exact world model; scores by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from preconcert.agents.planners import (
    PLANNERS,
    Beam,
    BestOfK,
    HorizonSettings,
    HorizonTracker,
    Path,
    PlannerSettings,
    PlanningTeam,
    ScoreSettings,
    Tree,
    disagreement,
    lambda_return,
    view_error,
    worst_return,
)
from preconcert.core import ImaginedStep, Move, Observation, TaskLanguage, View, ViewField, derive_seed
from preconcert.training.rollout import ScriptedPolicy
from tests.agents.corridor import BEST, LANGUAGE, LENGTH, VIEW, Corridor, ExactModel, request_at, seen

PLAIN = ScoreSettings(gamma=1.0, prior_weight=0.0)
SEARCHES: dict[str, Any] = {
    "best-of-k": BestOfK(candidates=16, samples=32, horizon=3, score=PLAIN),
    "beam": Beam(candidates=16, samples=1, width=4, branch=8, horizon=3, score=PLAIN),
    "tree": Tree(
        candidates=16, branch=8, rounds=20, leaves=4, horizon=3, score=PLAIN, outcomes=2
    ),
}


def team(settings: PlannerSettings, model: ExactModel | None = None) -> PlanningTeam:
    return PlanningTeam(ScriptedPolicy("random"), model or ExactModel(), settings)


def play(planner: PlanningTeam, seed: int = 0) -> tuple[str, ...]:
    env = Corridor()
    env.reset()
    done = False
    while not done:
        request = replace(request_at(env.way, seed=seed), env=env)
        [turn] = planner.decide([request])
        done = env.step({"solo": turn.action}).done
    planner.finish("e")
    return env.way


def test_every_kind_is_tested() -> None:
    assert SEARCHES.keys() == PLANNERS.keys()
    for name, settings in SEARCHES.items():
        assert TypeAdapter(PlannerSettings).validate_python(settings.model_dump()) == settings
        assert isinstance(settings, PLANNERS[name])
    with pytest.raises(ValidationError):
        TypeAdapter(PlannerSettings).validate_python({"type": "best-of-k", "candidate": 3})


def test_lambda_return_by_hand() -> None:
    # 2 + 0.9 * 0.5 = 2.45; 0.9 * (0.25 + 1.225) = 1.3275; 1 + 0.9 * (0.25 + 0.66375) = 1.822375
    assert lambda_return([1, 0, 2], [0.5, 0.5, 0.5], 0.9, 0.5) == pytest.approx(1.822375)
    assert lambda_return([1, 0, 2], [0.5, 0.5, 0.5], 0.9, 0.0) == pytest.approx(1.45)
    assert lambda_return([1, 0, 2], [None, None, None], 0.9, 0.5) == pytest.approx(1 + 0.81 * 2)
    assert lambda_return([1, 0, 2], [None, None, None], 0.9, 0.5, end=1.0) == pytest.approx(1 + 0.81 * 2 + 0.729)
    assert lambda_return([1.0], [0.0], 0.9, 0.5) == 1.0


def test_the_worst_return() -> None:
    assert worst_return(TaskLanguage(("a",), rewards=("0", "1")), 4, 0.9) == 0.0
    assert worst_return(TaskLanguage(("a",), rewards=("-1", "1")), 3, 0.5) == -1.75
    assert worst_return(TaskLanguage(("a",), rewards=("2", "3")), 3, 0.5) == 2.0, "an episode may end at once"
    assert worst_return(TaskLanguage(("a",)), 3, 0.5) == 0.0


def step_of(text: str | None) -> ImaginedStep:
    view = None if text is None else Observation("x", text, ("a",), 0)
    return ImaginedStep(view, (), {}, 0.0, False, None, None, malformed=text is None)


def test_disagreement_is_a_share_of_fields() -> None:
    view = View((ViewField("row", ("0", "1", "2"), "row", number=True), ViewField("col", ("0", "1"), "col")))
    same, other, far = (step_of(text) for text in ("row 0 col 1", "row 2 col 1", "row 2 col 0"))
    assert disagreement([[same], [same]], view) == 0.0
    assert disagreement([[same], [other]], view) == 0.5
    assert disagreement([[same, same], [other, far]], view) == pytest.approx(0.75)
    assert disagreement([[same, same], [other]], view) == 0.5, "one sample alone disagrees with nobody"
    assert disagreement([[same], [step_of(None)]], view) == 1.0
    assert disagreement([[same]], view) == 0.0
    assert disagreement([[step_of("a b c d")], [step_of("a b c")]], None) == 0.25


def test_view_errors() -> None:
    view = View((ViewField("row", ("0", "1", "2"), "row", number=True), ViewField("col", ("0", "1"), "col")))
    real = Observation("x", "row 0 col 1", ("a",), 0)
    assert view_error(real, real, view) == 0.0
    assert view_error(Observation("x", "row 1 col 1", ("a",), 0), real, view) == 0.125
    assert view_error(Observation("x", "what", ("a",), 0), real, view) == 1.0
    assert view_error(None, real, view) == 1.0
    assert view_error(Observation("x", "row 0 is 1", ("a",), 0), real, None) == 0.25


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("name", SEARCHES)
def test_the_best_plan_is_found(name: str, values: bool) -> None:
    assert play(team(SEARCHES[name], ExactModel(values=values))) == BEST


@pytest.mark.parametrize("name", SEARCHES)
def test_one_step_ahead_takes_what_pays_at_once(name: str) -> None:
    settings = SEARCHES[name].model_copy(update={"horizon": 1})
    assert play(team(settings))[0] == "left"
    assert play(team(settings, ExactModel(values=True)))[0] == "right", "a quarter is more than 0.1"


@pytest.mark.parametrize("name", SEARCHES)
def test_a_malformed_imagination_is_worth_the_least(name: str) -> None:
    planner = team(SEARCHES[name], ExactModel(mine=("left",)))
    [turn] = planner.decide([request_at()])
    assert turn.action == "right"
    left = next(each for each in turn.candidates if each.action == "left")
    assert left.mean == 0.0
    assert left.path == ("malformed",)


@pytest.mark.parametrize("name", SEARCHES)
def test_what_the_policy_seldom_proposes_must_look_better(name: str) -> None:
    """At the horizon of one step `left` pays 0.1 for certain and `right` nothing."""
    plain = SEARCHES[name].model_copy(update={"horizon": 1})
    careful = plain.model_copy(update={"score": ScoreSettings(gamma=1.0, prior_weight=0.5)})
    turned = 0
    for seed in range(20):
        [turn] = team(careful).decide([request_at(seed=seed)])
        [other] = team(plain).decide([request_at(seed=seed)])
        drawn = {each.action: each.mean - each.score for each in turn.candidates}
        if len(drawn) < 2:
            continue
        shares = {action: math.exp(-less / 0.5) for action, less in drawn.items()}
        assert sum(shares.values()) == pytest.approx(1.0)
        assert all(share * 16 == pytest.approx(round(share * 16)) for share in shares.values())
        most = max(each.visits for each in turn.candidates)
        tried = [each.action for each in turn.candidates if name != "tree" or each.visits >= most / 2]
        best = max(tried, key=lambda action: (0.1 if action == "left" else 0.0) - drawn[action])
        assert turn.action == best
        assert other.action == "left"
        turned += turn.action != other.action
    assert turned > 0


@pytest.mark.parametrize("name", SEARCHES)
def test_spread_and_disagreement_count_against_a_candidate(name: str) -> None:
    """Within one step `left` pays 0.1 on average, 5.1 or -4.9 each time; `right` pays nothing for certain."""
    plain = SEARCHES[name].model_copy(update={"horizon": 1, "samples": 8, "outcomes": 8, "exploration": 5.0})
    careful = plain.model_copy(update={"score": ScoreSettings(gamma=1.0, spread_weight=1.0, prior_weight=0.0)})
    [turn] = team(careful, ExactModel(gamble=5.0)).decide([request_at(seed=3)])
    left = next(each for each in turn.candidates if each.action == "left")
    assert left.spread > 1
    assert left.score == pytest.approx(left.mean - left.spread)
    assert turn.action == "right"


@pytest.mark.parametrize("name", SEARCHES)
def test_what_the_model_is_not_sure_of_counts_against_a_candidate(name: str) -> None:
    """Within one step `left` pays 0.1 and may look like `right`, which pays nothing and always looks the same."""
    plain = SEARCHES[name].model_copy(update={"horizon": 1, "samples": 8, "outcomes": 8, "exploration": 5.0})
    careful = plain.model_copy(update={"score": ScoreSettings(gamma=1.0, disagreement_weight=1.0, prior_weight=0.0)})
    for settings, chosen in ((plain, "left"), (careful, "right")):
        [turn] = team(settings, ExactModel(doubtful=True)).decide([request_at(seed=3)])
        left = next(each for each in turn.candidates if each.action == "left")
        right = next(each for each in turn.candidates if each.action == "right")
        assert left.disagreement > 0.1
        assert right.disagreement == 0.0
        weight = settings.score.disagreement_weight
        assert left.score == pytest.approx(left.mean - weight * left.disagreement)
        assert turn.action == chosen


@pytest.mark.parametrize("name", SEARCHES)
def test_answers_do_not_depend_on_the_batch(name: str) -> None:
    model = ExactModel(values=True, gamble=0.2)
    requests = [request_at(seed=seed, episode=f"e{seed}") for seed in range(4)]
    together = team(SEARCHES[name], model).decide(requests)
    alone = [team(SEARCHES[name], model).decide([request])[0] for request in requests]
    assert together == alone
    assert together == team(SEARCHES[name], model).decide(requests), "the same seeds give the same turns"


def test_one_call_per_imagined_step() -> None:
    model = ExactModel()
    requests = [request_at(seed=seed, episode=f"e{seed}") for seed in range(4)]
    team(BestOfK(candidates=16, samples=3, horizon=3), model).decide(requests)
    assert model.calls == [4 * 2 * 3] * LENGTH, "four requests, two different turns, three samples"
    model.calls.clear()
    team(SEARCHES["beam"], model).decide(requests)
    assert len(model.calls) == LENGTH
    model.calls.clear()
    team(SEARCHES["tree"], model).decide(requests)
    assert len(model.calls) <= SEARCHES["tree"].rounds


def test_what_is_put_on_record() -> None:
    [turn] = team(SEARCHES["best-of-k"]).decide([request_at()])
    assert [each.chosen for each in turn.candidates] == [True, False]
    best, other = turn.candidates
    assert (best.action, other.action) == ("right", "left")
    assert best.score == best.mean == pytest.approx(0.25, abs=0.15)
    assert best.visits == 32 * LENGTH
    assert len(best.path) == len(best.moves) == len(best.rewards) == LENGTH
    assert best.moves[0] == Move("right", None, {})
    assert best.path[0] == seen(("right",)).text
    assert other.mean == pytest.approx(0.1)
    # by tree search, visits are those of the first move
    tree = SEARCHES["tree"]
    model = ExactModel()
    [turn] = team(tree.model_copy(update={"outcomes": 1}), model).decide([request_at()])
    assert sum(model.calls) == 2 + 4 + 8, "every way once, since nothing is left to chance"
    assert sum(each.visits for each in turn.candidates) > sum(model.calls)
    assert turn.candidates[0].visits == max(each.visits for each in turn.candidates)


@pytest.mark.parametrize("seed", range(4))
def test_candidates_are_the_different_turns_and_ties_go_to_the_commonest(seed: int) -> None:
    """After `left` nothing pays any more, so all that counts is how often the policy drew a turn."""
    planner = team(BestOfK(candidates=7, samples=1, horizon=1, score=PLAIN))
    first = ScriptedPolicy("random").decide([request_at()])[0]
    planner._pasts["e", "solo"] = [replace(first, action="left")]
    request = request_at(("left",), seed=seed)
    [turn] = planner.decide([request])
    seeds = [seed, *(derive_seed(seed, "candidate", draw) for draw in range(1, 7))]
    drawn = [turn.action for turn in ScriptedPolicy("random").decide([replace(request, seed=s) for s in seeds])]
    assert {each.action for each in turn.candidates} == set(drawn)
    assert len(turn.candidates) == len(set(drawn))
    assert all(each.score == 0.0 for each in turn.candidates)
    assert turn.action == max(set(drawn), key=drawn.count)


def test_outcomes_of_a_turn_are_limited() -> None:
    model = ExactModel(gamble=1.0)
    settings = Tree(candidates=8, branch=2, rounds=30, leaves=2, horizon=1, outcomes=3)
    team(settings, model).decide([request_at()])
    assert sum(model.calls) <= 2 * 3, "two turns with three outcomes each; all else revisits them"


def test_with_one_candidate_it_plays_as_the_policy_alone() -> None:
    requests = [request_at(seed=seed, episode=f"e{seed}") for seed in range(6)]
    planned = team(BestOfK(candidates=1, samples=1, horizon=1)).decide(requests)
    assert [replace(turn, candidates=()) for turn in planned] == ScriptedPolicy("random").decide(requests)


def test_a_critic_stands_in_for_missing_values() -> None:
    """It says that whoever has gone left is lost."""
    asked: list[str] = []

    def critic(requests: Any) -> list[float]:
        asked.extend(request.observation.text for request in requests)
        return [-1.0 if "left" in request.observation.text else 1.0 for request in requests]

    for name, settings in SEARCHES.items():
        short = settings.model_copy(update={"horizon": 1})
        planner = PlanningTeam(ScriptedPolicy("random"), ExactModel(), short, critic)
        assert planner.decide([request_at()])[0].action == "right", name
    assert set(asked) == {seen(("left",)).text, seen(("right",)).text}


def test_nothing_is_held_after_the_end() -> None:
    model = ExactModel()
    planner = team(BestOfK(adaptive=HorizonSettings()), model)
    planner.decide([request_at()])
    planner.fork("e", "copy")
    assert len(planner._pasts) == len(planner._trackers) == 2
    planner.finish("e")
    planner.finish("copy")
    assert not planner._pasts
    assert not planner._trackers
    assert model.finished == ["e", "copy"]


# ---- the horizon


def way(*actions: str, wrong_after: int = LENGTH) -> Path:
    """A way as it would be imagined from the start."""
    model = ExactModel(right_for=wrong_after)
    path = Path(request_at(), 0, ((), 0), None)
    for action in actions:
        [step] = model.advance([path.belief], [Move(action)], [0])
        path.moves.append(Move(action))
        path.steps.append(step)
        path.belief = step.belief
    return path


def test_errors_are_measured_as_far_ahead_as_actions_agree() -> None:
    tracker = HorizonTracker(HorizonSettings(threshold=0.1, rate=1.0, fade=0.0), 3, VIEW)
    assert tracker.horizon == 3, "nothing speaks against it"
    tracker.act("right", [way("right", "left", "right", wrong_after=1)])
    tracker.see(seen(("right",)))
    assert tracker.errors == {1: 0.0}
    tracker.act("left", [])
    tracker.see(seen(("right", "left")))
    assert tracker.errors == {1: 0.0, 2: pytest.approx(1 / 3)}
    assert tracker.horizon == 1
    tracker.act("left", [])
    tracker.see(seen(("right", "left", "left")))
    assert 3 not in tracker.errors, "another action was taken than imagined"


@pytest.mark.parametrize("name", SEARCHES)
def test_agents_that_look_ahead_differently_far(name: str) -> None:
    """Side by side with one whose model has failed it, an agent plans as it does alone."""
    settings = SEARCHES[name].model_copy(update={"adaptive": HorizonSettings(threshold=0.1)})
    failed, fine = request_at(episode="failed"), request_at(episode="fine")
    turns = []
    for requests in ([failed, fine], [fine], [failed]):
        planner = team(settings)
        tracker = HorizonTracker(HorizonSettings(threshold=0.1), 3, VIEW)
        tracker.errors = {1: 0.9}
        planner._trackers["failed", "solo"] = tracker
        turns += planner.decide(requests)
    assert turns[:2] == [turns[3], turns[2]]
    assert {len(each.path) for each in turns[0].candidates} == {1}
    assert max(len(each.path) for each in turns[1].candidates) == 3


def test_errors_fade_so_that_long_horizons_are_tried_again() -> None:
    tracker = HorizonTracker(HorizonSettings(threshold=0.1, rate=1.0, fade=0.5), 2, VIEW)
    tracker.errors = {1: 0.0, 2: 0.3}
    assert tracker.horizon == 1
    tracker.see(seen(()))
    tracker.see(seen(()))
    assert tracker.errors[2] == 0.15, "the same view again, when a decision is made once more"
    tracker.see(seen(("left",)))
    assert tracker.horizon == 2


@pytest.mark.parametrize(
    ("name", "right_for", "expected"), [("best-of-k", 1, 1), ("best-of-k", LENGTH, LENGTH), ("tree", LENGTH, LENGTH)]
)
def test_the_horizon_follows_the_model(name: str, right_for: int, expected: int) -> None:
    """Steps that a model gets wrong are imagined no more, once that was seen."""
    settings = SEARCHES[name].model_copy(update={"adaptive": HorizonSettings(threshold=0.1, fade=0.0)})
    model = ExactModel(right_for=right_for)
    planner = team(settings, model)
    env = Corridor()
    for _ in range(LENGTH):
        [turn] = planner.decide([replace(request_at(env.way), env=env)])
        env.step({"solo": turn.action})
    tracker = planner._trackers["e", "solo"]
    assert tracker.errors[1] == 0.0
    assert (tracker.errors[2] > 0.1) == (right_for == 1)
    assert tracker.horizon == expected
    assert LANGUAGE.view is VIEW
