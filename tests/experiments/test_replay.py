"""Replays, curves and evaluation's parts, without a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from preconcert.agents import ChannelMode, ChannelSettings
from preconcert.core import Forecast, Intention
from preconcert.envs import make_env, tasks
from preconcert.experiments.curve import curve_of, read_curve, ticks
from preconcert.experiments.evaluation import (
    differences,
    heldout_specs,
    no_message_ceiling,
    override_arms,
    play,
    standard_arms,
)
from preconcert.experiments.provenance import machine, versions
from preconcert.experiments.replay import page, replay_of
from preconcert.training.recipe import Recipe
from preconcert.training.rollout import ScriptedPolicy


@pytest.mark.parametrize("task", tasks())
def test_a_replay_shows_the_episode(task: str) -> None:
    recipe = Recipe(task=task)
    [episode] = play(heldout_specs(recipe, 1, 0), ScriptedPolicy("scripted"), recipe.channel, 0)
    replay = replay_of(episode)
    assert [frame.state for frame in replay.frames] == list(episode.states)
    assert all(frame.board for frame in replay.frames)
    assert replay.frames[-1].views == ()
    for step, frame in enumerate(replay.frames[:-1]):
        assert [view.does for view in frame.views] == [t.turns[step].action for t in episode.trajectories.values()]


def test_predictions_stand_beside_what_came() -> None:
    recipe = Recipe(task="rendezvous")
    [episode] = play(heldout_specs(recipe, 1, 0), ScriptedPolicy("scripted"), recipe.channel, 0)
    mine, theirs = episode.trajectories["agent_0"], episode.trajectories["agent_1"]
    after = mine.turns[1].observation.fields
    turn = replace(
        mine.turns[0],
        intentions=(Intention("agent_1", (theirs.turns[0].action, "over"), 0.5),),
        forecast=Forecast({"row": after["row"], "col": "9"}, "0", True),
    )
    last = replace(mine.turns[-1], intentions=(Intention("agent_1", (theirs.turns[-1].action, "over"), 0.5),))
    changed = replace(mine, turns=(turn, *mine.turns[1:-1], last))
    replay = replay_of(replace(episode, trajectories={"agent_0": changed, "agent_1": theirs}))
    view = replay.frames[0].views[0]
    assert not view.intends[0].right
    assert view.intends[0].real == (theirs.turns[0].action, theirs.turns[1].action)
    assert not view.intends[0].known
    assert [(each.slot, each.right) for each in view.foresees] == [
        ("row", True), ("col", False), ("reward", True), ("done", False)
    ]  # fmt: skip
    assert view.foresees[1].came == after["col"]
    assert replay.frames[-2].views[0].intends[0].right


def test_a_page_keeps_what_agents_write_as_text() -> None:
    recipe = Recipe(task="signal")
    [episode] = play(heldout_specs(recipe, 1, 0), ScriptedPolicy("scripted"), recipe.channel, 0)
    replay = replace(replay_of(episode), legend="</script><b>&")
    html = page("<i>", [("a", "<u>")], [], "note", None, [replay])
    assert "</script><b>" not in html
    assert "<i>" not in html
    assert "<u>" not in html


def test_curve(tmp_path: Path) -> None:
    assert read_curve(tmp_path / "log.jsonl", None) is None
    (tmp_path / "log.jsonl").write_text('{"iteration": 0, "success": 0.5}\n{"iteration": 1, "success": 1.0}\n{"iter')
    curve = read_curve(tmp_path / "log.jsonl", 0.25)
    assert curve is not None
    assert curve.lines[0].points == ((1, 0.5), (2, 1.0))
    assert 'class="ceiling"' in curve.svg()
    alone = curve_of([{"iteration": 0, "return": 1.0, "intention_accuracy": 0.5}], None)
    assert alone is not None
    assert [line.key for line in alone.lines] == ["intention_accuracy"]
    assert 'class="ceiling"' not in alone.svg()


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (5, [1, 2, 3, 4, 5]), (40, [1, 10, 20, 30, 40])])
def test_ticks(most: int, expected: list[int]) -> None:
    assert ticks(most) == expected


def test_heldout_seeds_are_everybodys() -> None:
    recipe = Recipe(task="rendezvous")
    seeds = [spec.seed for spec in heldout_specs(recipe, 20, 3)]
    assert len(set(seeds)) == 20
    assert [spec.seed for spec in heldout_specs(recipe, 5, 3)] == seeds[:5]
    assert {spec.split for spec in heldout_specs(recipe, 5, 3)} == {"heldout"}
    assert [spec.seed for spec in heldout_specs(recipe, 5, 4)] != seeds[:5]


def test_arms() -> None:
    recipe = Recipe(task="rendezvous")
    env = make_env("rendezvous", {}, 0)
    assert [arm.name for arm in standard_arms(recipe, env)][-1] == "trained-shuffled"
    silent = recipe.model_copy(update={"channel": ChannelSettings(mode=ChannelMode.OFF)})
    assert "trained-shuffled" not in [arm.name for arm in standard_arms(silent, env)]
    assert override_arms(recipe.channel, recipe.channel) == []
    lossy = ChannelSettings(mode=ChannelMode.OFF, drop=0.25)
    assert [arm.name for arm in override_arms(recipe.channel, lossy)] == [
        "trained-off-drop0.25", "trained-off-drop0.25-greedy"
    ]  # fmt: skip


def test_what_differs_is_named() -> None:
    held = Recipe(task="rendezvous", params={"size": 5})
    changed = Recipe(task="rendezvous", params={"size": 6, "agents": 3}, channel=ChannelSettings(drop=0.5))
    assert differences(held, changed) == {"params.size": 6, "params.agents": 3, "channel.drop": 0.5}
    assert differences(held, held) == {}


def test_ceilings() -> None:
    assert no_message_ceiling(Recipe(task="rendezvous", params={"landmarks": 4})) == 0.25
    assert no_message_ceiling(Recipe(task="box-push")) is None


def test_provenance() -> None:
    assert versions(("no-such-package",))["no-such-package"] is None
    assert set(machine()) == {"platform", "cores", "memory_gib", "gpu"}
