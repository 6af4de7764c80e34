"""Rollouts on an engine of their own: who plays with which adapters, and what the recipe refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from preconcert.agents import ChannelHarm
from preconcert.core import ConfigError, dump_episode, load_episodes
from preconcert.models import LoraSettings, TransformersModel
from preconcert.training import sampler
from preconcert.training.recipe import Recipe
from preconcert.training.rows import GrammarTable
from preconcert.training.run import train
from preconcert.training.run_folder import load_recipe_of, prepare_folder
from preconcert.training.sampler import Publisher, RolloutSettings, check_engine
from preconcert.training.source import GameSource
from tests.training.teams import AGENTS, LORA, load, recipe_of, team_on


class Copy(TransformersModel):
    """A model of its own that takes adapters as an engine does, and remembers which."""

    closed = False

    @classmethod
    def of(cls, folder: Path, lora: LoraSettings = LORA) -> Copy:
        """An engine on a checkpoint."""
        model = cls.load(folder, lora)
        assert isinstance(model, Copy)
        model.published = []
        return model

    published: list[tuple[str, int]]

    def publish(self, name: str, path: Path, version: int) -> None:
        self.published.append((name, version))
        self.load_adapter(name, path)

    def close(self) -> None:
        self.closed = True


def step(model: TransformersModel) -> None:
    """As if an optimiser had moved every adapter."""
    with torch.no_grad():
        for name in AGENTS:
            for value in model.adapter_parameters(name).values():
                value.add_(0.01)


@pytest.mark.parametrize(
    ("staleness", "versions"), [(0, [0, 1, 2, 3, 4, 5]), (1, [0, 0, 1, 2, 3, 4]), (3, [0, 0, 0, 0, 3, 3])]
)
def test_rollouts_lag_no_further_than_asked(
    checkpoint: Callable[[str], Path], tmp_path: Path, staleness: int, versions: list[int]
) -> None:
    trained, engine = load(checkpoint("starter")), Copy.of(checkpoint("starter"))
    for name in AGENTS:
        engine.add_adapter(name, 0)
    publisher = Publisher(trained, engine, AGENTS, tmp_path, staleness)
    recipe = recipe_of(seeds=2, group=2, iterations=6)
    source = GameSource(recipe, team_on(engine), GrammarTable(), frozenset(AGENTS), None, publisher=publisher)
    found = []
    for iteration in range(6):
        rollout = source.collect(iteration)
        played = {t.policy_version for e in rollout.episodes for t in e.trajectories.values()}
        assert played == {versions[iteration]}
        assert rollout.metrics["sampler_staleness"] == iteration - versions[iteration] <= staleness
        found.append({(one.iteration, one.seed) for one in rollout.episodes})
        step(trained)
    source.close()
    assert [{iteration for iteration, _ in each} for each in found] == [{i} for i in range(6)]
    assert engine.published == [(name, version) for version in sorted(set(versions)) for name in AGENTS]


def test_the_engine_plays_with_what_the_trainer_has(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    trained, engine = load(checkpoint("starter")), Copy.of(checkpoint("starter"))
    for name in AGENTS:
        engine.add_adapter(name, 0)
    publisher = Publisher(trained, engine, AGENTS, tmp_path)
    for iteration in range(2):
        assert publisher.publish_for(iteration, iteration)
        for name in AGENTS:
            mine, theirs = trained.adapter_parameters(name), engine.adapter_parameters(name)
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert not publisher.publish_for(iteration, iteration)
        step(trained)


def test_a_run_on_an_engine_of_its_own_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Copy] = []

    def start(base: Path, lora: LoraSettings, dtype: str, settings: RolloutSettings, writer: None) -> Copy:
        engines.append(Copy.of(base, lora))
        return engines[-1]

    monkeypatch.setattr(sampler, "start_vllm", start)
    plain = recipe_of(iterations=3, seeds=2, group=2, hindsight_weight=0.5, hindsight_fraction=1.0)
    other = plain.model_copy(update={"rollout": RolloutSettings(engine=sampler.Engine.VLLM)})
    here, there = train(plain, tmp_path / "here"), train(other, tmp_path / "there")
    (engine,) = engines
    assert engine.closed
    assert not (there / "published").exists()
    episodes = [load_episodes(run / "episodes.jsonl").episodes for run in (here, there)]
    assert [dump_episode(e) for e in episodes[0]] == [dump_episode(e) for e in episodes[1]]
    for name in AGENTS:
        one, two = (load_file(run / "adapters" / name / "adapter_model.safetensors") for run in (here, there))
        assert all(torch.equal(one[key], two[key]) for key in one)
    lines = [json.loads(line) for line in (there / "log.jsonl").read_text().splitlines()]
    assert [line["sampler_staleness"] for line in lines] == [0.0] * 3
    assert max(line["sampler_mismatch"] for line in lines) < 1e-4


def test_a_run_that_plays_ahead_weighs_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "start_vllm", lambda base, lora, *others: Copy.of(base, lora))
    content = recipe_of(
        iterations=4, seeds=2, group=2, lr=0.05, hindsight_weight=0.5, hindsight_fraction=1.0
    ).model_dump(mode="json")
    del content["update"]
    recipe = Recipe.model_validate({**content, "rollout": {"engine": "vllm", "staleness": 1}})
    assert recipe.update.correction == 2.0
    out = train(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["sampler_staleness"] for line in lines] == [0.0, 1.0, 1.0, 1.0]
    assert lines[0]["sampler_mismatch"] < 1e-4 < lines[-1]["sampler_mismatch"]
    assert all("sampler_weight" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"staleness": 1}}, r"rollout\.staleness=1 needs rollout\.engine=vllm"),
        ({"rollout": {"engine": "vllm", "staleness": 1}, "agent": {"codec": "latent"}}, "would be training"),
        ({"rollout": {"engine": "vllm", "staleness": 2}, "world_model": {}}, r"rollout\.staleness=2 does not go"),
        ({"rollout": {"engine": "vllm"}, "league": {}}, "a league do not go together"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({"task": "rendezvous", **changes})


def test_a_correction_that_is_given_stays() -> None:
    recipe = Recipe.model_validate(
        {"task": "rendezvous", "rollout": {"engine": "vllm"}, "update": {"correction": None}}
    )
    assert recipe.update.correction is None
    assert Recipe(task="rendezvous").update.correction is None


def test_a_run_goes_on_with_another_server(tmp_path: Path) -> None:
    recipe = recipe_of(iterations=2)
    prepare_folder(recipe, tmp_path / "run", resume=False)
    moved = recipe.model_copy(update={"rollout": RolloutSettings(url="http://127.0.0.1:8001")})
    prepare_folder(moved, tmp_path / "run", resume=True)
    assert load_recipe_of(tmp_path / "run") == moved


def test_a_run_goes_on_with_another_engine_and_its_correction(tmp_path: Path) -> None:
    content = recipe_of(iterations=2).model_dump()
    run = tmp_path / "run"
    prepare_folder(Recipe.model_validate(content), run, resume=False)
    del content["update"]["correction"]
    moved = Recipe.model_validate({**content, "rollout": {"engine": "vllm"}})
    assert moved.update.correction == 2.0
    prepare_folder(moved, run, resume=True)
    assert load_recipe_of(run) == moved
    for update in ({"correction": 3.0}, {"compound_clip": 1.5}):
        other = Recipe.model_validate(
            {**moved.model_dump(), "update": {**moved.update.model_dump(), **update}}
        )
        with pytest.raises(ConfigError, match="holds a run with update="):
            prepare_folder(other, run, resume=True)


def test_a_run_goes_on_that_began_before_there_was_a_section(tmp_path: Path) -> None:
    recipe, file = recipe_of(iterations=2), tmp_path / "run" / "recipe.json"
    prepare_folder(recipe, tmp_path / "run", resume=False)
    held = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in held.items() if key != "channels"}))
    prepare_folder(recipe, tmp_path / "run", resume=True)
    other = recipe.model_copy(update={"channels": {"dead": ChannelHarm(drop=1.0)}})
    with pytest.raises(ConfigError, match="holds a run with channels="):
        prepare_folder(other, tmp_path / "run", resume=True)


def test_processes_share_a_server() -> None:
    check_engine(RolloutSettings(engine=sampler.Engine.VLLM), 1)
    check_engine(RolloutSettings(engine=sampler.Engine.VLLM, url="http://127.0.0.1:8000"), 2)
    with pytest.raises(ConfigError, match=r"2 processes.*rollout\.url"):
        check_engine(RolloutSettings(engine=sampler.Engine.VLLM), 2)
