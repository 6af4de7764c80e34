"""`play --plan` and `watch --plan` on a tiny run, with the environment itself as the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from preconcert.agents.planners import PLANNERS
from preconcert.core import ConfigError
from preconcert.experiments.evaluation import evaluate
from preconcert.experiments.planned import Planned, WorldKind

Command = Callable[..., Result]
SMALL = ("planner.candidates=4", "planner.horizon=2")


@pytest.mark.parametrize("kind", PLANNERS)
def test_a_decision_as_people_read_it(run: Path, run_command: Command, kind: str) -> None:
    few = ("planner.rounds=3", "planner.leaves=3") if kind == "tree" else ("planner.samples=1",)
    asked = ("play", run, *SMALL, *few, "--plan", "--planner", kind, "--model", "oracle")
    text = run_command(*asked).stdout
    assert "weighs" in text
    assert "▸" in text
    assert "disagreement" in text
    assert "agent_1 does" in text
    found = json.loads(run_command(*asked, "--json").stdout)
    assert found["planner"]["type"] == kind
    assert found["planner"]["candidates"] == 4
    assert found["planner"]["model"] == "oracle"
    for frame in found["frames"][:-1]:
        for view in frame["views"]:
            taken = [each for each in view["weighed"] if each["chosen"]]
            assert [each["does"] for each in taken] == [view["does"]]
            assert taken[0]["says"] == view["says"]
            assert taken[0]["steps"][0]["others"][0]["came"] is not None
            assert all(part["came"] for part in taken[0]["steps"][0]["view"])


def test_the_page_draws_plans(run: Path, run_command: Command, tmp_path: Path) -> None:
    file = tmp_path / "replay.html"
    few = ("planner.candidates=3", "planner.horizon=1", "messages=off")
    run_command("watch", run, *few, "--episodes", 1, "--plan", "--model", "oracle", "--out", file)
    page = file.read_text(encoding="utf-8")
    assert "messages=off" in page
    assert "planned, best-of-k with the oracle model" in page
    assert '"weighed":[{' in page
    assert "drawPlan" in page


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--plan", "--planner", "beem"), "planner 'beem'"),
        (("--plan", "--model", "orakle"), "did you mean 'oracle'?"),
        (("--plan", "--greedy"), "take one of them"),
        (("--planner", "tree"), "--planner tree is for --plan, which is not asked for"),
        (("--model", "oracle"), "--model oracle is for --plan, which is not asked for"),
        (("planner.samples=2",), "planner.samples changes the search of --plan"),
        (("planner.sample=2", "--plan"), "did you mean 'planner.samples'?"),
        (("planner.samples=0", "--plan"), "planner.samples = 0"),
    ],
)
def test_refusals(run: Path, run_command: Command, words: tuple[str, ...], says: str) -> None:
    result = run_command("play", run, *words)
    assert result.exit_code == 2
    assert says in result.stderr


def test_a_run_is_judged_with_and_without_a_planner(run: Path, run_command: Command) -> None:
    words = ("eval", run, "--episodes", 3, "--plan", "--model", "oracle", *SMALL)
    found = json.loads(run_command(*words, "--json").stdout)
    assert found["arm"] == "planned"
    assert found["arms"].keys() >= {"planned", "trained", "trained-greedy"}
    assert found["tokens_per_decision"] > 14
    assert found["overrides"] == {
        "plan": "best-of-k", "model": "oracle", "planner.candidates": 4, "planner.horizon": 2,
    }  # fmt: skip
    assert "trained, planned" in run_command(*words).stdout


def test_a_team_that_plans_is_not_judged_greedily(run: Path) -> None:
    planned = Planned(PLANNERS["best-of-k"](), WorldKind.ORACLE)
    with pytest.raises(ConfigError, match="cannot be judged greedily"):
        evaluate(run, episodes=1, greedy=True, special=planned)
