"""The players of box-push: an imperfect teacher on the agent's own information, and an expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np

from preconcert.core import Decision, Env, Message, Observation
from preconcert.envs.grid import ACTIONS, OPPOSITE, SIDES, Cell, distances, shift, step_toward, walk

if TYPE_CHECKING:
    from preconcert.envs.box_push import BoxPush


class BoxPushScript:
    """Knows what an agent knows: its observation and its inbox. Remembers nothing.

    Goes to the cell behind the box, waits there until a mate stands on the same cell, and pushes. Without the direction
    it goes next to the box, without the box to the middle. Its mistakes are drawn anew at every step.
    """

    SLIP: ClassVar[float] = 0.1
    """Probability of a random action."""
    MISNAME: ClassVar[float] = 0.45
    """Probability that the informed agent says another direction, or none."""

    def decide(
        self, env: Env, observation: Observation, inbox: Sequence[Message], rng: np.random.Generator
    ) -> Decision:
        """Reads the observation and the inbox only."""
        words = observation.text.split()
        size = len(env.language.forecast[0].choices)
        did, here = words[3], (int(words[5]), int(words[7]))
        heard = [message.payload.split() for message in inbox if message.payload]
        own, seen = words[9], _seen_box(words[11:13], here)
        goal = own if own != "unknown" else next((say[0] for say in reversed(heard) if say[0] in SIDES), None)
        places = [say[1:3] for say in reversed(heard) if len(say) > 2 and say[1].isdigit() and say[2].isdigit()]
        told = (int(places[0][0]), int(places[0][1])) if places else None
        box = seen or told
        walls = {shift(here, side) for side, word in zip(SIDES, words[17:21], strict=True) if word == "wall"}
        beside = words[14:16] == ["v0", "h0"]
        planned = _plan(here, goal, box, walls, size, did, mate_here=beside)
        after = here if box is not None and planned == goal else walk(here, planned, size, walls)
        following = _plan(after, goal, box, walls, size, planned, mate_here=beside)
        action = str(rng.choice(ACTIONS)) if rng.random() < self.SLIP else planned
        if own != "unknown" and rng.random() < self.MISNAME:
            own = str(rng.choice([word for word in (*SIDES, "unknown") if word != own]))
        place = f"{seen[0]} {seen[1]}" if seen else "none none"
        return Decision(action, f"{own} {place} {following}")


def _seen_box(offset: Sequence[str], here: Cell) -> Cell | None:
    """The box's cell from its offset words."""
    down, right = offset
    if down == "far":
        return None
    sign = -1 if down[0] == "n" else 1, -1 if right[0] == "w" else 1
    return here[0] + sign[0] * int(down[1:]), here[1] + sign[1] * int(right[1:])


def _plan(
    here: Cell, goal: str | None, box: Cell | None, walls: set[Cell], size: int, did: str, mate_here: bool
) -> str:
    """The move of a player without mistakes."""
    if box is None:
        return _onward(here, (size // 2, size // 2), size, walls - {(size // 2, size // 2)}, did)
    if goal is None:
        beside = min((shift(box, side) for side in SIDES), key=lambda cell: (_far(here, cell), cell))
        return _onward(here, beside, size, walls | {box}, did)
    behind = shift(box, OPPOSITE[goal])
    if here == behind:
        return goal if mate_here else "stay"
    return _onward(here, behind, size, walls | {box}, did)


def _onward(start: Cell, target: Cell, size: int, blocked: set[Cell], did: str) -> str:
    """The first move of a shortest way; of equally short ones not the one straight back.

    Walls are seen from the cells beside them only: without a preference the way around one is soon forgotten.
    """
    away = distances(target, size, blocked)
    if start == target or start not in away:
        return "stay"
    back = OPPOSITE.get(did)
    return min(
        (side for side in SIDES if shift(start, side) in away),
        key=lambda side: away[shift(start, side)] + 0.5 * (side == back),
    )


def _far(one: Cell, other: Cell) -> int:
    return abs(one[0] - other[0]) + abs(one[1] - other[1])


class BoxPushExpert:
    """Always succeeds: takes the map from the environment and the direction from its view or its inbox."""

    def decide(
        self, env: Env, observation: Observation, inbox: Sequence[Message], rng: np.random.Generator
    ) -> Decision:
        """Waits until the whole team is behind the box, so that nobody stands in its way."""
        task = cast("BoxPush", env)
        known = observation.text.split()[9]
        heard = [word for message in inbox for word in message.payload.split()[:1] if word in SIDES]
        goal = known if known != "unknown" else heard[-1] if heard else None
        place = f"{known} {task.box[0]} {task.box[1]}"
        if goal is None:
            return Decision("stay", f"{place} stay")
        here, behind = task.cell_of(observation.agent), shift(task.box, OPPOSITE[goal])
        blocked = task.walls | {task.box}
        if all(task.cell_of(agent) == behind for agent in task.agents):
            return Decision(goal, f"{place} {goal}")
        action = step_toward(here, behind, task.params.size, blocked)
        after = walk(here, action, task.params.size, blocked)
        following = goal if after == behind else step_toward(after, behind, task.params.size, blocked)
        return Decision(action, f"{place} {following}")
