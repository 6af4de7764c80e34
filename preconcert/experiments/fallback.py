"""Runs with another to fall back on: a finished run's team, and a silent run's behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preconcert.agents import FallbackTeam
from preconcert.core import ConfigError
from preconcert.experiments.evaluation import Players, Who
from preconcert.training.run_folder import load_recipe_of


@dataclass(frozen=True, slots=True)
class Fallback:
    """A silent run to fall back on where nothing is heard."""

    silent: Path
    """Its folder."""
    patience: int = 3
    """Steps that agents wait for a first message."""

    @property
    def who(self) -> Who:
        """What its arm is called."""
        return Who.FALLBACK

    @property
    def overrides(self) -> Mapping[str, Any]:
        """By key, as an evaluation records them."""
        return {"fallback": str(self.silent), "patience": self.patience}

    def team(self, players: Players, run: Path, greedy: bool = False) -> FallbackTeam:
        """A run's trained team, with this one behind it.

        Raises:
            ConfigError: this run plays another task, or the two do not go together.
        """
        held, recipe = load_recipe_of(self.silent), players.recipe
        if held.task != recipe.task:
            raise ConfigError(f"{str(self.silent)!r} plays {held.task!r}, and {str(run)!r} {recipe.task!r}")
        behind = Players(self.silent, held.model_copy(update={"params": recipe.params}))
        return FallbackTeam(players.team(greedy), behind.team(greedy), self.patience)
