"""What an experiment is: a question, arms, tasks and seeds, the work of one cell, and how the cells are read.

Parts: `ExperimentArm` and `ExperimentTask` (pieces of a recipe), `Plan` (what a scale means), `Experiment`, `Cell` (an
arm on a task with a seed, resolved to one recipe), `plan_of` and `cells_of`. Cells are carried out in `cell.py` and
`schedule.py`; `report.py` says what a report is made of.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from preconcert.core import ConfigError, UnknownNameError
from preconcert.experiments.report import Report
from preconcert.training.recipe import Recipe


class Scale(StrEnum):
    """How much is invested."""

    SMOKE = "smoke"
    """A minute: does everything work?"""
    STANDARD = "standard"
    """One to six hours on two cores; what the docs quote."""
    FULL = "full"
    """As large as the question deserves."""


@dataclass(frozen=True, slots=True)
class ExperimentArm:
    """One of the ways that are compared."""

    name: str
    """Unique within the experiment."""
    title: str
    """For people."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Values by dotted key of the recipe."""
    on_task: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further overrides by the task's name, for what must differ between tasks."""
    tasks: tuple[str, ...] = ()
    """Names of the tasks it runs on; empty means all."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """For the work of its cells, over those of the plan."""


@dataclass(frozen=True, slots=True)
class ExperimentTask:
    """One of the tasks, with the recipe that all arms start from."""

    name: str
    """Unique within the experiment."""
    recipe: Mapping[str, Any]
    """As in a YAML recipe, without the seed."""
    seeds: int | None = None
    """Instead of the plan's."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done at one scale."""

    arms: tuple[ExperimentArm, ...]
    tasks: tuple[ExperimentTask, ...]
    seeds: int
    options: Mapping[str, Any] = field(default_factory=dict)
    """For the work of a cell, e.g. how many held-out episodes it plays. Part of a cell's hash."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Arm × task × seed."""

    arm: str
    task: str
    seed: int
    work: str
    """`module:function` that carries it out; see `cell.py` for what it is given."""
    recipe: Recipe
    options: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """The hash of everything that it is made from. The names are not: equal work is done once."""
        recipe = self.recipe.model_dump(mode="json")
        if not recipe["channels"]:
            del recipe["channels"]  # as it was before there were any: published cells keep their hashes
        content = {"work": self.work, "recipe": recipe, "options": dict(self.options)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Of its folder: readable, and unique by the digest."""
        return folder_name(self.task, self.arm, self.seed, self.digest)


def folder_name(task: str, arm: str, seed: int, digest: str) -> str:
    """Of a cell."""
    return re.sub(r"[^\w.-]+", "_", f"{task}-{arm}-s{seed}") + f"-{digest}"


@dataclass(frozen=True, slots=True)
class CellResult:
    """A cell that was carried out, or failed."""

    cell: Cell
    measures: Mapping[str, float | None]
    """Figures by name; empty where it failed."""
    curves: Mapping[str, Sequence[float | None]]
    """Figures per iteration by name."""
    error: str | None
    """Why it failed; None where it did not."""
    made: Mapping[str, Any]
    """Commit, versions, start and seconds."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What is no figure: examples for tables and drawings, as plain values."""

    def to_json(self) -> dict[str, Any]:
        """As plain values; the recipe is elsewhere."""
        return {
            "arm": self.cell.arm,
            "task": self.cell.task,
            "seed": self.cell.seed,
            "digest": self.cell.digest,
            "error": self.error,
            "measures": dict(self.measures),
            "curves": {name: list(values) for name, values in self.curves.items()},
            "made": dict(self.made),
        }


@dataclass(frozen=True, slots=True)
class Experiment:
    """A question and how it is put."""

    name: str
    question: str
    """One or two sentences."""
    plans: Mapping[Scale, Plan]
    work: str
    """`module:function` of a cell."""
    report: Callable[[Plan, Sequence[CellResult]], Report]
    """A function of a module, so that an experiment can be pickled."""
    limits: tuple[str, ...] = ()
    """What the result does not show, one sentence each."""


def plan_of(experiment: Experiment, scale: Scale, tasks: Sequence[str] = ()) -> Plan:
    """What is done at a scale, on some of its tasks or, where none is named, on all.

    Raises:
        UnknownNameError: there is no such task in it.
    """
    plan = experiment.plans[scale]
    names = [task.name for task in plan.tasks]
    for name in tasks:
        if name not in names:
            raise UnknownNameError(f"task of {experiment.name} at scale {scale.value}", name, names)
    if not tasks:
        return plan
    return replace(
        plan,
        arms=tuple(arm for arm in plan.arms if not arm.tasks or set(arm.tasks) & set(tasks)),
        tasks=tuple(task for task in plan.tasks if task.name in tasks),
    )


def seeds_of(plan: Plan) -> dict[str, int]:
    """How many each task has."""
    return {task.name: task.seeds or plan.seeds for task in plan.tasks}


def cells_of(
    experiment: Experiment, scale: Scale, seeds: int | None = None, tasks: Sequence[str] = ()
) -> list[Cell]:
    """All cells; the first seed's come first, so that an experiment that is stopped has compared all arms on it.

    Raises:
        ConfigError: an arm does not fit its task's recipe.
    """
    plan = plan_of(experiment, scale, tasks)
    return [
        Cell(arm.name, task.name, seed, experiment.work, resolve(arm, task, seed), {**plan.options, **arm.options})
        for seed in range(seeds or max(seeds_of(plan).values()))
        for arm in plan.arms
        for task in plan.tasks
        if seed < (seeds or task.seeds or plan.seeds) and (not arm.tasks or task.name in arm.tasks)
    ]


def overridden(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A recipe with some values by dotted key.

    Raises:
        ValidationError: the result is no recipe.
    """
    return Recipe.model_validate(_changed(recipe.model_dump(mode="json"), changes))


def _changed(recipe: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = copy.deepcopy(dict(recipe))
    for key, value in changes.items():
        place = content
        *path, last = key.split(".")
        for part in path:
            inner = place.get(part)
            place[part] = dict(inner) if isinstance(inner, Mapping) else {}
            place = place[part]
        place[last] = value
    return content


def resolve(arm: ExperimentArm, task: ExperimentTask, seed: int) -> Recipe:
    """An arm's recipe on a task.

    Raises:
        ConfigError: the result is no recipe.
    """
    content = _changed(task.recipe, {**arm.overrides, **arm.on_task.get(task.name, {})})
    try:
        return Recipe.model_validate({**content, "seed": seed})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"arm {arm.name!r} on {task.name!r}: {where} = {first['input']!r}: {first['msg']}") from None
