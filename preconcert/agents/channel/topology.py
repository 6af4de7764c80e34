"""Who hears whom: everybody, fixed pairs, the nearest, or all through one messenger.

A recipe writes `topology: broadcast`, or a mapping with its `type` and settings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from preconcert.core import ConfigError, Env, UnknownNameError, nearest

Positions = Mapping[str, tuple[int, ...]]
"""Where every agent is."""


class _Topology(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Broadcast(_Topology):
    """Everybody hears everybody."""

    type: Literal["broadcast"] = "broadcast"

    def reach(self, sender: str, others: Sequence[str], positions: Positions | None) -> tuple[str, ...]:
        """Those of the others who hear the sender."""
        return tuple(others)

    def names(self) -> Collection[str]:
        """The agents that the settings speak of."""
        return ()


class Pairs(_Topology):
    """Who talks to whom, once and for all."""

    type: Literal["pairs"] = "pairs"
    pairs: Mapping[str, tuple[str, ...]]
    """By sender, who hears it. Or a list of pairs that hear each other. Whoever is not in it talks to nobody."""

    @field_validator("pairs", mode="before")
    @classmethod
    def _both_ways(cls, given: Any) -> Any:
        if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
            return given
        heard: dict[str, list[str]] = {}
        for pair in given:
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2 or pair[0] == pair[1]:
                raise ValueError(f"{pair!r} is not a pair of two agents")
            for one, other in ((pair[0], pair[1]), (pair[1], pair[0])):
                if other not in heard.setdefault(one, []):
                    heard[one].append(other)
        return heard

    def reach(self, sender: str, others: Sequence[str], positions: Positions | None) -> tuple[str, ...]:
        """Those of the others who hear the sender."""
        hearing = self.pairs.get(sender, ())
        return tuple(other for other in others if other in hearing)

    def names(self) -> Collection[str]:
        """The agents that the settings speak of."""
        return {*self.pairs, *(name for heard in self.pairs.values() for name in heard)}


class Nearest(_Topology):
    """The k agents that are nearest to the sender when its step is over."""

    type: Literal["nearest"] = "nearest"
    k: int = Field(ge=1)
    """How many hear it. Distances are moves on a grid (the sum over coordinates); of equals, the first agents."""

    def reach(self, sender: str, others: Sequence[str], positions: Positions | None) -> tuple[str, ...]:
        """Those of the others who hear the sender."""
        unknown = [name for name in (sender, *others) if positions is None or name not in positions]
        if positions is None or unknown:
            raise ConfigError(f"channel.topology nearest: nobody says where {unknown[0]!r} is")
        check_places({name: positions[name] for name in (sender, *others)})
        here = positions[sender]

        def away(other: str) -> int:
            return sum(abs(one - two) for one, two in zip(here, positions[other], strict=True))

        near = sorted(others, key=away)[: self.k]  # sorting keeps the order of equals
        return tuple(other for other in others if other in near)

    def names(self) -> Collection[str]:
        """The agents that the settings speak of."""
        return ()


class Messenger(_Topology):
    """All messages go to one agent, and its messages to all."""

    type: Literal["messenger"] = "messenger"
    name: str
    """The agent."""

    def reach(self, sender: str, others: Sequence[str], positions: Positions | None) -> tuple[str, ...]:
        """Those of the others who hear the sender."""
        return tuple(others) if sender == self.name else tuple(other for other in others if other == self.name)

    def names(self) -> Collection[str]:
        """The agents that the settings speak of."""
        return (self.name,)


_TYPES = ("broadcast", "pairs", "nearest", "messenger")


def _in_full(given: Any) -> Any:
    """A name as a mapping; an unknown one is refused with the nearest."""
    if isinstance(given, Mapping) and "type" not in given:
        raise PydanticCustomError("type_missing", "{said}", {"said": f"needs a type; known: {', '.join(_TYPES)}"})
    name = given.get("type") if isinstance(given, Mapping) else given
    if isinstance(name, str) and name not in _TYPES:
        said = f"unknown type {name!r}; {nearest(name, _TYPES)}"
        raise PydanticCustomError("unknown_type", "{said}", {"said": said})
    return {"type": given} if isinstance(given, str) else given


TopologySettings = Annotated[
    Annotated[Broadcast | Pairs | Nearest | Messenger, Field(discriminator="type")], BeforeValidator(_in_full)
]
"""What a recipe's `channel.topology` may be."""


def positions_of(env: Env) -> Positions | None:
    """Where a task's agents are; None where it does not say (see `core.Located`)."""
    where = getattr(env, "positions", None)
    return None if where is None else where()


def check_places(positions: Positions) -> None:
    """Are these places of one world?

    Raises:
        ConfigError: they have different numbers of coordinates.
    """
    sizes = {name: len(place) for name, place in positions.items()}
    for name, size in sizes.items():
        first, wanted = next(iter(sizes.items()))
        if size != wanted:
            raise ConfigError(
                f"positions: {first!r} has {wanted} coordinates and {name!r} {size}; messages go to the nearest, "
                "which takes the same number of all"
            )


def check_topology(topology: Broadcast | Pairs | Nearest | Messenger, env: Env, task: str) -> None:
    """Can a task's agents talk this way?

    Raises:
        UnknownNameError: it names an agent that the task does not have.
        ConfigError: it goes by places, and the task has none.
    """
    for name in topology.names():
        if name not in env.agents:
            raise UnknownNameError("agent", name, env.agents)
    if isinstance(topology, Nearest) and positions_of(env) is None:
        raise ConfigError(
            f"channel.topology nearest: {task} does not say where agents are; give it a `positions()` method, or use "
            "broadcast, pairs or messenger"
        )
