"""Hand-made episodes of two or more agents: what was seen, foretold, said, done and paid is all given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preconcert.core import Episode, Forecast, Intention, Message, Observation, StopReason, Trajectory, Turn

ACTIONS = ("north", "south", "stay")


def observation(agent: str, step: int, sees: Sequence[str] = (), legal: Sequence[str] = ACTIONS) -> Observation:
    """A view whose two fields depend on the step."""
    return Observation(
        agent, f"view {step}", tuple(legal), step, {"row": str(step % 3), "col": str(len(agent) % 2)}, tuple(sees)
    )


def turn(agent: str, step: int, action: str = "stay", **changes: Any) -> Turn:
    """A turn that a model wrote; everything not given is empty."""
    values: dict[str, Any] = {
        "agent": agent, "step": step, "observation": observation(agent, step), "inbox": (), "prompt_ids": (1,),
        "completion_ids": (4, 5), "logprobs": (-0.5, -0.5), "sampled": (True, True), "spans": (), "intentions": (),
        "forecast": None, "message": None, "action": action, "malformed": False, "reward": 0.0, "adapter": agent,
    }  # fmt: skip
    return Turn(**{**values, **changes})


def message(sender: str, step: int, recipients: Sequence[str], bits: float = 2.0, payload: str = "a stay") -> Message:
    """Two words."""
    return Message(sender, tuple(recipients), payload, bits, 2, step)


def episode(
    turns: Mapping[str, Sequence[Turn]], group: str = "g", sample: int = 0, success: bool | None = None
) -> Episode:
    """A finished episode."""
    steps = len(next(iter(turns.values())))
    return Episode(
        task="t", params={}, seed=0, split="train", group=group, sample=sample, iteration=0,
        trajectories={
            agent: Trajectory(agent, tuple(mine), 0, StopReason.TERMINATED, observation(agent, steps))
            for agent, mine in turns.items()
        },
        success=success, states=tuple("s" for _ in range(steps + 1)),
    )  # fmt: skip


def returns(values: Sequence[Mapping[str, float]], group: str = "g", turns: int = 2) -> list[Episode]:
    """One group of episodes with these returns by agent, paid at the last turn."""
    return [
        episode(
            {a: [turn(a, i, reward=r if i == turns - 1 else 0.0) for i in range(turns)] for a, r in value.items()},
            group,
            sample,
        )
        for sample, value in enumerate(values)
    ]


def intention(about: str, *actions: str) -> Intention:
    """With probability 1."""
    return Intention(about, tuple(actions), 1.0)


def forecast(row: str, col: str, reward: str | None = None, done: bool | None = None) -> Forecast:
    """Of the two fields."""
    return Forecast({"row": row, "col": col}, reward, done)
