"""Learning curves: a run's log as lines, drawn as SVG that takes its colours from the page around it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

SHOWN = {
    "success": "success",
    "intention_accuracy": "intention accuracy",
    "forecast_exact_match": "forecast exact match",
}
"""Keys of the log to what the page calls them, in the order of their colours."""


@dataclass(frozen=True, slots=True)
class Line:
    """One quantity over the iterations."""

    key: str
    label: str
    points: tuple[tuple[int, float], ...]
    """Iteration from 1, and value."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Lines between 0 and 1."""

    lines: tuple[Line, ...]
    ceiling: float | None
    """Drawn dashed: what no team without messages can exceed."""

    def svg(self, width: int = 760, height: int = 280) -> Markup:
        """The drawing. Lines have the classes `line-0`, `line-1`, ...; the page gives them colours."""
        left, right, top, bottom = 54, 14, 14, 42
        most = max((x for line in self.lines for x, _ in line.points), default=1)
        span = max(1, most - 1)

        def at(x: float, y: float) -> tuple[float, float]:
            return left + (x - 1) / span * (width - left - right), top + (1 - y) * (height - top - bottom)

        parts: list[str] = []
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            _, y = at(1, tick)
            parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for tick in ticks(most):
            x, y = at(tick, 0)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle">{tick}</text>')
        parts.append(
            f'<text class="tick" x="{(left + width - right) / 2:.1f}" y="{height - 3}" text-anchor="middle">'
            "iteration</text>"
        )
        if self.ceiling is not None:
            _, y = at(1, self.ceiling)
            parts.append(f'<line class="ceiling" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text class="tick strong" x="{width - right}" y="{y - 6:.1f}" text-anchor="end">'
                f"the most success without messages: {self.ceiling:.2f}</text>"
            )
        for number, line in reversed(list(enumerate(self.lines))):
            places = [(*at(x, y), x, y) for x, y in line.points]
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in places)
            parts.append(f'<polyline class="line line-{number}" points="{path}"/>')
            parts += [
                f'<circle class="dot line-{number}" cx="{px:.1f}" cy="{py:.1f}" r="{3 if len(places) == 1 else 5}">'
                f"<title>{escape(line.label)} {y:.2f}, iteration {x}</title></circle>"
                for px, py, x, y in places
            ]
        return Markup(
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Learning curve">{"".join(parts)}</svg>'
        )


def read_curve(log: Path, ceiling: float | None) -> Curve | None:
    """The curve of a run's log.jsonl; None where nothing was logged. A torn last line is left out."""
    if not log.is_file():
        return None
    entries: list[dict[str, float]] = []
    for text in log.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(text))
        except ValueError:
            continue
    return curve_of(entries, ceiling)


def curve_of(entries: Sequence[dict[str, float]], ceiling: float | None) -> Curve | None:
    """The curve of log entries."""
    lines: list[Line] = []
    for key, label in SHOWN.items():
        points = tuple((int(each["iteration"]) + 1, float(each[key])) for each in entries if key in each)
        if points:
            lines.append(Line(key, label, points))
    return Curve(tuple(lines), ceiling) if lines else None


def ticks(most: int) -> list[int]:
    """At most eight round iteration numbers from 1 to `most`."""
    step = next(size * 10**power for power in range(9) for size in (1, 2, 5) if most <= 7 * size * 10**power)
    return sorted({1, *range(step, most + 1, step)} if step > 1 else set(range(1, most + 1)))
