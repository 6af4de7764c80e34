"""Work of cells that takes no time, as `cell.py` imports it in processes of its own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preconcert.core import TrainingError
from preconcert.experiments.cell import CellFound
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter


def work(
    recipe: Recipe, folder: Path, options: Mapping[str, Any], warm_cache: Path, reporter: Reporter
) -> CellFound:
    """Counts its calls in a file; `grpo.epochs` says how it ends."""
    with open(folder / "calls.txt", "a") as file:
        file.write("called\n")
    reporter.stage("thinking", 1)
    match recipe.grpo.epochs:
        case 3:
            raise TrainingError("three\npasses are too many")
        case 4:
            print("about to go", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        case 5:
            time.sleep(60)
    measures = {"seed": float(recipe.seed), "gone": float("nan")}
    return CellFound(measures, {"x": [1.0, float("inf")]}, {"words": ["a", "b"]})


def report(plan: Any, cells: Any) -> Any:
    """Nothing to say."""
    from preconcert.experiments.report import Report

    return Report([], [], [])
