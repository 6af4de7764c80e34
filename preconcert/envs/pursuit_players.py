"""The players of pursuit: an imperfect chaser on the agent's own information, the same with foresight, an expert."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np

from preconcert.core import Decision, Env, Message, Observation
from preconcert.envs.evaders import RULES, Evader, Surroundings, path
from preconcert.envs.grid import ACTIONS, SIDES, Cell, distances, manhattan, shift, step_toward, toward, walk, wind

if TYPE_CHECKING:
    from preconcert.envs.pursuit import Pursuit


class PursuitScript:
    """Knows what an agent knows: its observation and its inbox. Remembers nothing.

    Runs to the cell where it sees an evader, or was told of one, and now and then keeps what it sees to itself.
    Without news it mostly waits. Its mistakes are drawn anew at every step.

    With foresight it is the same player, but for one thing: it knows the rule of an evader it sees or hears of, and
    runs to where it can meet it. The difference between the two is what foresight is worth.
    """

    SLIP: ClassVar[float] = 0.05
    """Probability of a random action."""
    SHY: ClassVar[float] = 0.15
    """Probability of not telling what is seen."""
    WANDER: ClassVar[float] = 0.15
    """Probability of a random action without news."""

    def __init__(self, foresight: bool = False) -> None:
        """
        Args:
            foresight: run to where the evader will be instead of where it is.
        """
        self.foresight = foresight

    def decide(
        self, env: Env, observation: Observation, inbox: Sequence[Message], rng: np.random.Generator
    ) -> Decision:
        """Reads the observation and the inbox; with foresight also the rule, and nothing else."""
        task = cast("Pursuit", env)
        size = task.params.size
        view = task.language.view
        assert view is not None
        said = {field.name: word for field, word in zip(view.fields, view.parse(observation.text), strict=True)}
        here = (int(said["row"]), int(said["col"]))
        walls = {shift(here, side) for side in SIDES if said.get(f"wall_{side}") == "wall"}
        seen = [(prey, _there(here, said[f"{prey}_down"], said[f"{prey}_right"])) for prey in task.preys]
        found = next(((prey, cell) for prey, cell in seen if cell is not None), None)
        target = found[1] if found else _told(inbox)
        if target is not None and self.foresight:
            target = self._meeting(task, here, target, said)
        if target is None:
            planned = str(rng.choice(ACTIONS)) if rng.random() < self.WANDER else "stay"
            following = "stay"
        else:
            planned = _step(here, target, size, walls - {target})
            after = walk(here, planned, size, walls)
            following = _step(after, target, size, walls - {target})
        action = str(rng.choice(ACTIONS)) if rng.random() < self.SLIP else planned
        news = "none none none"
        if found and rng.random() >= self.SHY:
            prey, cell = found
            news = f"{cell[0]} {cell[1]} {said[f'{prey}_went']}"
        return Decision(action, f"{news} {following}")

    def _meeting(self, task: Pursuit, here: Cell, place: Cell, said: dict[str, str]) -> Cell:
        """The first cell of the evader's way that it can reach in time, and so can the mate it sees.

        The place itself where a false message names it.

        Args:
            task: for the rule.
            here: the own cell.
            place: where the evader is, or was one step ago.
            said: the view by field.
        """
        running = [evader for evader in task.evaders if not evader.caught]
        evader = min(running, key=lambda one: manhattan(one.cell, place))
        if manhattan(evader.cell, place) > 1:
            return place  # a false message; that it is one must not show
        mate = _there(here, said["mate_down"], said["mate_right"])
        hands = [here, *([mate] if mate is not None else [])]
        return _first_meeting(task.path_of(evader, int(said["left"])), hands, len(hands), task.params.reach)


def _there(here: Cell, down: str, right: str) -> Cell | None:
    """The cell at an offset; None out of view."""
    if down == "far":
        return None
    signs = -1 if down[0] == "n" else 1, -1 if right[0] == "w" else 1
    return here[0] + signs[0] * int(down[1:]), here[1] + signs[1] * int(right[1:])


def _told(inbox: Sequence[Message]) -> Cell | None:
    """The cell in the latest message that names one."""
    heard = [message.payload.split() for message in inbox]
    return next((
        (int(words[0]), int(words[1]))
        for words in reversed(heard)
        if len(words) > 1 and words[0].isdigit() and words[1].isdigit()
    ), None)  # fmt: skip


def _first_meeting(way: Sequence[Cell], agents: Sequence[Cell], hands: int, reach: int) -> Cell:
    """The first cell on a way that enough agents can reach in time; the last one if there is none."""
    for step, cell in enumerate(way):
        if step and sum(manhattan(agent, cell) - reach <= step for agent in agents) >= hands:
            return cell
    return way[-1]


class PursuitExpert:
    """Succeeds in every layout: takes the whole truth from the environment, so that all agents follow one plan."""

    def decide(
        self, env: Env, observation: Observation, inbox: Sequence[Message], rng: np.random.Generator
    ) -> Decision:
        """Its part of the joint plan, where the evader is, and its part of the plan one step later."""
        task = cast("Pursuit", env)
        hands, reach, left = task.params.hands, task.params.reach, task.horizon - observation.step
        moves = joint_plan(task.around, task.evaders, hands, reach, left)
        around, evaders = task.after(moves)
        done = left == 1 or all(evader.caught for evader in evaders)
        later = ("stay",) * len(moves) if done else joint_plan(around, evaders, hands, reach, left - 1)
        evader = next(evader for evader in task.evaders if not evader.caught)
        row, column = evader.cell
        number = task.agents.index(observation.agent)
        return Decision(moves[number], f"{row} {column} {evader.went[0]} {later[number]}")


def joint_plan(
    around: Surroundings, evaders: Sequence[Evader], hands: int, reach: int, left: int
) -> tuple[str, ...]:
    """What each agent does when all know everything.

    They go for one evader at a time: the one that can be met first. One that reacts to them is run after, which
    drives it into a corner sooner or later.

    Args:
        around: the board, the agents' cells and last actions.
        evaders: as they are now.
        hands: agents that are needed at once.
        reach: from how many moves away they take hold.
        left: steps that remain.
    """
    best: tuple[int, Cell] | None = None
    for evader in evaders:
        if evader.caught:
            continue
        way = [evader.cell] if RULES[evader.rule].reacts else path(evader, around, left)
        for step, cell in enumerate(way):
            away = _distances(cell, around)
            ready = sorted(away.get(agent, left + around.size**2) - reach for agent in around.agents)[hands - 1]
            if (step or len(way) == 1) and (ready <= step or len(way) == 1):
                when = max(step, ready)
                best = min(best, (when, cell)) if best else (when, cell)
                break
    if best is None:
        return ("stay",) * len(around.agents)
    goal = best[1]
    return tuple(_step(agent, goal, around.size, around.walls) for agent in around.agents)


def _step(start: Cell, goal: Cell, size: int, walls: Collection[Cell]) -> str:
    """The first move of a shortest way, rows first."""
    return step_toward(start, goal, size, walls) if walls else toward(wind(start, goal))


def _distances(goal: Cell, around: Surroundings) -> dict[Cell, int]:
    """Moves to the goal, at least from the agents' cells that can reach it."""
    if around.walls:
        return distances(goal, around.size, around.walls)
    return {agent: manhattan(agent, goal) for agent in around.agents}
