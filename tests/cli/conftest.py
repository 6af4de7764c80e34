"""One tiny trained run for all tests of the command line, made by it in a process of its own, as a user would."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from preconcert.cli import app

RECIPE = """\
task: rendezvous
params: {size: 3, landmarks: 2, horizon: 4}
starter: {layers: 1, width: 32, heads: 2, kv_heads: 2, ffn: 32}
warm_start: {episodes: 64, steps: 15, batch: 64}
gate: {min_gap: 0, episodes: 4}
grpo: {iterations: 2, seeds: 2, group: 2, checkpoint_every: 1}
evaluation: {episodes: 5}
"""


def call(*arguments: str | Path) -> Result:
    """Run a command in this process; anything but a clean exit is raised here."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="session")
def run_command() -> Callable[..., Result]:
    return call


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="session")
def training(
    recipe_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    command = [sys.executable, "-m", "preconcert.cli", "train", str(recipe_file), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.fixture(scope="session")
def run(training: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    return training[0]
