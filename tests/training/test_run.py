"""A run from nothing: frozen adapters, the gate, and what is refused before any work is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from preconcert.config import override_play
from preconcert.core import ConfigError, GateError, UnknownNameError, load_episodes
from preconcert.training.recipe import GateSettings, Recipe
from preconcert.training.run import train
from tests.training.teams import recipe_of


def small(**changes: object) -> Recipe:
    """Two iterations; what an untrained team learns from is its own hindsight."""
    plain = recipe_of(iterations=2, seeds=2, group=2, hindsight_weight=0.5, hindsight_fraction=1.0)
    return plain.model_copy(update=changes)


def test_a_frozen_adapter_comes_out_as_it_went_in(tmp_path: Path) -> None:
    out = train(small(frozen=("agent_0",)), tmp_path / "run")
    for name, frozen in (("agent_0", True), ("agent_1", False)):
        before = load_file(out / "warm" / name / "adapter_model.safetensors")
        after = load_file(out / "adapters" / name / "adapter_model.safetensors")
        assert all((before[key] == after[key]).all() for key in before) == frozen
    episodes = load_episodes(out / "episodes.jsonl").episodes
    assert {t.policy_version for e in episodes if e.iteration == 1 for t in e.trajectories.values()} == {1}
    assert all(turn.completion_ids for e in episodes for t in e.trajectories.values() for turn in t.turns)


def test_a_closed_gate_stops_the_run_and_says_so_again(tmp_path: Path) -> None:
    recipe = small(gate=GateSettings(min_gap=1.0, episodes=4))
    for resume in (False, True):
        with pytest.raises(GateError, match=r"gate\.min_gap=1\.0"):
            train(recipe, tmp_path / "run", resume=resume)
    assert json.loads((tmp_path / "run" / "gate.json").read_text())["passed"] is False
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "episodes.jsonl").exists()


def test_a_log_that_nobody_can_write_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="report_to=wandb: the package 'wandb' is not installed; pip install wandb"):
        train(small(grpo=small().grpo.model_copy(update={"report_to": "wandb"})), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wrong_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="agent_7"):
        train(small(frozen=("agent_7",)), tmp_path / "a")
    with pytest.raises(UnknownNameError, match="agent_3"):
        train(small(adapters={"agent_3": "x"}), tmp_path / "b")
    with pytest.raises(ConfigError, match="every adapter is frozen"):
        train(small(frozen=("agent_0", "agent_1")), tmp_path / "c")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"world_model": {}, "channel": {"truncate": 1}}, "channel with truncate cuts them"),
        ({"world_model": {}, "channels": {"tight": {"cap_bits": 3}}}, "channel with cap_bits cuts them"),
        ({"agent": {"memory": 2}, "grpo": {"imagination": {"model": "oracle"}}}, r"agent\.memory=0"),
        ({"agent": {"memory": 2}, "grpo": {"message_credit": {"model": "oracle"}}}, r"agent\.memory=0"),
    ],
)
def test_what_cannot_be_imagined_is_refused_at_once(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        train(Recipe.model_validate({"task": "rendezvous", **changes}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_world_model_plays_over_any_channel() -> None:
    """Only its training needs whole messages: answers are written there, prompts read short ones."""
    trained = Recipe.model_validate({"task": "rendezvous", "world_model": {}})
    assert override_play(trained, ["channel.truncate=1"]).channel.truncate == 1
