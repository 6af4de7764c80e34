"""What a run's log says about its training: figures that give trouble away, and one page that draws them.

Parts: `diagnose` (log entries to figures), `panels_of` (what is drawn) and `diagnostics_page`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from preconcert.core import ConfigError
from preconcert.experiments.figures import COLOURS, inlined, png
from preconcert.experiments.judgement import peak_minus_final, spikes

PANELS: Sequence[tuple[str, Sequence[str]]] = (
    ("how it plays", ("success", "return")),
    ("predictions", ("intention_accuracy", "forecast_exact_match", "malformed")),
    (
        "predictions: how true",
        ("prediction/brier", "prediction/top", "prediction/kept_word", "prediction/field_f1"),
    ),
    (
        "how predictable agents are",
        ("predictability/copy_last", "predictability/by_view", "predictability/by_own_view"),
    ),
    ("imagined games", ("imagination/return", "imagination/ended", "imagination/malformed")),
    ("messages, bits per turn", ("message_bits_per_turn",)),
    ("entropy, nats per token", ("entropy",)),
    ("KL to the sampler, nats per token", ("approx_kl", "kl")),
    ("clipped ratios, share of tokens", ("clip_ratio/low_mean", "clip_ratio/high_mean")),
    ("largest gradient norm", ("gradient_norm/largest",)),
    ("share of the squared gradient", ("gradient_share/",)),
    ("tokens trained", ("trained_tokens/",)),
    ("critic: explained variance", ("explained_variance",)),
    ("losses", ("loss", "hindsight_loss", "value_loss")),
    ("sampler against trainer", ("sampler_mismatch",)),
    ("skipped steps", ("skipped_steps",)),
    ("seconds", ("rollout_s", "values_s", "credit_s", "rows_s", "imagination_s")),
)
"""Title and log keys of every panel; a key that ends in a slash stands for all that begin with it."""

Log = Sequence[Mapping[str, Any]]


def read_log(run: Path) -> list[dict[str, Any]]:
    """The entries of a run's log.jsonl; a torn last line is left out.

    Raises:
        ConfigError: the run has none.
    """
    file = run / "log.jsonl"
    entries: list[dict[str, Any]] = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
    if not entries:
        raise ConfigError(f"{str(run)!r} has no training log: reinforcement learning has not begun")
    return entries


def diagnose(log: Log) -> dict[str, Any]:
    """Figures that give trouble away; None where the log does not hold what they need.

    `gradient_spikes` counts iterations whose largest gradient exceeds five times the running median; `peak_minus_final`
    is the highest running mean of success (of the return where there is no success) minus the last one; shares are
    means over the run, other figures are those of the last iterations.
    """
    norms = _column(log, "gradient_norm/largest") or _column(log, "grad_norm")
    course = _column(log, "success") or _column(log, "return")
    return {
        "iterations": len(log),
        "environment_steps": sum(_column(log, "environment_steps")) or None,
        "generated_tokens": sum(_column(log, "generated_tokens")) or None,
        "success": _last(log, "success"),
        "return": _last(log, "return"),
        "prediction": {key.split("/", 1)[1]: _last(log, key) for key in _keys(log, "prediction/")},
        "predictability": {key.split("/", 1)[1]: _last(log, key) for key in _keys(log, "predictability/")},
        "imagined_malformed": _last(log, "imagination/malformed"),
        "peak_minus_final": peak_minus_final(course),
        "gradient_norm": _last(log, "gradient_norm/largest"),
        "gradient_spikes": spikes(norms) if norms else None,
        "gradient_share": {
            key.split("/", 1)[1]: float(np.mean(_column(log, key))) for key in _keys(log, "gradient_share/")
        },
        "clip_fraction": _last(log, "clip_ratio/region_mean"),
        "approx_kl": _last(log, "approx_kl"),
        "entropy": _last(log, "entropy"),
        "entropy_first": _first(log, "entropy"),
        "sampler_mismatch": max(_column(log, "sampler_mismatch"), default=None),
        "skipped_steps": float(np.mean(skipped)) if (skipped := _column(log, "skipped_steps")) else None,
        "explained_variance": _last(log, "explained_variance"),
        "trained_tokens": {key.split("/", 1)[1]: sum(_column(log, key)) for key in _keys(log, "trained_tokens/")},
    }


def panels_of(log: Log) -> list[tuple[str, dict[str, tuple[list[int], list[float]]]]]:
    """Title, and (iterations from 1, values) by label, of every panel that has something to draw."""
    found: list[tuple[str, dict[str, tuple[list[int], list[float]]]]] = []
    for title, wanted in PANELS:
        lines: dict[str, tuple[list[int], list[float]]] = {}
        for pattern in wanted:
            for key in _keys(log, pattern) if pattern.endswith("/") else [pattern]:
                points = [(int(entry["iteration"]) + 1, float(entry[key])) for entry in log if _number(entry, key)]
                if points:
                    lines[key.removeprefix(pattern) or key] = ([x for x, _ in points], [y for _, y in points])
        if lines:
            found.append((title, lines))
    return found


def diagnostics_figure(log: Log) -> Figure:
    """Small multiples over the iterations."""
    panels = panels_of(log)
    columns = 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(12.5, 0.3 + 2.35 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, lines) in zip(axes, panels, strict=False):
        for number, (label, (x, y)) in enumerate(lines.items()):
            axis.plot(x, y, color=COLOURS[number % len(COLOURS)], linewidth=1.4, label=label)
        axis.set_title(title, fontsize=9.5, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", color="#e5e3dc", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axis.legend(fontsize=7.5, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure


def diagnostics_page(name: str, facts: Sequence[tuple[str, str]], log: Log) -> str:
    """One HTML file that loads nothing."""
    folder = Path(__file__).parent / "templates"
    environment = Environment(loader=FileSystemLoader(folder), undefined=StrictUndefined, autoescape=True)
    image = inlined(png(diagnostics_figure(log)))
    template = environment.get_template("diagnostics.html.jinja")
    return template.render(name=name, facts=facts, figures=said(diagnose(log)), image=image)


def said(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures as people read them."""
    rows: list[tuple[str, str]] = []
    for key, value in found.items():
        if isinstance(value, Mapping):
            rows += [(f"{_words(key)}, {name}", _number_text(each)) for name, each in value.items()]
        elif value is not None:
            rows.append((_words(key), _number_text(value)))
    return rows


def _words(key: str) -> str:
    return {"approx_kl": "approximate KL", "entropy_first": "entropy at first"}.get(key, key.replace("_", " "))


def _number_text(value: float) -> str:
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 else f"{value:.3g}"


def _number(entry: Mapping[str, Any], key: str) -> bool:
    return isinstance(entry.get(key), int | float) and np.isfinite(entry[key])


def _column(log: Log, key: str) -> list[float]:
    return [float(entry[key]) for entry in log if _number(entry, key)]


def _keys(log: Log, prefix: str) -> list[str]:
    return sorted({key for entry in log for key in entry if key.startswith(prefix)})


def _last(log: Log, key: str, width: int = 5) -> float | None:
    values = _column(log, key)[-width:]
    return float(np.mean(values)) if values else None


def _first(log: Log, key: str) -> float | None:
    values = _column(log, key)
    return values[0] if values else None
