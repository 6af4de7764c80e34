"""Bars with intervals, one group per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.artist import Artist
from matplotlib.figure import Figure

from preconcert.experiments.figures import COLOURS
from preconcert.experiments.statistics import Estimate


def bars_figure(
    groups: Mapping[str, Sequence[tuple[str, Estimate | None]]], y_label: str, reference: str | None = None
) -> Figure:
    """One bar per arm with its interval, side by side within each group.

    Args:
        groups: by title, (arm, estimate) in the order of drawing; arms without an estimate leave a gap.
        y_label: of all groups.
        reference: an arm whose height is drawn through its group as a dashed line.
    """
    names = list(dict.fromkeys(name for bars in groups.values() for name, _ in bars))
    figure = Figure(figsize=(max(6.0, 3.6 * len(groups)), 4.2), layout="constrained")
    axes = figure.subplots(1, max(1, len(groups)), sharey=True, squeeze=False)[0]
    for axis, (title, bars) in zip(axes, groups.items(), strict=False):
        for place, (name, estimate) in enumerate(bars):
            if estimate is None:
                continue
            colour = COLOURS[names.index(name) % len(COLOURS)]
            axis.bar(place, estimate.value, width=0.78, color=colour, alpha=0.85, label=name)
            axis.plot([place, place], [estimate.low, estimate.high], color="#1d2129", lw=1.4)
            if name == reference:
                axis.axhline(estimate.value, color="#5f6673", lw=1, ls="--", zorder=0)
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        axis.grid(True, axis="y", color="#e5e3dc", lw=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel(y_label, fontsize=9)
    handles: dict[str, Artist] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            [handles[name] for name in names if name in handles],
            [name for name in names if name in handles],
            loc="outside lower center",
            ncols=3,
            frameon=False,
            fontsize=8,
        )
    return figure
