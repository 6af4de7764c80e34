"""Cells side by side: each in a process of its own, one thread each, those that are complete not again.

A cell that fails is recorded and the others go on. Stopping the schedule stops its processes; started again, complete
cells are read, begun ones go on from their checkpoints, and failed ones are tried once more.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from preconcert.core import ConfigError
from preconcert.envs import make_env
from preconcert.experiments.cell import FAILED, FOUND, OUTPUT, PROGRESS, write_spec
from preconcert.experiments.experiment import Cell, CellResult
from preconcert.training.json_file import write_json
from preconcert.training.run_folder import assign
from preconcert.training.warm_cache import WarmCache, warm_key

CELLS, WARM = "cells", "warm"
"""Folders of an experiment."""
_POLL_S = 0.2
_SECONDS_TO_STOP = 20.0
_TAIL_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Running:
    """A cell at work."""

    name: str
    stage: str
    done: int
    total: int


class ScheduleReporter(Protocol):
    """Receives progress of a schedule."""

    def update(self, done: int, failed: int, total: int, running: Sequence[Running]) -> None:
        """Called every now and then. `total` counts all cells, those that were complete beforehand included."""
        ...


def run_cells(
    cells: Sequence[Cell], out: Path, jobs: int, reporter: ScheduleReporter | None = None
) -> list[CellResult]:
    """Carry out all cells.

    Args:
        cells: in the order in which they should begin.
        out: the experiment's folder.
        jobs: processes at a time.
        reporter: receives progress.

    Returns:
        One result per cell, in order.
    """
    if jobs < 1:
        raise ConfigError(f"jobs = {jobs}: expected at least 1")
    folders = {cell.digest: _folder(cell, out) for cell in cells}
    unique = {cell.digest: cell for cell in reversed(cells)}
    pending = [unique[digest] for digest in dict.fromkeys(cell.digest for cell in cells)]
    total = len(pending)
    pending = [cell for cell in pending if not (folders[cell.digest] / FOUND).is_file()]
    done, failed = total - len(pending), 0
    keys = {cell.digest: _warm_key(cell) for cell in pending}
    cache = WarmCache(out / WARM)
    active: dict[str, subprocess.Popen[bytes]] = {}
    before = _stop_on_terminate()
    try:
        while pending or active:
            while pending and len(active) < jobs:
                making = {keys[digest] for digest in active if keys[digest] not in cache}
                # A cell that would only wait for another one's warm start lets others go first.
                cell = next((each for each in pending if keys[each.digest] not in making), pending[0])
                pending.remove(cell)
                active[cell.digest] = _start(cell, folders[cell.digest], out)
            time.sleep(_POLL_S)
            for digest, process in list(active.items()):
                if process.poll() is not None:
                    del active[digest]
                    if (folders[digest] / FOUND).is_file():
                        done += 1
                    else:
                        failed += 1
                        _record_death(folders[digest], process.returncode)
            if reporter is not None:
                reporter.update(done, failed, total, [_progress(folders[digest]) for digest in active])
    finally:
        _stop(list(active.values()))
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return [read_cell(cell, folders[cell.digest]) for cell in cells]


def read_cells(cells: Sequence[Cell], out: Path) -> list[CellResult]:
    """What an experiment's folder says of these cells, none of which is carried out."""
    return [read_cell(cell, _folder(cell, out)) for cell in cells]


def _stop_on_terminate() -> Any:
    """Let SIGTERM end this process by an exception, so that it takes its cells along; the handler there was before."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    return signal.signal(signal.SIGTERM, stop)


def read_cell(cell: Cell, folder: Path) -> CellResult:
    """What a cell's folder says."""
    if (folder / FOUND).is_file():
        held = json.loads((folder / FOUND).read_text())
        return CellResult(cell, held["measures"], held["curves"], None, held["made"], held.get("notes", {}))
    error = "not carried out"
    if (folder / FAILED).is_file():
        error = json.loads((folder / FAILED).read_text())["error"]
    return CellResult(cell, {}, {}, error, {})


def _folder(cell: Cell, out: Path) -> Path:
    """The folder of a cell; one with the same digest under another name is as good."""
    held = sorted((out / CELLS).glob(f"*-{cell.digest}"))
    return held[0] if held else out / CELLS / cell.name


def _warm_key(cell: Cell) -> str:
    recipe = cell.recipe
    assignment = assign(recipe, make_env(recipe.task, recipe.params, 0, "train"))
    return warm_key(recipe, next(iter(assignment.values())))


def _start(cell: Cell, folder: Path, out: Path) -> subprocess.Popen[bytes]:
    write_spec(cell, folder)
    (folder / FAILED).unlink(missing_ok=True)
    (folder / PROGRESS).unlink(missing_ok=True)
    command = [sys.executable, "-m", "preconcert.experiments.cell", str(folder), str(out / WARM)]
    with open(folder / OUTPUT, "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C is for the schedule, which stops its processes itself
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _record_death(folder: Path, code: int) -> None:
    """A process that could not say itself why it ended."""
    if not (folder / FAILED).is_file():
        how = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
        said = (folder / OUTPUT).read_text(errors="replace")[-_TAIL_CHARACTERS:]
        write_json(folder / FAILED, {"error": f"the process {how}; its last words: {' '.join(said.split())}"})


def _progress(folder: Path) -> Running:
    try:
        held = json.loads((folder / PROGRESS).read_text())
    except (OSError, ValueError):  # not there yet
        held = {"stage": "starting", "done": 0, "total": 0}
    return Running(folder.name, held["stage"], held["done"], held["total"])
