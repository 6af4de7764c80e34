"""A run that is killed and taken up again ends exactly like one that never was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from preconcert.agents import AgentSettings
from preconcert.core import ConfigError, dump_episode, load_episodes
from preconcert.training.latent_start import LatentStartSettings
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Silent
from preconcert.training.run import train
from tests.training.resumable_run import ITERATIONS, recipe
from tests.training.teams import recipe_of

ROOT = Path(__file__).parents[2]
TIMES = ("_s", "_time", "_runtime", "_per_second")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    return train(recipe(), tmp_path_factory.mktemp("runs") / "whole")


def killed(out: Path, stage: str, count: int) -> None:
    """Carry the run on in a process of its own, which dies at the given moment."""
    command = [sys.executable, "-m", "tests.training.resumable_run", str(out), stage, str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


def log_of(out: Path) -> list[dict[str, Any]]:
    """The iterations' lines without clock times."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in lines]


def assert_same(out: Path, whole: Path) -> None:
    mine, other = load_episodes(out / "episodes.jsonl"), load_episodes(whole / "episodes.jsonl")
    assert mine.torn_bytes == 0
    names = [(e.iteration, e.seed, e.sample) for e in mine.episodes]
    assert len(set(names)) == len(names) == ITERATIONS * 4 * 3
    assert [dump_episode(e) for e in mine.episodes] == [dump_episode(e) for e in other.episodes]
    assert log_of(out) == log_of(whole)
    assert [line["iteration"] for line in log_of(out)] == list(range(ITERATIONS))
    for name in ("agent_0", "agent_1"):
        for folder in ("warm", "adapters"):
            found = load_file(out / folder / name / "adapter_model.safetensors")
            wanted = load_file(whole / folder / name / "adapter_model.safetensors")
            assert found.keys() == wanted.keys()
            assert all((found[key] == wanted[key]).all() for key in wanted), (folder, name)


def test_killed_in_the_warm_start_and_in_an_iteration(whole: Path, tmp_path: Path) -> None:
    """Killed three times over: in fine-tuning, right before the first checkpoint, and between two of them."""
    out = tmp_path / "run"
    killed(out, "warm start", 3)
    assert not (out / "warm_start.json").exists()
    killed(out, "reinforcement learning", 3)
    assert len(log_of(out)) == 3
    assert len(load_episodes(out / "episodes.jsonl").episodes) == 3 * 4 * 3
    killed(out, "reinforcement learning", 4)
    assert not (out / "result.json").exists()
    train(recipe(), out, resume=True)
    assert_same(out, whole)


def test_the_run_learned_something(whole: Path) -> None:
    """Otherwise the comparison above would be empty."""
    for name in ("agent_0", "agent_1"):
        warm = load_file(whole / "warm" / name / "adapter_model.safetensors")
        trained = load_file(whole / "adapters" / name / "adapter_model.safetensors")
        assert any((warm[key] != trained[key]).any() for key in warm)


def test_a_torn_checkpoint_is_passed_over(whole: Path, tmp_path: Path) -> None:
    """Without its marker the newest checkpoint does not count, and the older one gives the same run."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "result.json").unlink()
    shutil.rmtree(out / "adapters")
    markers = sorted(out.glob("checkpoints/*/complete.json"), key=lambda path: json.loads(path.read_text())["step"])
    assert len(markers) == 2
    markers[-1].unlink()
    with open(out / "episodes.jsonl", "ab") as file:
        file.write(b'{"task": "rendez')
    train(recipe(), out, resume=True)
    assert_same(out, whole)


def test_a_folder_with_another_run_is_refused(whole: Path) -> None:
    with pytest.raises(ConfigError, match="already holds a run"):
        train(recipe(), whole)
    with pytest.raises(ConfigError, match="seed=7"):
        train(recipe().model_copy(update={"seed": 8}), whole, resume=True)
    assert train(recipe(), whole, resume=True) == whole


class CutOff(Silent):
    """Stops the run once two iterations are done."""

    now = ""

    def stage(self, name: str, total: int) -> None:
        """Remembered."""
        self.now = name

    def advance(self, done: int, note: str = "") -> None:
        """The moment, if it is this one."""
        if self.now == "reinforcement learning" and done == 2:
            raise KeyboardInterrupt


def talking_in_vectors(**grpo: Any) -> Recipe:
    plain = recipe_of(iterations=3, minibatches=2, epochs=2, checkpoint_every=1, lr=0.02, **grpo)
    agent = AgentSettings(codec={"type": "latent", "tokens": 1, "dims": 2, "levels": 4})
    return plain.model_copy(update={"agent": agent, "latent_start": LatentStartSettings(steps=2, batch=4)})


def test_codecs_and_their_learning_rate_survive_a_crash(tmp_path: Path) -> None:
    recipe = talking_in_vectors(codec_lr=0.003)
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", reporter=CutOff())
    out = train(recipe, tmp_path / "run", resume=True)
    assert log_of(out) == log_of(whole)
    moved = 0
    for name in ("agent_0", "agent_1"):
        for file in ("adapter_model.safetensors", "latent_codec.safetensors"):
            found, wanted, warm = (load_file(each / name / file) for each in (
                out / "adapters", whole / "adapters", whole / "warm"))
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted), (name, file)
            moved += any(not torch.equal(wanted[key], warm[key]) for key in wanted)
    assert moved == 4
    held = next((out / "checkpoints").glob("*/optimizer.pt"))
    groups = torch.load(held, weights_only=True)["param_groups"]
    assert {group["initial_lr"] for group in groups} == {0.02, 0.003}
    assert all(group["params"] for group in groups)


def test_the_weight_of_speech_is_the_recipes(tmp_path: Path) -> None:
    codecs = [
        load_file(train(talking_in_vectors(speech_weight=weight), tmp_path / str(weight)) / "adapters" / "agent_0"
                  / "latent_codec.safetensors")["queries"]
        for weight in (0.0, 1.0)
    ]
    assert not torch.equal(*codecs)
