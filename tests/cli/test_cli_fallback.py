"""`--fallback`: a run judged and shown with a silent one behind it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def silent(recipe_file: Path, run_command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("silent") / "run"
    result = run_command("train", recipe_file, "agent.spans.say=false", "--out", out)
    assert result.exit_code == 0, result.stderr
    return out


def test_a_run_is_judged_with_another_to_fall_back_on(run: Path, silent: Path, run_command: Command) -> None:
    words = ("eval", run, "--episodes", 4, "drop=1.0", "--fallback", silent, "--patience", 1)
    found = json.loads(run_command(*words, "--json").stdout)
    assert found["arm"] == "fallback"
    assert found["arms"].keys() >= {"fallback", "trained", "trained-drop1"}
    assert 0 < found["fallen_back"] < 1
    assert found["overrides"] == {"channel.drop": 1.0, "fallback": str(silent), "patience": 1}
    assert found["arms"]["fallback"]["title"] == "trained with fallback, sampled, 100% lost"
    assert "trained with fallback" in run_command(*words).stdout


def test_episodes_are_shown_with_another_to_fall_back_on(
    run: Path, silent: Path, run_command: Command, tmp_path: Path
) -> None:
    def shown(*words: object) -> dict[str, Any]:
        return json.loads(run_command("play", run, "drop=1.0", *words, "--json").stdout)

    words = ("--fallback", silent, "--patience")
    alone, soon, late = shown(), shown(*words, 1), shown(*words, 99)
    assert alone["fallback"] is None
    assert soon["fallback"] == {"run": str(silent), "patience": 1}
    assert late["frames"] == alone["frames"]
    assert soon["frames"][0] == alone["frames"][0], "nobody can have heard anything yet"
    assert soon["frames"] != alone["frames"]
    for frame in soon["frames"][:-1]:
        assert {view["alone"] for view in frame["views"]} == {frame["step"] >= 1}, "nobody ever hears anything"
    assert not any(view["alone"] for frame in alone["frames"] for view in frame["views"])
    said = run_command("play", run, "drop=1.0", *words, 1).stdout
    assert "as the silent team would" in said
    file = tmp_path / "page.html"
    assert run_command("watch", run, "drop=1.0", *words, 1, "--episodes", 2, "--out", file).exit_code == 0
    assert f"from step 1 on as {silent} where nothing is heard" in file.read_text()


def test_a_service_plays_its_own_team(silent: Path, run_command: Command) -> None:
    result = run_command("play", "--server", "http://127.0.0.1:9", "--fallback", silent)
    assert result.exit_code == 2
    assert "--fallback is for runs in a folder" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--fallback", "{run}"), "writes messages itself"),
        (("--fallback", "{silent}", "--plan", "--model", "oracle"), "take --plan or --fallback"),
        (("--fallback", "nowhere"), "is not a run folder"),
        (("--patience", "7"), "--patience 7 is for --fallback"),
    ],
)
def test_refusals(run: Path, silent: Path, run_command: Command, words: tuple[str, ...], says: str) -> None:
    result = run_command("eval", run, *(word.format(run=run, silent=silent) for word in words))
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())
