"""From cells to what people read: `result.json`, `figures/*.png` and one self-contained `index.html`; and `notes.json`,
what else cells have kept, for an experiment to go on from.

Parts: `carry_out_experiment` (the whole way), `unpack_cells` (the way back), `Result` and `write_result`.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from preconcert.core import ConfigError
from preconcert.experiments.cell import FOUND
from preconcert.experiments.experiment import (
    CellResult,
    Experiment,
    Plan,
    Scale,
    cells_of,
    folder_name,
    plan_of,
    seeds_of,
)
from preconcert.experiments.figures import inlined, png
from preconcert.experiments.provenance import commit, machine, versions
from preconcert.experiments.replay import write_page
from preconcert.experiments.report import Report
from preconcert.experiments.schedule import CELLS, ScheduleReporter, read_cells, run_cells
from preconcert.training.json_file import write_json

RESULT, NOTES, PAGE, FIGURES = "result.json", "notes.json", "index.html", "figures"
ENOUGH_SEEDS = 5


@dataclass(frozen=True, slots=True)
class Result:
    """An experiment that was carried out."""

    experiment: Experiment
    scale: Scale
    plan: Plan
    seeds: Mapping[str, int]
    """By task."""
    cells: Sequence[CellResult]
    report: Report
    command: str
    """That makes it again."""
    made: Mapping[str, Any]
    """Commit, versions, machine and time."""

    @property
    def failed(self) -> list[CellResult]:
        """Cells that could not be carried out."""
        return [cell for cell in self.cells if cell.error is not None]

    def failures(self) -> list[tuple[str, str]]:
        """Where something failed, the seeds of an arm together, and why."""
        seeds: dict[tuple[str, str, str], list[int]] = {}
        for each in self.failed:
            seeds.setdefault((each.cell.arm, each.cell.task, str(each.error)), []).append(each.cell.seed)
        return [
            (f"{arm} on {task}, seed {', '.join(map(str, some))}", error) for (arm, task, error), some in seeds.items()
        ]

    @property
    def limits(self) -> list[str]:
        """What the result does not show."""
        found = list(self.experiment.limits)
        if self.scale is Scale.SMOKE:
            found.insert(0, "This is the smoke scale. It shows that everything runs; the numbers mean nothing.")
        elif min(self.seeds.values()) < ENOUGH_SEEDS:
            found.insert(0, f"With {self.seeds_told} seeds instead of at least {ENOUGH_SEEDS} this is exploratory.")
        return found

    @property
    def seeds_told(self) -> str:
        """How many, for people: one number, or one for each task."""
        counts = set(self.seeds.values())
        return str(*counts) if len(counts) == 1 else ", ".join(f"{task} {n}" for task, n in self.seeds.items())

    @property
    def mixed(self) -> list[str]:
        """The commits that cells were made at, if they are several or not all clean and known."""
        found = sorted({str(cell.made.get("commit")) for cell in self.cells if cell.error is None})
        return found if len(found) > 1 else []

    def summary(self) -> dict[str, Any]:
        """What is said, without the cells."""
        return {
            "experiment": self.experiment.name,
            "question": self.experiment.question,
            "scale": self.scale.value,
            "seeds": min(self.seeds.values(), default=0),
            "seeds_by_task": dict(self.seeds),
            "command": self.command,
            "findings": [{"text": finding.text, "clear": finding.clear} for finding in self.report.findings],
            "tables": [table.to_json() for table in self.report.tables],
            "figures": {figure.name: figure.caption for figure in self.report.figures},
            "limits": self.limits,
            "cells_total": len(self.cells),
            "cells_failed": [
                {"arm": each.cell.arm, "task": each.cell.task, "seed": each.cell.seed, "error": each.error}
                for each in self.failed
            ],
            "cell_commits": sorted({str(cell.made.get("commit")) for cell in self.cells if cell.error is None}),
            **self.made,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything: the summary, each arm's resolved recipe on each task, and every cell's figures."""
        recipes: dict[str, Any] = {}
        for each in self.cells:
            recipe = each.cell.recipe.model_dump(mode="json")
            del recipe["seed"]  # stands with the cell
            recipes.setdefault(each.cell.task, {}).setdefault(each.cell.arm, recipe)
        return {
            **self.summary(),
            "options": dict(self.plan.options),
            "recipes": recipes,
            "cells": [each.to_json() for each in self.cells],
        }

    def notes(self) -> dict[str, Mapping[str, Any]]:
        """What is no figure, by the cell's hash: of each arm's first seed on a task, which is the one that reports
        show."""
        first: dict[tuple[str, str], CellResult] = {}
        for each in self.cells:
            if each.notes:
                first.setdefault((each.cell.arm, each.cell.task), each)
        return {each.cell.digest: each.notes for each in first.values()}


def carry_out_experiment(
    experiment: Experiment,
    scale: Scale,
    out: Path,
    seeds: int | None = None,
    jobs: int = 1,
    reporter: ScheduleReporter | None = None,
    tasks: Sequence[str] = (),
    done_only: bool = False,
) -> Result:
    """Do what is not yet done of an experiment and write what it says.

    A `result.json` in the folder counts as its cells do, with the `notes.json` beside it if there is one: what it says
    of equal cells is not done again.

    Args:
        experiment: what.
        scale: how large.
        out: its folder; cells that it holds are not done again.
        seeds: instead of the plan's.
        jobs: processes at a time.
        reporter: receives progress.
        tasks: by name, some of the plan's; none means all.
        done_only: do nothing, and write what the cells that are done say; the others are named as not carried out.

    Raises:
        ConfigError: an arm does not fit, there is no such task, the folder is something else, or no cell is done that
            could be written about.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / CELLS).is_dir() and not (out / RESULT).is_file():
        raise ConfigError(f"{str(out)!r} is not empty and holds no experiment")
    plan = plan_of(experiment, scale, tasks)
    cells = cells_of(experiment, scale, seeds, tasks)
    unpack_cells(experiment.name, out)
    found = read_cells(cells, out) if done_only else run_cells(cells, out, jobs, reporter)
    if done_only and all(each.error is not None for each in found):
        raise ConfigError(f"{str(out)!r} holds no cell of {experiment.name} at scale {scale.value} that is done")
    words = ["preconcert", "experiment", experiment.name, "--scale", scale.value]
    words += [word for task in tasks for word in ("--task", task)]
    words += ["--seeds", str(seeds)] if seeds else []
    result = Result(
        experiment=experiment,
        scale=scale,
        plan=plan,
        seeds={task: seeds or count for task, count in seeds_of(plan).items()},
        cells=found,
        report=experiment.report(plan, found),
        command=shlex.join(words),
        made={
            "commit": commit(),
            "versions": versions(),
            "machine": machine(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    write_result(result, out)
    return result


def unpack_cells(name: str, out: Path) -> None:
    """Give every cell that OUT/result.json has figures of its folder again, where there is none.

    What a published result says of a cell need not be computed when the experiment goes on with more seeds, tasks or
    arms.

    Args:
        name: of the experiment.
        out: its folder.

    Raises:
        ConfigError: the file is no result of this experiment.
    """
    path = out / RESULT
    if not path.is_file():
        return
    notes = out / NOTES
    try:
        noted = json.loads(notes.read_text()) if notes.is_file() else {}
        content = json.loads(path.read_text())
        of = content["experiment"]
        cells = [each for each in content["cells"] if each["error"] is None]
        named = {each["digest"]: folder_name(each["task"], each["arm"], each["seed"], each["digest"]) for each in cells}
        kept = ("measures", "curves", "made")
        found = {
            each["digest"]: {**{key: each[key] for key in kept}, "notes": noted.get(each["digest"], {})}
            for each in cells
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{str(path)!r} is no result of an experiment: {type(error).__name__}: {error}") from error
    if of != name:
        raise ConfigError(f"{str(path)!r} is of the experiment {of!r}, not {name!r}")
    held = {file.parent.name.rpartition("-")[2] for file in (out / CELLS).glob(f"*/{FOUND}")}
    for digest in found.keys() - held:
        begun = sorted((out / CELLS).glob(f"*-{digest}"))
        folder = begun[0] if begun else out / CELLS / named[digest]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FOUND, found[digest])


def write_result(result: Result, out: Path) -> None:
    """All files."""
    (out / FIGURES).mkdir(parents=True, exist_ok=True)
    images: dict[str, bytes] = {}
    for figure in result.report.figures:
        images[figure.name] = png(figure.figure)
        (out / FIGURES / f"{figure.name}.png").write_bytes(images[figure.name])
    write_json(out / RESULT, result.to_json())
    notes = result.notes()
    if notes:
        beside = out / f"{NOTES}.new"
        beside.write_text(json.dumps(notes, separators=(",", ":")))
        os.replace(beside, out / NOTES)
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined, autoescape=True
    )
    html = templates.get_template("experiment.html.jinja").render(
        result=result,
        images={name: inlined(image) for name, image in images.items()},
        numbers=_numbers(result),
    )
    write_page(out / PAGE, html)


def _numbers(result: Result) -> list[tuple[str, str]]:
    """Label and text of each fact at the top of the page."""
    plan = result.plan
    done = [cell for cell in result.cells if cell.error is None]
    seconds = {cell.cell.digest: cell.made.get("wall_s", 0.0) for cell in done}
    return [
        ("scale", result.scale.value),
        ("arms", str(len(plan.arms))),
        ("tasks", ", ".join(task.name for task in plan.tasks)),
        ("seeds", result.seeds_told),
        ("cells", f"{len(done)} of {len(result.cells)}"),
        ("computing time", f"{sum(seconds.values()) / 3600:.2f} hours on one core each"),
    ]
