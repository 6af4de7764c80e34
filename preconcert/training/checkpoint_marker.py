"""Checkpoints that are known to be whole: a marker is written last, and only what has one is gone on with."""

from __future__ import annotations

import json
import os
from pathlib import Path

MARKER = "complete.json"
"""Last file written into a checkpoint."""


def write_marker(folder: Path, step: int, iteration: int) -> None:
    """Declare a checkpoint folder complete."""
    beside = folder / (MARKER + ".new")
    beside.write_text(json.dumps({"step": step, "iteration": iteration}))
    with open(beside) as file:
        os.fsync(file.fileno())
    os.replace(beside, folder / MARKER)


def latest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint of a run and the iteration to go on with; None where there is none."""
    found: list[tuple[int, int, Path]] = []
    for marker in folder.glob(f"checkpoint-*/{MARKER}"):
        content = json.loads(marker.read_text())
        found.append((content["step"], content["iteration"], marker.parent))
    if not found:
        return None
    _, iteration, path = max(found)
    return path, iteration
