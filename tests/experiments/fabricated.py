"""Cells that nobody trained, for tests of what is made of cells."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from preconcert.experiments.experiment import Cell, CellResult, Plan
from preconcert.training.recipe import Recipe

ITERATIONS = 30
MADE = {"commit": "0" * 40, "versions": {}, "at": "2026-01-01T00:00:00+00:00", "wall_s": 60.0}


def cell_of(arm: str, task: str, seed: int, success: float | None, final_steps: float = 3000.0) -> CellResult:
    """A cell whose held-out success and curve end at `success`; None makes it a failed one."""
    cell = Cell(arm, task, seed, "nowhere:nothing", Recipe(task="rendezvous", seed=seed), {"arm": arm, "task": task})
    if success is None:
        return CellResult(cell, {}, {}, "TrainingError: it <did> not work", {})
    rng = np.random.default_rng(seed)
    steps = np.linspace(final_steps / ITERATIONS, final_steps, ITERATIONS)
    curve = success * (1 - np.exp(-steps / 800)) + rng.normal(0, 0.03, ITERATIONS)
    measures: dict[str, float | None] = {
        "success_sampled": success, "success_greedy": success, "return_sampled": success, "return_greedy": success,
        "success_shuffled": success / 4, "spikes_per_100": 1.0, "peak_minus_final": 0.05, "explained_variance": None,
        "gradient_share/agent_0": 0.5, "env_steps": final_steps, "tokens": 9e5, "train_s": 60.0,
    }  # fmt: skip
    curves = {"env_steps": steps.tolist(), "success": curve.tolist()}
    if arm == "warm":
        return CellResult(cell, {key: measures[key] for key in measures if key[0] in "sr"}, {}, None, MADE)
    return CellResult(cell, measures, curves, None, MADE)


def cells_like(plan: Plan, success: Callable[[str, str, int], float | None], seeds: int = 5) -> list[CellResult]:
    """A cell for every arm, task and seed of a plan."""
    return [
        cell_of(arm.name, task.name, seed, success(arm.name, task.name, seed))
        for seed in range(seeds)
        for arm in plan.arms
        for task in plan.tasks
        if not arm.tasks or task.name in arm.tasks
    ]
