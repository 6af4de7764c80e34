"""A PettingZoo environment as a task: `task: mpe_spread:MpeSpread`. Needs `pip install mpe2`.

Agents spread out over as many landmarks. The numbers that PettingZoo gives are read out as grid squares and compass
signs; the landmarks have no names of their own, so an agent announces the square that it is heading for.
"""

from typing import Any

import numpy as np
from mpe2 import simple_spread_v3
from numpy.typing import NDArray
from pydantic import Field

from preconcert.core import Slot
from preconcert.envs import FromPettingZoo, TaskParams

ACTIONS = ("stay", "west", "east", "south", "north")
DIGITS = tuple(str(digit) for digit in range(9))
SIGNS = ("here", *(f"{v}{h}" for v in ("north", "south", "") for h in ("east", "west", "") if v or h))


class MpeSpreadParams(TaskParams):
    """Parameters of `MpeSpread`."""

    agents: int = Field(2, ge=2, le=5)
    """Team size, and the number of landmarks."""
    horizon: int = Field(25, ge=1, le=100)
    """Steps until the episode is cut off."""


class MpeSpread(FromPettingZoo):
    """MPE's simple spread in words; solved if at the end every landmark has an agent within 0.3."""

    Params = MpeSpreadParams
    words = ("row", "col", "mark", "mate", *DIGITS, *SIGNS)

    def __init__(self, params: MpeSpreadParams, seed: int, split: str = "train") -> None:
        count = params.agents

        def describe(agent: str, seen: NDArray[np.float32]) -> str:
            place, others = seen[2:4], seen[4:].reshape(-1, 2)[: 2 * count - 1]
            names = ["mark"] * count + ["mate"] * (count - 1)
            signs = " ".join(f"{name} {sign(offset)}" for name, offset in zip(names, others, strict=True))
            return f"row {square(-place[1])} col {square(place[0])} {signs}"

        def fields(agent: str, seen: NDArray[np.float32]) -> dict[str, str]:
            return {"row": square(-seen[3]), "col": square(seen[2])}

        super().__init__(
            lambda: simple_spread_v3.parallel_env(N=count, max_cycles=params.horizon),
            seed=2 * seed + (split == "heldout"),
            describe=describe,
            horizon=params.horizon,
            actions=ACTIONS,
            fields=fields,
            forecast=(Slot("row", DIGITS), Slot("col", DIGITS)),
            message=(Slot("row", DIGITS), Slot("col", DIGITS)),
            success=covered,
        )


def square(coordinate: float) -> str:
    """Coordinates from -1 to 1 as 0 to 8; further out counts as the edge."""
    return str(int(np.clip(np.floor((coordinate + 1) / 2 * 9), 0, 8)))


def sign(offset: NDArray[np.float32]) -> str:
    """The compass sign of an offset; anything within 0.1 on an axis counts as level."""
    right, up = (int(np.sign(part)) if abs(part) > 0.1 else 0 for part in offset)
    return ("", "north", "south")[up] + ("", "east", "west")[right] or "here"


def covered(env: Any) -> bool:
    """Does every landmark have an agent within 0.3?"""
    world = env.unwrapped.world
    return all(
        min(float(np.linalg.norm(agent.state.p_pos - mark.state.p_pos)) for agent in world.agents) < 0.3
        for mark in world.landmarks
    )
