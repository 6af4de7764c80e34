"""One cell in a process of its own: `python -m preconcert.experiments.cell FOLDER WARM_CACHE`.

A cell's folder:

    spec.json       what to do: names, work, recipe, options
    progress.json   how far it is, for whoever waits
    run/            the run, as `preconcert train` leaves it, without its checkpoints once the cell is complete
    cell.json       what was found; written beside and renamed, so that it is there only when the cell is complete
    failed.json     why the last attempt failed; gone when the cell is complete
    output.txt      what the process printed

The work of a cell is a function `(recipe, folder, options, warm_cache, reporter) -> CellFound` that can be called again
on a folder that an interrupted call has left.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from preconcert.core import ConfigError
from preconcert.experiments.experiment import Cell
from preconcert.experiments.provenance import commit, versions
from preconcert.training.json_file import write_json
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter

SPEC, FOUND, FAILED, PROGRESS, OUTPUT = "spec.json", "cell.json", "failed.json", "progress.json", "output.txt"
_SECONDS_BETWEEN_NOTES = 1.0


@dataclass(frozen=True, slots=True)
class CellFound:
    """What the work of a cell returns."""

    measures: Mapping[str, float | None]
    curves: Mapping[str, Sequence[float | None]]
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What is no figure, as plain values."""


Work = Callable[[Recipe, Path, Mapping[str, Any], Path, Reporter], CellFound]


class FileReporter:
    """A `Reporter` that keeps a small file up to date."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stage, self._total = "", 0
        self._written = 0.0

    def stage(self, name: str, total: int) -> None:
        """A stage begins."""
        self._stage, self._total, self._written = name, total, 0.0
        self.advance(0)

    def advance(self, done: int, note: str = "") -> None:
        """Written at most once a second."""
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_NOTES:
            self._written = time.monotonic()
            beside = self.path.with_name(self.path.name + ".new")
            beside.write_text(json.dumps({"stage": self._stage, "done": done, "total": self._total, "note": note}))
            os.replace(beside, self.path)

    def say(self, text: str) -> None:
        """Into the process's output."""
        print(text, flush=True)


def write_spec(cell: Cell, folder: Path) -> None:
    """Make a cell's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = {
        "arm": cell.arm,
        "task": cell.task,
        "seed": cell.seed,
        "work": cell.work,
        "options": dict(cell.options),
        "recipe": cell.recipe.model_dump(mode="json"),
    }
    write_json(folder / SPEC, spec)


def work_of(reference: str) -> Work:
    """Import `module:function`.

    Raises:
        ConfigError: there is no such function.
    """
    module, _, name = reference.partition(":")
    found = getattr(importlib.import_module(module), name, None)
    if found is None:
        raise ConfigError(f"there is no function {name!r} in {module!r}")
    return found


def carry_out(folder: Path, warm_cache: Path) -> bool:
    """Do a cell's work, or go on with it. This is the boundary at which whatever a cell raises is recorded.

    Args:
        folder: holds spec.json.
        warm_cache: shared by all cells of an experiment.

    Returns:
        Is it complete?
    """
    with FileLock(folder / "cell.lock"):  # a process that outlived its parent may still be at it
        if (folder / FOUND).is_file():
            return True
        spec = json.loads((folder / SPEC).read_text())
        started, at = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
        reporter = FileReporter(folder / PROGRESS)
        try:
            found = work_of(spec["work"])(
                Recipe.model_validate(spec["recipe"]), folder, spec["options"], warm_cache, reporter
            )
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split())
            write_json(folder / FAILED, {"error": f"{type(error).__name__}: {text}", "at": at, "commit": commit()})
            return False
        content = {
            "measures": {name: finite(value) for name, value in found.measures.items()},
            "curves": {name: [finite(value) for value in values] for name, values in found.curves.items()},
            "made": {
                "commit": commit(),
                "versions": versions(),
                "at": at,
                "wall_s": round(time.perf_counter() - started, 2),
            },
            "notes": dict(found.notes),
        }
        write_json(folder / FOUND, content)
        (folder / FAILED).unlink(missing_ok=True)
        (folder / PROGRESS).unlink(missing_ok=True)
        return True


def finite(value: float | None) -> float | None:
    """JSON has no infinities; a figure that diverged is none."""
    return value if value is not None and math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(0 if carry_out(Path(sys.argv[1]), Path(sys.argv[2])) else 1)
