"""Runs with opponents on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from preconcert.config import load_recipe
from preconcert.core import PreconcertError

Command = Callable[..., Result]
RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = """\
task: kuhn
starter: {layers: 1, width: 32, heads: 2, kv_heads: 2, ffn: 32}
agent: {spans: {intend: false, foresee: false, say: false}}
warm_start: {episodes: 64, steps: 15, batch: 64}
grpo: {iterations: 2, seeds: 2, group: 2, credit: loo, policy_spans: [act], entropy: 0.1}
evaluation: {episodes: 6}
league: {mode: past, every: 1}
"""


@pytest.fixture(scope="module")
def poker(run_command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("poker")
    (folder / "poker.yaml").write_text(RECIPE)
    result = run_command("train", folder / "poker.yaml", "--out", folder / "run")
    assert result.exit_code == 0, result.output
    return folder / "run"


def test_eval_prints_what_the_strategy_is_worth(run_command: Command, poker: Path) -> None:
    found = json.loads(run_command("eval", poker, "--json").stdout)
    assert found["exploitability"] > 0
    assert -2 < found["first_seat_value"] < 2
    assert found["arms"]["population"]["exploitability"] > 0
    assert set(found["returns"]) == {"first", "second"}
    shown = run_command("eval", poker).stdout
    assert f"{found['exploitability']:.3f}" in shown
    assert "equilibrium" in shown


def test_crossplay_writes_a_table_and_a_picture(run_command: Command, poker: Path, tmp_path: Path) -> None:
    found = json.loads(run_command("crossplay", poker, "--script", "honest", "--out", tmp_path, "--json").stdout)
    assert found["labels"] == ["team@0", "team@1", "team, trained", "honest"]
    assert found["exact"] is True
    shown = run_command("crossplay", poker, "--script", "honest", "--out", tmp_path).stdout
    assert "team, trained" in shown
    assert (tmp_path / "crossplay.json").is_file()
    assert (tmp_path / "crossplay.png").is_file()
    assert run_command("crossplay", poker, "--script", "honst").exit_code == 2


@pytest.mark.parametrize(
    ("override", "finding"),
    [
        ("league.mod=past", "unknown key 'league.mod' = 'past'; did you mean 'league.mode'"),
        ("league.mode=pst", "did you mean 'past'"),
        ("league.scripts=[honst]", "unknown player 'honst'; did you mean 'honest'"),
        ("league.sides=[[agent_0],[agent_2]]", "unknown agent 'agent_2'"),
        ("adapters=per_agent", "a league has one main adapter"),
    ],
)
def test_what_a_league_cannot_be_is_said_before_the_run(override: str, finding: str) -> None:
    with pytest.raises(PreconcertError, match=finding):
        load_recipe(RECIPES / "kuhn.yaml", [override])
