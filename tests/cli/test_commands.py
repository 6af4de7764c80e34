"""The commands on a tiny trained run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from preconcert import __version__
from preconcert.envs import tasks

Command = Callable[..., Result]
REQUIRED = {
    "task", "episodes", "success_rate", "success_ci95", "return_mean", "no_message_ceiling", "malformed_rate",
    "intention_accuracy", "forecast_exact_match", "message_bits_per_turn", "generated_tokens", "wall_s", "arms",
    "overrides", "versions", "commit",
}  # fmt: skip


def test_version(run_command: Command) -> None:
    assert run_command("--version").stdout.split() == ["preconcert", __version__]


def test_tasks(run_command: Command) -> None:
    found = json.loads(run_command("tasks", "--json").stdout)["tasks"]
    assert list(found) == list(tasks())
    assert found["rendezvous"]["no_message_ceiling"] == pytest.approx(1 / 3)
    shown = run_command("tasks").stdout
    for name, task in found.items():
        assert name in shown
        for key, param in task["params"].items():
            assert param["doc"], f"{name}: {key} is not described"
            assert f"params.{key}" in shown


@pytest.mark.parametrize("command", ["--help", "tasks", "tasks --json", "train --help", "check-env signal"])
def test_light_commands_do_without_torch(command: str) -> None:
    code = f"""
import sys
from preconcert.cli import app
try:
    app({command.split()!r})
except SystemExit as end:
    assert not end.code, end.code
assert not {{"torch", "transformers"}} & set(sys.modules), "torch was imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_training_says_what_it_does(training: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, result = training
    assert result.stdout == f"{out}\n"
    for stage in ("scripted play", "warm start", "gate", "reinforcement learning"):
        assert stage in result.stderr
    lines = result.stderr.splitlines()
    stages = ("scripted play: ", "warm start: ", "gate: ", "reinforcement learning: ")
    assert [line for line in lines if not line.startswith(stages)] == [], "somebody else is talking"
    assert (out / "result.json").is_file()


def test_ctrl_c_says_how_to_go_on(
    run_command: Command, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("preconcert.training.run.run_gate", interrupted)
    out = tmp_path / "a run"
    result = run_command("train", recipe_file, "seed=3", "--out", out)
    assert result.exit_code == 130
    last = result.stderr.strip().splitlines()[-1]
    assert last == f"interrupted; go on with: preconcert train {recipe_file} seed=3 --out '{out}' --resume"
    monkeypatch.undo()
    assert run_command("train", recipe_file, "seed=3", "--out", out, "--resume").exit_code == 0
    assert (out / "result.json").is_file()


def test_fresh_starts_over(run_command: Command, recipe_file: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        result = run_command("train", recipe_file, f"seed={seed}", "grpo.iterations=0", "--fresh", "--out", tmp_path)
        assert result.exit_code == 0, result.stderr
        assert json.loads((tmp_path / "recipe.json").read_text())["seed"] == seed


def test_a_finished_run_is_left_alone(run_command: Command, recipe_file: Path, run: Path) -> None:
    before = (run / "log.jsonl").stat().st_mtime_ns
    found = json.loads(run_command("train", recipe_file, "--resume", "--json", "--out", run).stdout)
    assert found["run"] == str(run)
    assert found["result"]["finished"]
    assert (run / "log.jsonl").stat().st_mtime_ns == before


def test_evaluation_prints_one_json_object(run_command: Command, run: Path) -> None:
    result = run_command("eval", run, "--json")
    found = json.loads(result.stdout)
    assert set(found) >= REQUIRED
    assert found["episodes"] == 5
    assert found["arm"] == "trained"
    assert found["overrides"] == {}
    assert found["no_message_ceiling"] == 0.5
    assert list(found["arms"]) == [
        "random", "scripted", "warm", "warm-greedy", "trained", "trained-greedy", "trained-shuffled"
    ]  # fmt: skip
    assert found["arms"]["trained"]["success_rate"] == found["success_rate"]
    assert found["arms"]["random"]["intention_accuracy"] is None
    assert json.loads((run / "eval" / "plain.json").read_text()) == found


def test_evaluation_is_repeatable(run_command: Command, run: Path) -> None:
    def figures() -> dict[str, object]:
        found = json.loads(run_command("eval", run, "--json", "--episodes", "3", "--seed", "4").stdout)["arms"]
        return {name: {**arm, "wall_s": None} for name, arm in found.items()}

    assert figures() == figures()


def test_evaluation_with_overrides(run_command: Command, run: Path) -> None:
    result = run_command("eval", run, "messages=off", "params.horizon=3", "--greedy", "--json", "--episodes", "3")
    found = json.loads(result.stdout)
    assert found["arm"] == "trained-off-greedy"
    assert found["greedy"] is True
    assert found["channel"]["mode"] == "off"
    assert found["overrides"] == {"channel.mode": "off", "params.horizon": 3}
    assert found["arms"]["trained"]["channel"]["mode"] == "on"
    assert found["arms"]["trained"]["steps_mean"] == 3
    shuffled = json.loads(run_command("eval", run, "messages=shuffled", "--json", "--episodes", "3").stdout)
    assert shuffled["arm"] == "trained-shuffled"
    names = sorted(path.name for path in (run / "eval").glob("*.json"))
    assert "channel.mode=off-params.horizon=3-episodes=3-greedy.json" in names


def test_evaluation_as_a_table(run_command: Command, run: Path) -> None:
    shown = run_command("eval", run).stdout
    for words in ("random", "imperfect script", "warm start, greedy", "trained, sampled", "copy-last", "0.500"):
        assert words in shown


@pytest.mark.parametrize("mode", ["on", "off", "shuffled"])
def test_play(run_command: Command, run: Path, mode: str) -> None:
    found = json.loads(run_command("play", run, f"messages={mode}", "--seed", "3", "--json").stdout)
    assert (found["seed"], found["split"], found["channel"]["mode"]) == (3, "heldout", mode)
    assert len(found["frames"]) == 5
    assert all(len(frame["board"]) == 3 for frame in found["frames"])
    later = [view["heard"] for frame in found["frames"][1:-1] for view in frame["views"]]
    assert any(later) == (mode != "off")
    shown = run_command("play", run, f"messages={mode}", "--seed", "3").stdout
    assert len(re.findall(r"step \d", shown)) == 4
    for frame in found["frames"][:-1]:
        for view in frame["views"]:
            assert f"does {view['does']}" in shown
            assert view["says"] in shown


def test_diagnose_reads_the_log_and_writes_a_page(run_command: Command, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "diagnostics.html"
    found = json.loads(run_command("diagnose", run, "--out", file, "--json").stdout)
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert found["iterations"] == len(entries)
    assert found["environment_steps"] == sum(entry["environment_steps"] for entry in entries)
    assert sum(found["gradient_share"].values()) == pytest.approx(1.0)
    assert "data:image/png;base64," in file.read_text()


def test_watch_writes_one_page_that_loads_nothing(run_command: Command, run: Path, tmp_path: Path) -> None:
    assert run_command("watch", run, "--episodes", "3").stdout == f"{run / 'replay.html'}\n"
    html = (run / "replay.html").read_text()
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|<link|src=", html)
    assert "prefers-color-scheme: dark" in html
    assert "<svg" in html
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert data is not None
    replays = json.loads(data.group(1))
    assert len(replays) == 3
    assert all(replay["frames"][0]["board"] for replay in replays)
    file = tmp_path / "deep" / "page.html"
    run_command("watch", run, "--episodes", "1", "--greedy", "--out", file)
    assert file.is_file()


def test_check_env(run_command: Command) -> None:
    found = json.loads(run_command("check-env", "rendezvous", "size=4", "params.horizon=5", "--json").stdout)
    assert found["ok"]
    assert "snapshot and restore" in found["checked"]
    assert "snapshot and restore" in run_command("check-env", "signal").stdout


def test_doctor(run_command: Command) -> None:
    found = json.loads(run_command("doctor", "--json").stdout)
    assert found["ok"], found["problems"]
    assert found["versions"]["trl"].startswith("1.16.")
    assert found["machine"]["cores"] >= 1
    assert run_command("doctor").stdout.strip().endswith("OK")
