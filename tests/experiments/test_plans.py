"""Plans beside what came, from an episode and hand-made candidates."""

from __future__ import annotations

from dataclasses import replace

from preconcert.core import Candidate, Episode, Move
from preconcert.envs import make_env
from preconcert.experiments.evaluation import heldout_specs, play
from preconcert.experiments.plans import Part, weighed
from preconcert.experiments.replay import replay_of
from preconcert.training.recipe import Recipe
from preconcert.training.rollout import ScriptedPolicy


def planned(swap_second: bool) -> Episode:
    """An episode whose first decision weighed two plans: the true course of events, and another first action."""
    recipe = Recipe(task="rendezvous")
    [episode] = play(heldout_specs(recipe, 1, 0), ScriptedPolicy("scripted"), recipe.channel, 0)
    mine, theirs = episode.trajectories["agent_0"], episode.trajectories["agent_1"]
    moves = [
        Move(a.action, a.message and a.message.payload, {"agent_1": b.action})
        for a, b in zip(mine.turns[:3], theirs.turns[:3], strict=True)
    ]
    if swap_second:
        moves[1] = replace(moves[1], action="north" if moves[1].action != "north" else "south")
    views = [turn.observation.text for turn in mine.turns[1:4]]
    wrong = views[0].replace(views[0].split()[1], "1", 1)
    best = Candidate(
        moves[0].action, moves[0].message, 0.5, 0.5, 0.0, 0.0, 3, True, tuple(views), tuple(moves), (0.0, 0.0, 1.0)
    )
    away = "north" if moves[0].action != "north" else "south"
    other = replace(
        best, action=away, chosen=False, score=0.1, path=(wrong,), moves=(Move(away, None, {}),), rewards=(0.0,)
    )
    turn = replace(mine.turns[0], candidates=(best, other))
    return replace(
        episode, trajectories={"agent_0": replace(mine, turns=(turn, *mine.turns[1:])), "agent_1": theirs}
    )


def test_a_plan_that_was_followed_stands_beside_what_came() -> None:
    episode = planned(swap_second=False)
    view = make_env("rendezvous", {}, 0).language.view
    best, other = weighed(episode, episode.trajectories["agent_0"].turns[0], view)
    assert best.chosen
    assert len(best.steps) == 3
    for step in best.steps:
        assert step.others[0].came == step.others[0].expected
        assert all(part.right for part in step.view)
    assert best.steps[2].reward == 1.0
    assert best.steps[2].paid == 0.0
    assert other.steps[0].others == ()
    assert all(part.right is None for part in other.steps[0].view), "nobody knows what would have come"
    shown = replay_of(episode).frames[0].views[0].weighed
    assert shown[0] == best


def test_beyond_another_action_nothing_is_compared() -> None:
    episode = planned(swap_second=True)
    best = weighed(episode, episode.trajectories["agent_0"].turns[0], None)[0]
    assert [step.view[0].came is None for step in best.steps] == [False, True, True]
    assert best.steps[1].paid is None
    assert best.steps[1].others[0].came is None
    assert best.steps[0].view[0] == Part("left", "left")


def test_what_was_not_planned_has_no_candidates() -> None:
    episode = planned(swap_second=False)
    assert weighed(episode, episode.trajectories["agent_0"].turns[1], None) == ()
