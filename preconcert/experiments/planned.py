"""Runs that plan: a finished run's team with a search in front of it, for playing, watching and experiments.

Parts: `WorldKind` (what imagines), `Planned`, `planner_settings` (a kind of search and what is changed about it),
`planning_team`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from preconcert.agents.planners import PLANNERS, PlannerSettings, PlanningTeam
from preconcert.core import ConfigError, Rehearsing, UnknownNameError, WorldModel, nearest
from preconcert.experiments.evaluation import Players, Who
from preconcert.training.imagination import valued_oracle
from preconcert.training.world_stage import load_world_model
from preconcert.world_models import ShuffledWorldModel

PREFIX = "planner."
"""Goes before the keys of a planner's settings."""


class WorldKind(StrEnum):
    """What imagines."""

    TOKEN = "token"
    """The run's own token world model."""
    ORACLE = "oracle"
    """The environment itself: what planning could gain with a perfect model."""
    SHUFFLED = "shuffled"
    """The run's own, with its answers exchanged between episodes: a control."""


@dataclass(frozen=True, slots=True)
class Planned:
    """How a team plans."""

    settings: PlannerSettings
    world: WorldKind = WorldKind.TOKEN

    @property
    def who(self) -> Who:
        """What its arm is called."""
        return Who.PLANNED

    @property
    def overrides(self) -> Mapping[str, Any]:
        """By dotted key, as an evaluation records them."""
        changed = self.settings.model_dump(mode="json", exclude_defaults=True)
        return {"plan": self.settings.type, "model": self.world.value, **{PREFIX + k: v for k, v in changed.items()}}

    def team(self, players: Players, run: Path, greedy: bool = False) -> PlanningTeam:
        """A run's team that plans.

        Raises:
            ConfigError: greedily, or the run has no world model of its own.
        """
        if greedy:
            raise ConfigError("a team that plans weighs turns that are sampled: it cannot be judged greedily")
        return planning_team(players, run, self)


def planner_settings(kind: str, values: Mapping[str, Any]) -> PlannerSettings:
    """Settings of a search.

    Args:
        kind: its `type`.
        values: by key; dots go into `score` and `adaptive`.

    Raises:
        ConfigError: an unknown kind or key, or a value out of range.
    """
    if kind not in PLANNERS:
        raise UnknownNameError("planner", kind, PLANNERS)
    content: dict[str, Any] = {}
    for key, value in values.items():
        *path, last = key.split(".")
        place = content
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    try:
        return PLANNERS[kind].model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = PREFIX + ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"unknown key {where!r}; {nearest(where, _keys(PLANNERS[kind]))}") from None
        raise ConfigError(f"{where} = {first['input']!r}: {first['msg']}") from None


def planning_team(players: Players, run: Path, planned: Planned, team: Rehearsing | None = None) -> PlanningTeam:
    """A run's team that plans.

    Args:
        players: of the run.
        run: its folder.
        planned: how.
        team: who proposes; by default the trained team, sampled.

    Raises:
        ConfigError: the run has no world model of its own.
    """
    policy = team or players.team()
    return PlanningTeam(policy, world_of(players, run, planned.world, policy), planned.settings)


def world_of(players: Players, run: Path, kind: WorldKind, policy: Rehearsing) -> WorldModel:
    """A world model by its kind; `policy` plays the others for the oracle.

    Raises:
        ConfigError: the run has no world model of its own.
    """
    if players.recipe.agent.codec.type == "latent":
        raise ConfigError("planners imagine messages in words, and the agents of this run talk in vectors")
    if kind is WorldKind.ORACLE:
        # Without values, whatever is paid beyond the horizon would be nothing to it.
        return valued_oracle(policy)
    own: WorldModel = load_world_model(run, players.model)
    return ShuffledWorldModel(own, 0) if kind is WorldKind.SHUFFLED else own


def _keys(settings: type[BaseModel]) -> list[str]:
    found: list[str] = []
    for name, each in settings.model_fields.items():
        inner = each.default if isinstance(each.default, BaseModel) else None
        found += [PREFIX + name] if inner is None else [f"{PREFIX}{name}.{key}" for key in type(inner).model_fields]
    return found
