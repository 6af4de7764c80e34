"""An experiment at its smallest, as a user would run it: really trained, judged, drawn and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def out(run_command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiments") / "credit"
    result = run_command("experiment", "credit", "--scale", "smoke", "--out", folder, "--jobs", "2")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.rstrip().endswith(f"{folder / 'index.html'}")
    assert "cells: 4 of 4 done" in result.stderr
    return folder


def test_what_an_experiment_leaves(out: Path) -> None:
    held = json.loads((out / "result.json").read_text())
    assert held["command"] == "preconcert experiment credit --scale smoke"
    assert (held["cells_total"], held["cells_failed"], held["seeds"]) == (4, [], 2)
    assert {each["task"] for each in held["cells"]} == {"rendezvous"}
    for each in held["cells"]:
        assert each["error"] is None
        assert 0 <= each["measures"]["success_sampled"] <= 1
        assert 0 <= each["measures"]["success_greedy"] <= 1
        steps = each["curves"]["env_steps"]
        assert len(steps) == len(each["curves"]["success"]) == 2
        assert 0 < steps[0] < steps[1] == each["measures"]["env_steps"]
    assert "numbers mean nothing" in held["limits"][0]
    assert {"torch", "trl"} <= held["versions"].keys()
    assert sorted(path.stem for path in (out / "figures").glob("*.png")) == sorted(held["figures"])
    assert "http" not in (out / "index.html").read_text()


def test_arms_share_the_warm_starts_of_their_seeds(out: Path) -> None:
    """Two arms, two seeds: one warm start per seed, none of it made twice."""
    assert len([path for path in (out / "warm").iterdir() if path.is_dir()]) == 2
    for folder in (out / "cells").iterdir():
        assert not (folder / "run" / "checkpoints").exists()
        assert not (folder / "run" / "episodes.jsonl").exists()
        assert (folder / "run" / "adapters").is_dir()


def test_started_again_nothing_is_done_again(run_command: Command, out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/cell.json")}
    told = json.loads(run_command("experiment", "credit", "--out", out, "--json").stdout)
    assert {path: path.stat().st_mtime_ns for path in out.glob("cells/*/cell.json")} == before
    held = json.loads((out / "result.json").read_text())
    assert told["out"] == str(out)
    assert told["tables"] == held["tables"]


def test_an_interrupted_cell_goes_on_where_it_was(run_command: Command, out: Path) -> None:
    """The warm start stays; learning, its checkpoints gone, is repeated, and the same figures come out."""
    cell = sorted((out / "cells").iterdir())[0]
    found = json.loads((cell / "cell.json").read_text())
    (cell / "cell.json").unlink()
    (cell / "run" / "result.json").unlink()
    before = (cell / "run" / "warm_start.json").stat().st_mtime_ns
    assert run_command("experiment", "credit", "--out", out).exit_code == 0
    again = json.loads((cell / "cell.json").read_text())
    assert (cell / "run" / "warm_start.json").stat().st_mtime_ns == before
    assert again["measures"].keys() == found["measures"].keys()
    timed = {"train_s"}
    assert {k: v for k, v in again["measures"].items() if k not in timed} == {
        k: v for k, v in found["measures"].items() if k not in timed
    }


@pytest.mark.parametrize(
    ("words", "says"), [(("credits",), "did you mean 'credit'?"), (("credit", "--scale", "smal"), "scale 'smal'")]
)
def test_refusals(run_command: Command, words: tuple[str, ...], says: str) -> None:
    result = run_command("experiment", *words)
    assert result.exit_code == 2
    assert says in result.stderr
