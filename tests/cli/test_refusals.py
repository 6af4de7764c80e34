"""Whatever cannot be done ends with exit code 2 and at most two lines, and leaves nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from preconcert.models import StarterSettings, build_starter

Command = Callable[..., Result]

BROKEN_ENV = """\
from preconcert.core import Observation, StepResult, TaskLanguage

class Broken:
    agents = ("a", "b")
    horizon = 2
    language = TaskLanguage(actions=("left", "right"))

    def __init__(self, params, seed, split="train"):
        self.steps = 0

    def reset(self):
        return ["not", "a", "mapping"]

    def step(self, actions): ...
    def state(self): return "s"
    def snapshot(self): return self.steps
    def restore(self, snapshot): self.steps = snapshot
    def legal_actions(self, agent): return ("left", "right")

class Raising(Broken):
    def reset(self):
        return {}["missing"]
"""


def refused(result: Result, *expected: str) -> None:
    """Exit code 2, nothing on standard output, one or two lines that hold the expected words."""
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert len(errors) == 1
    assert len(lines) - errors[0] <= 2
    assert "Traceback" not in result.stderr
    for words in expected:
        assert words in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["task=rendevous"], "did you mean 'rendezvous'?"),
        (["grpo.iteratons=3"], "did you mean 'grpo.iterations'?"),
        (["adapters={agnt_0: x}"], "did you mean 'agent_0'?"),
        (["model=startr"], "did you mean 'starter'?"),
        (["grpo.lr=fast"], "grpo.lr = 'fast': expected a number"),
        (["model=/no/such/folder"], "no model folder at '/no/such/folder'"),
        (["--resume", "--fresh"], "take one of them"),
        (["--resum"], "--resume"),
    ],
)
def test_training_that_cannot_begin(
    run_command: Command, recipe_file: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    out = tmp_path / "out"
    refused(run_command("train", recipe_file, *arguments, "--out", out), expected)
    assert not out.exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [("model=/no/such/folder", "/no/such/folder"), ("grpo.report_to=tensorbord", "tensorbord")],
)
def test_a_run_that_cannot_begin_deletes_none(
    run_command: Command, recipe_file: Path, tmp_path: Path, override: str, expected: str
) -> None:
    old = tmp_path / "old"
    (old / "adapters").mkdir(parents=True)
    (old / "recipe.json").write_text("{}")
    refused(run_command("train", recipe_file, override, "--fresh", "--out", old), expected)
    assert sorted(path.name for path in old.iterdir()) == ["adapters", "recipe.json"]


def test_a_run_behind_a_link_starts_over_where_it_is(run_command: Command, recipe_file: Path, tmp_path: Path) -> None:
    kept, link = tmp_path / "scratch", tmp_path / "run"
    kept.mkdir()
    (kept / "recipe.json").write_text("{}")
    (kept / "left").write_text("from before")
    link.symlink_to(kept)
    refused(run_command("train", recipe_file, "gate.min_gap=1", "--fresh", "--out", link), "below gate.min_gap=1")
    assert link.is_symlink()
    assert (kept / "gate.json").is_file()
    assert not (kept / "left").exists()


def test_an_empty_folder_stays_empty(run_command: Command, recipe_file: Path, tmp_path: Path) -> None:
    refused(run_command("train", recipe_file, "model=/no/such/folder", "--out", tmp_path), "/no/such/folder")
    assert list(tmp_path.iterdir()) == []


def test_the_gate_refuses(run_command: Command, recipe_file: Path, tmp_path: Path) -> None:
    refused(run_command("train", recipe_file, "gate.min_gap=1", "--out", tmp_path / "out"), "below gate.min_gap=1")
    assert (tmp_path / "out" / "gate.json").is_file()


def test_folders_that_hold_something_else(run_command: Command, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    for option in ("--fresh", "--resume"):
        refused(run_command("train", recipe_file, option, "--out", tmp_path), "is not a run")
    refused(run_command("train", recipe_file, "--out", tmp_path), "is not empty")
    refused(run_command("train", recipe_file, "--out", tmp_path / "precious"), "is a file")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_finished_run_is_not_overwritten(run_command: Command, recipe_file: Path, run: Path) -> None:
    refused(run_command("train", recipe_file, "--out", run), "--resume", "--fresh")
    refused(run_command("train", recipe_file, "seed=7", "--resume", "--out", run), "seed=0", "7")
    assert (run / "result.json").is_file()


@pytest.mark.parametrize("command", ["eval", "play", "watch"])
def test_what_is_no_run(run_command: Command, run: Path, tmp_path: Path, command: str) -> None:
    refused(run_command(command, run.with_name("tinny")), "tinny", f"did you mean '{run}'?")
    refused(run_command(command, tmp_path), "is not a run folder")


@pytest.mark.parametrize("command", ["eval", "play", "watch"])
def test_a_corrupt_adapter(run_command: Command, run: Path, tmp_path: Path, command: str) -> None:
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("eval", "*.html"))
    weights = copy / "adapters" / "agent_1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    refused(run_command(command, copy), str(weights), "corrupt")
    assert not (copy / "eval").exists()
    assert not (copy / "replay.html").exists()


def test_a_checkpoint_of_another_architecture(run_command: Command, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("eval", "*.html"))
    words = list(json.loads((copy / "base" / "tokenizer.json").read_text())["model"]["vocab"])
    build_starter(words, copy / "base", 0, StarterSettings(layers=1, width=16, heads=2, kv_heads=2, ffn=32))
    refused(run_command("eval", copy, "--json"), "is for another architecture")
    assert not (copy / "eval").exists()


def test_a_run_that_stopped_at_the_gate(run_command: Command, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("adapters"))
    refused(run_command("eval", copy), "is it finished?")


@pytest.mark.parametrize(("name", "expected"), [("Broken", "must be a mapping"), ("Raising", "KeyError: 'missing'")])
def test_a_broken_environment(
    run_command: Command, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    (tmp_path / "broken_env.py").write_text(BROKEN_ENV)
    monkeypatch.chdir(tmp_path)
    task = f"broken_env:{name}"
    refused(run_command("check-env", task), task, expected)
    refused(run_command("train", recipe_file, f"task={task}", "params={}", "--out", "out"), task, expected)
    refused(run_command("check-env", "broken_env:Brokn"), "did you mean 'Broken'?")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--no-such-option"], "--no-such-option"),
        (["trane"], "train"),
        (["eval"], "RUN"),
        (["tasks", "--jsn"], "--json"),
    ],
)
def test_usage_errors(run_command: Command, arguments: list[str], expected: str) -> None:
    refused(run_command(*arguments), expected)
