"""Drawings for reports: learning curves with bands, and intervals side by side. Files and pages get them as PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from preconcert.experiments.statistics import Estimate, iqm

COLOURS = ("#2f6fde", "#d9622b", "#1f8f6b", "#9b4fc4", "#b0830f", "#c23a6b", "#3a8ca8", "#6f7a1f", "#5f6673")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_POINTS = 60
"""Places along a curve at which seeds are put together."""
_DPI = 130


def look(number: int) -> tuple[str, str]:
    """Colour and mark of the n-th arm; the first 81 all differ."""
    return COLOURS[number % len(COLOURS)], MARKS[(number + number // len(COLOURS)) % len(MARKS)]


def legend_columns(names: Collection[str], width: float) -> int:
    """How many of these names fit beside one another in so many inches; 4 at the most."""
    return max(1, min(4, int(width / (0.6 + 0.07 * max(map(len, names), default=1)))))


Lines = Sequence[tuple[Sequence[float], Sequence[float]]]
"""One (x, y) per seed."""


def curves_figure(
    panels: Mapping[str, Mapping[str, Lines]], x_label: str, y_label: str, seed: int = 0, smooth: int = 5
) -> Figure:
    """Learning curves: per panel and arm the interquartile mean over seeds with its 95% bootstrap band.

    Args:
        panels: by title, then by arm.
        x_label: of all panels.
        y_label: of all panels.
        seed: of the resampling.
        smooth: each seed's curve is a running mean over this many iterations.
    """
    columns = min(2, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    names = list(dict.fromkeys(name for arms in panels.values() for name in arms))
    width = 5.0 * columns if columns > 1 else 6.4
    beside = legend_columns(names, width)
    below = -(-len(names) // beside)
    figure = Figure(figsize=(width, 0.4 + 0.2 * below + 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    axes = grid.flatten()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, arms) in zip(axes, panels.items(), strict=False):
        for name, lines in arms.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            _band(axis, [(x, running_mean(y, smooth)) for x, y in lines if len(x)], colour, name, seed)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(x_label, fontsize=9)
        _plain(axis)
    for axis in grid[:, 0]:
        axis.set_ylabel(y_label, fontsize=9)
    handles: dict[str, Artist] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=beside, frameon=False, fontsize=8
        )
    return figure


def intervals_figure(
    panels: Mapping[str, Sequence[tuple[str, Mapping[str, Estimate | None]]]], x_label: str, zero: bool = False
) -> Figure:
    """Estimates with their intervals, one row per arm, one colour per series.

    Args:
        panels: by title; rows of (arm, estimate by series).
        x_label: of all panels.
        zero: draw a line at 0, for differences.
    """
    rows = max((len(arms) for arms in panels.values()), default=1)
    figure = Figure(figsize=(max(6.0, 4.4 * len(panels)), 1.3 + 0.34 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, max(1, len(panels)), sharey=True))
    series = list(dict.fromkeys(key for arms in panels.values() for _, found in arms for key in found))
    for axis, (title, arms) in zip(axes, panels.items(), strict=True):
        for row, (_, found) in enumerate(arms):
            for number, key in enumerate(series):
                estimate = found.get(key)
                if estimate is None:
                    continue
                place = row + 0.5 * ((number + 0.5) / len(series) - 0.5)
                colour = COLOURS[number % len(COLOURS)]
                axis.plot([estimate.low, estimate.high], [place, place], color=colour, lw=2.2, alpha=0.6)
                mark = MARKS[number % len(MARKS)]
                label = key if not axis.get_legend_handles_labels()[1].count(key) else None
                axis.plot([estimate.value], [place], mark, color=colour, ms=5, label=label)
        if zero:
            axis.axvline(0, color="#5f6673", lw=1, ls="--")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(x_label)
        axis.set_yticks(range(len(arms)), [name for name, _ in arms])
        axis.set_ylim(len(arms) - 0.4, -0.6)
        _plain(axis)
    if len(series) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(series), frameon=False, fontsize=8)
    return figure


def png(figure: Figure) -> bytes:
    """A drawing as the bytes of a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def inlined(image: bytes) -> str:
    """A PNG as an address that a page can show without loading anything."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


def running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """The mean of up to `width` values that end at each place."""
    return np.array([np.mean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)])


def _band(axis: Axes, lines: Sequence[tuple[Sequence[float], np.ndarray]], colour: str, label: str, seed: int) -> None:
    """Only where every seed has a curve: beyond, the band would be of other seeds."""
    if not lines:
        return
    low, high = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    if high <= low:
        places = np.array([low])
    else:
        places = np.linspace(low, high, _POINTS)
    values = np.stack([np.interp(places, x, y) for x, y in lines], axis=-1)
    rng = np.random.default_rng(seed)
    drawn = iqm(values[:, rng.integers(len(lines), size=(500, len(lines)))])
    bottom, top = np.percentile(drawn, (2.5, 97.5), axis=1)
    axis.fill_between(places, bottom, top, color=colour, alpha=0.14, lw=0)
    axis.plot(places, iqm(values), color=colour, lw=1.8, label=label, marker="o" if len(places) == 1 else None)


def _plain(axis: Axes) -> None:
    axis.grid(True, color="#e5e3dc", lw=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def reliability_figure(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]], bins: int = 10
) -> Figure:
    """Reliability diagrams: how often a forecast was right against how certain it was.

    Args:
        panels: by title, then by arm, groups of forecasts: mean confidence, share that was right, how many.
        bins: of confidence, in which groups are put together; those with few forecasts are drawn small.
    """
    figure = Figure(figsize=(max(5.0, 3.6 * len(panels)), 4.2), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, max(1, len(panels)), sharey=True))
    names = list(dict.fromkeys(name for arms in panels.values() for name in arms))
    for axis, (title, arms) in zip(axes, panels.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="#5f6673", lw=1, ls="--")
        for name, points in arms.items():
            said, was, count = (np.array(column) for column in zip(*points, strict=True))
            which = np.minimum((said * bins).astype(int), bins - 1)
            held = [which == each for each in range(bins) if count[which == each].sum() > 0]
            number = names.index(name) % len(COLOURS)
            x, y, size = (
                [np.average(said[rows], weights=count[rows]) for rows in held],
                [np.average(was[rows], weights=count[rows]) for rows in held],
                [8 + 60 * count[rows].sum() / count.sum() for rows in held],
            )
            axis.plot(x, y, color=COLOURS[number], lw=1.2, alpha=0.7)
            axis.scatter(x, y, s=size, color=COLOURS[number], marker=MARKS[number % len(MARKS)], label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("certainty", fontsize=9)
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        _plain(axis)
    axes[0].set_ylabel("share that was right", fontsize=9)
    handles: dict[str, Artist] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=min(4, 2 * len(panels)),
            frameon=False, fontsize=8,
        )  # fmt: skip
    return figure
