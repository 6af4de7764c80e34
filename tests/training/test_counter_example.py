"""The counter-example to self-play, learned for real: two teams of two, a trap, and a way out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from preconcert.config import load_recipe
from preconcert.experiments.evaluation import Players
from preconcert.experiments.exact_games import GameValue, MatrixGame, exact_game
from preconcert.training.run import train
from preconcert.training.run_folder import load_recipe_of

RECIPE = Path(__file__).parents[2] / "recipes" / "fxp.yaml"


def worth_of(run: Path) -> GameValue:
    """What the main adapter's strategy is worth, exactly."""
    recipe = load_recipe_of(run)
    players = Players(run, recipe)
    game = exact_game(recipe, players.sides)
    assert isinstance(game, MatrixGame)
    return game.worth(game.ask(players.team()))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["selfplay", "past"])
def test_self_play_stays_in_the_trap(tmp_path: Path, mode: str) -> None:
    """A team that acts together wins 3 from it, with and without past selves as opponents."""
    run = train(load_recipe(RECIPE, [f"league.mode={mode}", "grpo.iterations=30"]), tmp_path / "run")
    assert worth_of(run).exploitability > 2.9


@pytest.mark.slow
def test_cross_play_leaves_it(tmp_path: Path) -> None:
    assert worth_of(train(load_recipe(RECIPE), tmp_path / "run")).exploitability < 0.1
