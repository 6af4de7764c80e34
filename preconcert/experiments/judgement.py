"""The work of most cells: train a team, play it on held-out instances, and condense its training log.

Parts: `train_and_judge` (the work), `judge` (held-out play: sampled, greedy, and with messages shuffled, everybody on
the same instances), `curves_of` and `course` (the log as curves against environment steps, and what they say).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from preconcert.agents import ChannelMode, ChannelSettings
from preconcert.experiments.cell import CellFound
from preconcert.experiments.evaluation import Players, heldout_specs, play
from preconcert.training.measures import measure
from preconcert.training.prediction import foretold, prediction_metrics
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter
from preconcert.training.run import train

SPIKE = 5.0
"""A gradient norm this many times the running median is a spike."""
SPIKE_WINDOW = 20
"""Updates in the running median."""
LAST = 5
"""Iterations that the end of a curve is averaged over."""
_KEPT = (
    "success", "return", "grad_norm", "gradient_norm/largest", "explained_variance", "entropy", "malformed",
    "hindsight_loss", "intention_accuracy", "prediction/accuracy", "prediction/top", "prediction/brier",
    "prediction/kept_word", "prediction/field_f1", "predictability/entropy_bits", "predictability/by_view",
    "predictability/by_own_view", "imagination/malformed", "imagination/return",
)  # fmt: skip


def train_and_judge(
    recipe: Recipe, folder: Path, options: Mapping[str, Any], warm_cache: Path, reporter: Reporter
) -> CellFound:
    """Train in FOLDER/run, going on with what is there, and judge.

    Args:
        recipe: of the run.
        folder: of the cell.
        options: `episodes`, how many held-out instances are played (the recipe's own number by default).
        warm_cache: shared warm starts.
        reporter: receives progress.
    """
    run = train(recipe, folder / "run", resume=True, reporter=reporter, warm_cache=warm_cache)
    curves = curves_of(read_log(run / "log.jsonl"), recipe)
    measures = {**judge(run, recipe, int(options.get("episodes", recipe.evaluation.episodes)), reporter)}
    measures |= course(curves)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # some MB each; the adapters stay
    return CellFound(measures, curves)


def judge(run: Path, recipe: Recipe, episodes: int, reporter: Reporter) -> dict[str, float | None]:
    """Success and return of a finished run's team on held-out instances that are the same for every cell."""
    players = Players(run, recipe)
    specs = heldout_specs(recipe, episodes, 0)
    channel = recipe.channel
    ways: dict[str, tuple[bool, ChannelSettings]] = {"sampled": (False, channel), "greedy": (True, channel)}
    talks = recipe.agent.spans.say and bool(players.env.language.message) and channel.mode is ChannelMode.ON
    if talks and episodes > 1:  # there must be somebody to swap messages with
        ways["shuffled"] = (False, channel.model_copy(update={"mode": ChannelMode.SHUFFLED}))
    found: dict[str, float | None] = {}
    for name, (greedy, over) in ways.items():
        reporter.stage(f"held-out play, {name}", episodes)
        team = players.team(greedy)
        team.keep_distributions = name == "sampled"
        played = play(specs, team, over, 0, reporter)
        measures = measure(played, players.env.language, recipe.agent.spans)
        found[f"success_{name}"] = measures.success_rate
        found[f"return_{name}"] = measures.return_mean
        if name == "sampled":
            found["malformed"] = measures.malformed_rate
            found["message_bits_per_turn"] = measures.message_bits_per_turn
            found["message_raw_bits_per_episode"] = measures.message_raw_bits_per_episode
            found |= {f"messages_{fate}": share for fate, share in measures.message_fates.items()}
            found["intention_accuracy"] = measures.intention_accuracy
            found["forecast_exact_match"] = measures.forecast_exact_match
            found |= prediction_metrics(played, foretold(played, players.env.language))
    return found


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; none for a run without reinforcement learning. A torn last line is left out."""
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def curves_of(log: Sequence[Mapping[str, Any]], recipe: Recipe) -> dict[str, list[float | None]]:
    """The log's figures per iteration. `env_steps`, `tokens` and `seconds` count from the beginning.

    Figures that a trainer logs per agent or adapter are kept if their name says `share`.
    """
    if not log:
        return {}
    episodes = recipe.grpo.seeds * recipe.grpo.group  # for logs that do not count their steps
    per_iteration = recipe.grpo.minibatches * recipe.grpo.epochs
    steps = np.cumsum([line.get("environment_steps", line["episode_steps"] * episodes) for line in log])
    tokens = np.cumsum([line["generated_tokens"] for line in log])
    seconds = np.cumsum([line.get("step_time", 0.0) * per_iteration for line in log])
    names = [*_KEPT, *sorted({key for line in log for key in line if "share" in key})]
    curves: dict[str, list[float | None]] = {
        "env_steps": [float(value) for value in steps],
        "tokens": [float(value) for value in tokens],
        "seconds": [round(float(value), 2) for value in seconds],
    }
    if any("imagination/policy_tokens" in line for line in log):
        written = ("imagination/policy_tokens", "imagination/world_tokens")
        imagined = np.cumsum([sum(line.get(name, 0.0) for name in written) for line in log])
        curves["imagined_tokens"] = [float(value) for value in imagined]
    for name in names:
        values = [line.get(name) for line in log]
        if any(value is not None for value in values):
            curves[name] = [None if value is None else float(f"{value:.6g}") for value in values]
    return curves


def course(curves: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
    """What the training curve says by itself."""
    if not curves:
        return {}
    success = [value for value in curves.get("success", ()) if value is not None]
    norms = [value for value in curves.get("gradient_norm/largest", ()) if value is not None]
    explained = [value for value in curves.get("explained_variance", ()) if value is not None]
    found: dict[str, float | None] = {
        "env_steps": curves["env_steps"][-1],
        "tokens": curves["tokens"][-1],
        "train_s": curves["seconds"][-1],
        "imagined_tokens": curves["imagined_tokens"][-1] if "imagined_tokens" in curves else None,
        "peak_minus_final": peak_minus_final(success),
        "spikes_per_100": 100 * spikes(norms) / len(norms) if norms else None,
        "explained_variance": float(np.mean(explained[-LAST:])) if explained else None,
    }
    for name, values in curves.items():
        present = [value for value in values if value is not None]
        if "share" in name and present:
            found[name] = float(np.mean(present))
    return found


def peak_minus_final(values: Sequence[float], width: int = LAST) -> float | None:
    """The highest running mean of a curve minus its last one."""
    if not values:
        return None
    width = min(width, len(values))
    means = np.convolve(values, np.ones(width) / width, mode="valid")
    return float(means.max() - means[-1])


def spikes(norms: Sequence[float], factor: float = SPIKE, window: int = SPIKE_WINDOW) -> int:
    """How many values exceed `factor` times the median of the up to `window` values before them (at least five)."""
    return sum(
        norms[index] > factor * float(np.median(norms[max(0, index - window) : index]))
        for index in range(5, len(norms))
    )


def at_budget(
    curves: Mapping[str, Sequence[float | None]], name: str, budget: float, width: int = LAST
) -> float | None:
    """A curve's mean over the last `width` iterations that were over when `budget` environment steps were played."""
    steps = curves.get("env_steps", ())
    values = [
        value
        for step, value in zip(steps, curves.get(name, [None] * len(steps)), strict=True)
        if value is not None and step is not None and step <= budget
    ]
    return float(np.mean(values[-width:])) if values else None
