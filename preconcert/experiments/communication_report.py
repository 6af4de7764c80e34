"""How experiment `communication` is read: success and bits by arm, controls, targets, the front, and what is said."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from preconcert.experiments.experiment import CellResult, Plan
from preconcert.experiments.figures import COLOURS, legend_columns, look
from preconcert.experiments.readings import SIGNIFICANT, Contrast, Readings, comparisons_table, measure_named
from preconcert.experiments.report import Entry, Finding, Report, ReportFigure, ReportTable
from preconcert.experiments.statistics import Estimate, compare, holm, mean

NONE, RAW, ORACLE, FREE = "none", "raw-state", "oracle", "latent-free"
LEARNED, LOOSE = "learned", "learned-loose"
"""Words that are learned under a tight cap and under a loose one."""
PATH = "latent-path"
"""Vectors whose senders learn by the gradient through their receivers, where others learn by the score function."""
HEAVY = "heavy-speech"
"""A control and no candidate for the best learned arm."""
_SUCCESS = measure_named("success_on")
_CONTROLS = ("shuffled", "constant", "random", "off")
MARGIN, QUARTER, LOSS = 0.03, 0.25, 0.20
"""Targets: how far below the observation in words a learned arm may be, at which share of its bits, and what shuffling
must cost, relative."""
NEAR_CAP = 0.05
"""Target: how far above its cap a message may be at the end of training, relative."""
_PERPLEXITY = 30


def learned_arms(plan: Plan) -> list[str]:
    """Arms whose messages are learned."""
    return [arm.name for arm in plan.arms if arm.name in (LEARNED, LOOSE, *latent_arms(plan))]


def latent_arms(plan: Plan) -> list[str]:
    """Arms with vectors that are learned."""
    return [arm.name for arm in plan.arms if arm.name.startswith("latent-") and arm.name != FREE]


def contrasts(plan: Plan) -> list[Contrast]:
    """Every comparison that is made; fixed by the plan."""
    titles = {arm.name: arm.title for arm in plan.arms}
    pairs = [(arm.name, NONE) for arm in plan.arms if arm.name not in (NONE, ORACLE)]
    pairs += [(name, RAW) for name in learned_arms(plan)]
    pairs += [("latent-2", FREE), ("latent-2", HEAVY), (PATH, "latent-2")]
    return [
        Contrast(first, second, f"{titles[first]} – {titles[second]}")
        for first, second in pairs
        if first in titles and second in titles
    ]


def report(plan: Plan, cells: Sequence[CellResult]) -> Report:
    """Tables per task, targets, planned comparisons, the front of success and bits, caps, and what was said."""
    readings = Readings(cells)
    table, said = comparisons_table(readings, contrasts(plan), _SUCCESS, "held-out success")
    tasks = [task.name for task in plan.tasks]
    tables = [_successes(plan, readings, task) for task in tasks]
    tables += [_controls(plan, readings, task) for task in tasks]
    tables += [table] if table.rows else []
    tables += [found for task in tasks if (found := _words(readings, task, LEARNED)) is not None]
    figures = [
        ReportFigure(
            "front",
            "Held-out success against bits per episode (without a model), interquartile means over seeds with 95% "
            "bootstrap intervals of success. The line joins the arms that no other beats in both: the Pareto front. "
            "Dashed: no messages; dotted: the oracle.",
            _front(plan, readings, tasks),
        ),
        ReportFigure(
            "caps",
            "Success where the channel cuts messages to so many bits. Teams were trained without that cut.",
            _caps(plan, readings, tasks),
        ),
    ]
    figures += [
        ReportFigure(
            f"messages-{name}",
            "Messages of the first seed, coloured by what they are about: t-SNE with perplexity 30, and PCA beside it. "
            "An illustration, no measure.",
            drawn,
        )
        for name in learned_arms(plan)
        if (drawn := _projections(readings, tasks, name)) is not None
    ]
    return Report([_first_sentence(plan, readings, tasks), *_targets(plan, readings, tasks), *said], tables, figures)


def _successes(plan: Plan, readings: Readings, task: str) -> ReportTable:
    rows: list[tuple[Entry, ...]] = []
    for arm in plan.arms:
        failed = readings.failed(arm.name, task)
        if not readings.of(arm.name, task) and not failed:
            continue
        count = f"{len(readings.of(arm.name, task))}" + (f" ({failed} failed)" if failed else "")
        names = ("bits_raw", "bits_coded", "bits_own", "words_per_message")
        rows.append(
            (
                arm.title,
                count,
                readings.estimate(arm.name, _SUCCESS, task),
                readings.estimate(arm.name, measure_named("success_greedy"), task),
                readings.estimate(arm.name, measure_named("success_warm"), task),
                *(readings.estimate(arm.name, measure_named(name), task, mean) for name in names),
                readings.estimate(arm.name, measure_named("area"), task),
            )
        )
    return ReportTable(
        f"success-{task}",
        f"{task}: success and what it takes",
        (
            "arm", "seeds", "success, sampled", "greedy", "before RL", "bits per episode, raw", "entropy-coded",
            "under the sender's own model", "words or vectors per message", "success–bits area",
        ),
        tuple(rows),
        "Success: interquartile mean over seeds (95% stratified bootstrap interval); bits: means, all agents together. "
        "Raw: log2 of what could have stood there; for quantised vectors log2 of their levels, for others 32 per "
        "number. Entropy-coded: what was really sent under a prior counted on training instances, every message "
        "decoded again; none for numbers that are not quantised. Under the sender's own model: no honest length, as "
        "the receiver does not know what the sender saw. Area: under success against log2(1 + bits per message) over "
        "the caps of the figure.",
    )  # fmt: skip


def _controls(plan: Plan, readings: Readings, task: str) -> ReportTable:
    rows: list[tuple[Entry, ...]] = []
    for arm in plan.arms:
        if arm.name in (NONE, ORACLE) or not readings.of(arm.name, task):
            continue
        lost = _relative_loss(readings, arm.name, task)
        rows.append(
            (
                arm.title,
                readings.estimate(arm.name, _SUCCESS, task),
                *(readings.estimate(arm.name, measure_named(f"success_{name}"), task) for name in _CONTROLS),
                lost,
            )
        )
    return ReportTable(
        f"controls-{task}",
        f"{task}: the same teams with other messages",
        ("arm", "as sent", *_CONTROLS, "share of success that shuffling costs"),
        tuple(rows),
        "Shuffled: another instance's message from the same sender. Constant: one message throughout. Random: drawn "
        "evenly from all that could be said. Off: nothing arrives.",
    )


def _relative_loss(readings: Readings, arm: str, task: str) -> Estimate | None:
    """What shuffling costs, as a share of success."""

    def read(cell: CellResult) -> float | None:
        plain, shuffled = cell.measures.get("success_on"), cell.measures.get("success_shuffled")
        if plain is None or shuffled is None:
            return None
        return 1.0 - shuffled / plain if plain > 0 else 0.0  # a team that always fails loses nothing

    return readings.estimate(arm, read, task)


def _first_sentence(plan: Plan, readings: Readings, tasks: Sequence[str]) -> Finding:
    """Do vectors cost more bits than words?"""
    parts: list[str] = []
    for task in tasks:
        said = _best(plan, readings, task, (LEARNED, LOOSE))
        best = _best(plan, readings, task, latent_arms(plan))
        if said is None or best is None:
            continue
        words = readings.estimate(said, measure_named("bits_raw"), task, mean)
        assert words is not None
        vectors = readings.estimate(best, measure_named("bits_raw"), task, mean)
        assert vectors is not None
        more = "more" if vectors.value > words.value else "no more"
        parts.append(f"{task} {more} ({vectors.value:.0f} against {words.value:.0f} bits per episode)")
    text = "Latent messages against learned words, each at its best: " + "; ".join(parts) + "." if parts else (
        "Latent messages and learned words could not be compared."
    )
    return Finding(text, bool(parts))


def _best(plan: Plan, readings: Readings, task: str, names: Sequence[str]) -> str | None:
    """The arm with the fewest bits among those within the margin of the best of them."""
    found = {
        name: (success.value, bits.value)
        for name in names
        if (success := readings.estimate(name, _SUCCESS, task)) is not None
        and (bits := readings.estimate(name, measure_named("bits_raw"), task, mean)) is not None
    }
    if not found:
        return None
    top = max(success for success, _ in found.values())
    close = {name: bits for name, (success, bits) in found.items() if success >= top - MARGIN}
    return min(close, key=lambda name: close[name])


def _targets(plan: Plan, readings: Readings, tasks: Sequence[str]) -> list[Finding]:
    found: list[Finding] = []
    for task in tasks:
        found += [_near(plan, readings, task), _clear(plan, readings, task), _causal(plan, readings, task)]
    return [*found, *_caps_met(readings, tasks), _improved(plan, readings, tasks)]


def _short(readings: Readings, arm: str, task: str) -> str:
    """Says where seeds of an arm are missing."""
    failed = readings.failed(arm, task)
    return f", {failed} seeds failed" if failed else ""


def _near(plan: Plan, readings: Readings, task: str) -> Finding:
    """A learned arm close to the observation in words, at a quarter of its bits."""
    target = (
        f"{task}. Target: a learned arm within {100 * MARGIN:.0f} points of the observation in words at a quarter of "
        "its bits. "
    )
    raw = readings.estimate(RAW, _SUCCESS, task)
    raw_bits = readings.estimate(RAW, measure_named("bits_raw"), task, mean)
    if raw is None or raw_bits is None or not raw_bits.value:
        return Finding(f"{target}Not judged: no figures of that observation{_short(readings, RAW, task)}.", False)
    good, sure = list[str](), list[str]()
    dear: list[tuple[float, str]] = []
    for name in learned_arms(plan):
        compared = readings.compare(name, RAW, _SUCCESS, task)
        success = readings.estimate(name, _SUCCESS, task)
        bits = readings.estimate(name, measure_named("bits_raw"), task, mean)
        if success is None or bits is None or compared is None or success.value < raw.value - MARGIN:
            continue
        said = f"{name} ({success.value:.2f} with {bits.value:.0f} bits{_short(readings, name, task)})"
        share = bits.value / raw_bits.value
        if share > QUARTER:
            dear.append((share, said))
            continue
        good.append(said)
        sure += [name] if compared.difference.low >= -MARGIN and compared.difference.count > 1 else []
    nearest = f"none; as good, and cheapest: {min(dear)[1]}, {min(dear)[0]:.3f} of the bits" if dear else "none"
    what = "; ".join(good) if good else nearest
    surely = f" With the whole interval of the paired difference: {', '.join(sure) or 'none'}."
    heard = readings.compare(RAW, NONE, _SUCCESS, task)
    low = heard is not None and heard.difference.low <= 0
    return Finding(
        f"{target}{'Met' if good else 'Not met'}: {what}, against {raw.value:.2f} with {raw_bits.value:.0f} bits."
        + (surely if good else "")
        + (" The observation is not clearly better than silence here, which makes this a low bar." if low else ""),
        bool(good),
    )


def _clear(plan: Plan, readings: Readings, task: str) -> Finding:
    """The observation in words and a learned arm, both better than silence."""
    none = readings.estimate(NONE, _SUCCESS, task)
    target = f"{task}. Target: the observation in words and a learned arm clear above no messages. "
    if none is None:
        return Finding(f"{target}Not judged: no figures of no messages{_short(readings, NONE, task)}.", False)
    above = [
        name
        for name in (RAW, *learned_arms(plan))
        if (value := readings.estimate(name, _SUCCESS, task)) is not None and value.count > 1 and value.low > none.high
    ]
    met = RAW in above and len(above) > 1
    return Finding(
        f"{target}{'Met' if met else 'Not met'}: above {none.value:.2f} ({none.low:.2f} to {none.high:.2f}) with the "
        f"whole interval: {', '.join(above) or 'none'}.",
        met,
    )


def _causal(plan: Plan, readings: Readings, task: str) -> Finding:
    """What shuffling costs."""
    here = [arm.name for arm in plan.arms if not arm.tasks or task in arm.tasks]
    losses = {name: _relative_loss(readings, name, task) for name in (RAW, *learned_arms(plan)) if name in here}
    weak = [
        f"{name} ({'no value' if lost is None else f'{lost.value:.2f}'})"
        for name, lost in losses.items()
        if lost is None or lost.value < LOSS
    ]
    return Finding(
        f"{task}. Target: shuffling costs at least {100 * LOSS:.0f}% of success. "
        + (f"Not met by {', '.join(weak)}." if weak else "Met by every arm."),
        not weak,
    )


def _caps_met(readings: Readings, tasks: Sequence[str]) -> list[Finding]:
    """Learned words at the end of training, and their cap."""
    found: list[Finding] = []
    for task, name in itertools.product(tasks, (LEARNED, LOOSE)):
        cap = readings.estimate(name, measure_named("cap"), task, mean)
        ends = readings.values(name, measure_named("bits_at_end"), task).get(task, {})
        if cap is None or not ends:
            continue
        over = [seed for seed, bits in ends.items() if bits > (1 + NEAR_CAP) * cap.value]
        said = ", ".join(f"{bits:.2f}" for _, bits in sorted(ends.items()))
        found.append(
            Finding(
                f"{task}, {name}. Target: learned words meet their cap of {cap.value:g} bits per message within "
                f"{100 * NEAR_CAP:.0f}% at the end of training. {'Not met' if over else 'Met'}, by seed: {said}.",
                not over,
            )
        )
    return found


def _improved(plan: Plan, readings: Readings, tasks: Sequence[str]) -> Finding:
    """Vectors after reinforcement learning against their supervised start: by arm over all tasks, corrected together,
    and what each task shows."""
    started = measure_named("success_warm")
    arms = latent_arms(plan)
    pooled = {name: compare(readings.values(name, _SUCCESS), readings.values(name, started), 0) for name in arms}
    made = {name: found for name, found in pooled.items() if found is not None}
    adjusted = dict(zip(made, holm([found.p_value for found in made.values()]), strict=True))
    better = [name for name, found in made.items() if found.verdict == 1 and adjusted[name] < SIGNIFICANT]
    gains: list[str] = []
    for task in tasks:
        for name in arms:
            compared = compare(readings.values(name, _SUCCESS, task), readings.values(name, started, task), 0)
            if compared is not None:
                gain = compared.difference
                gains.append(f"{name} on {task} {gain.value:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})")
    said = f"{'Met' if better else 'Not met'}: over all tasks by {', '.join(better) or 'no arm'} after Holm"
    return Finding(
        "Target: reinforcement learning improves vectors over their supervised start on at least one task. "
        + (f"{said}; {'; '.join(gains)}." if gains else "Not judged: no figures."),
        bool(better),
    )


def axes_of(figure: Figure, count: int) -> Sequence[Any]:
    """So many axes side by side, with one scale upwards."""
    return figure.subplots(1, max(1, count), sharey=True, squeeze=False)[0]


def plain(axis: Any, title: str, x_label: str) -> None:
    """A grid, a title, and nothing that is not needed."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x_label, fontsize=9)
    axis.grid(True, color="#e5e3dc", lw=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def legend_of(figure: Figure, axes: Sequence[Any]) -> None:
    """One legend for all axes, below them."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=legend_columns(handles, figure.get_figwidth()),
            frameon=False,
            fontsize=8,
        )


def _front(plan: Plan, readings: Readings, tasks: Sequence[str]) -> Figure:
    figure = Figure(figsize=(max(8.4, 4.2 * len(tasks)), 5.2), layout="constrained")
    axes = axes_of(figure, len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        points: list[tuple[float, float]] = []
        for number, arm in enumerate(plan.arms):
            success = readings.estimate(arm.name, _SUCCESS, task)
            bits = readings.estimate(arm.name, measure_named("bits_raw"), task, mean)
            if success is None:
                continue
            if arm.name in (NONE, ORACLE):
                axis.axhline(success.value, color="#5f6673", lw=1, ls="--" if arm.name == NONE else ":")
                continue
            if bits is None:
                continue
            colour, mark = look(number)
            axis.plot([bits.value] * 2, [success.low, success.high], color=colour, lw=2, alpha=0.6)
            axis.plot([bits.value], [success.value], mark, color=colour, ms=6, label=arm.title)
            points.append((bits.value, success.value))
        front = pareto(points)
        axis.plot([x for x, _ in front], [y for _, y in front], color="#1d2129", lw=0.9, zorder=0)
        axis.set_xscale("log")
        plain(axis, task, "bits per episode")
    axes[0].set_ylabel("success", fontsize=9)
    legend_of(figure, axes)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of (bits, success) that no other beats in both, by bits."""
    front: list[tuple[float, float]] = []
    for bits, success in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or success > front[-1][1]:
            front.append((bits, success))
    return front


def _caps(plan: Plan, readings: Readings, tasks: Sequence[str]) -> Figure:
    caps = [float(cap) for cap in plan.options.get("caps", ())]
    figure = Figure(figsize=(max(8.4, 4.2 * len(tasks)), 5.0), layout="constrained")
    axes = axes_of(figure, len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        for number, arm in enumerate(plan.arms):
            found = [readings.estimate(arm.name, measure_named(f"success_cap_{cap:g}"), task) for cap in caps]
            if arm.name in (NONE, ORACLE) or any(each is None for each in found):
                continue
            values = [each.value for each in found if each is not None]
            colour, mark = look(number)
            axis.plot(range(len(caps)), values, color=colour, marker=mark, ms=4, lw=1.4, label=arm.title)
        axis.set_xticks(range(len(caps)), [f"{cap:g}" for cap in caps])
        plain(axis, task, "bits per message")
    axes[0].set_ylabel("success", fontsize=9)
    legend_of(figure, axes)
    return figure


def _notes(readings: Readings, arm: str, task: str) -> list[Mapping[str, Any]]:
    """Examples of the first seed that has any."""
    held = sorted(readings.of(arm, task), key=lambda each: each.cell.seed)
    return next((list(each.notes["messages"]) for each in held if each.notes.get("messages")), [])


def _words(readings: Readings, task: str, arm: str) -> ReportTable | None:
    """The commonest messages and what goes with them."""
    shown = _notes(readings, arm, task)
    if not shown:
        return None
    counts = Counter(each["words"] for each in shown)
    about: defaultdict[str, Counter[str]] = defaultdict(Counter)
    acts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for each in shown:
        about[each["words"]][each["about"] or "–"] += 1
        acts[each["words"]][each["action"]] += 1
    rows: list[tuple[Entry, ...]] = [
        (words or "(nothing)", count / len(shown), _most(about[words]), _most(acts[words]))
        for words, count in counts.most_common(12)
    ]
    return ReportTable(
        f"words-{task}",
        f"{task}: the commonest learned messages, first seed",
        ("message", "share", "what the sender sees", "what it does then"),
        tuple(rows),
        f"Of {len(shown)} messages drawn from held-out play.",
    )


def _most(counts: Counter[str]) -> str:
    total = counts.total()
    return ", ".join(f"{word} {100 * count / total:.0f}%" for word, count in counts.most_common(3))


def _projections(readings: Readings, tasks: Sequence[str], arm: str) -> Figure | None:
    shown = {task: held for task in tasks if len(held := _notes(readings, arm, task)) >= 40}
    if not shown:
        return None
    figure = Figure(figsize=(8.0, 0.6 + 3.4 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 2, squeeze=False)
    for axes, (task, messages) in zip(grid, shown.items(), strict=True):
        table = _vectors(messages)
        perplexity = min(_PERPLEXITY, (len(table) - 1) // 3)
        wide = table if table.shape[1] > 1 else np.pad(table, ((0, 0), (0, 1)))
        flat = {
            "t-SNE": TSNE(2, perplexity=perplexity, init="random", random_state=0).fit_transform(wide),
            "PCA": PCA(2, random_state=0).fit_transform(wide),
        }
        labels = sorted({each["about"] for each in messages})
        for axis, (name, places) in zip(axes, flat.items(), strict=True):
            for number, label in enumerate(labels):
                mine = np.array([each["about"] == label for each in messages])
                axis.scatter(
                    places[mine, 0], places[mine, 1], s=10, color=COLOURS[number % len(COLOURS)], label=label or "–"
                )
            plain(axis, f"{task}, {name}", "")
            axis.set_xticks([])
            axis.set_yticks([])
        axes[1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _vectors(messages: Sequence[Mapping[str, Any]]) -> np.ndarray[Any, Any]:
    """Numbers of latent messages as they are; words as a column for every word in every place. Equal messages are
    spread a little, so that t-SNE has distances to go by."""
    if any(each["numbers"] for each in messages):
        width = max(len(each["numbers"]) for each in messages)
        table = np.array([[*each["numbers"], *[0.0] * (width - len(each["numbers"]))] for each in messages])
    else:
        said = [tuple(enumerate(each["words"].split())) for each in messages]
        columns = {word: place for place, word in enumerate(sorted({word for words in said for word in words}))}
        table = np.zeros((len(messages), max(1, len(columns))))
        for row, words in enumerate(said):
            table[row, [columns[word] for word in words]] = 1.0
    return table + np.random.default_rng(0).normal(0.0, 0.03, table.shape)
