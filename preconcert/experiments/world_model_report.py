"""What the `world-model` experiment says: figures by model and horizon, planned comparisons, targets met or missed."""

from __future__ import annotations

from collections.abc import Sequence

from preconcert.experiments.experiment import CellResult, Plan
from preconcert.experiments.figures import curves_figure, reliability_figure
from preconcert.experiments.readings import SIGNIFICANT, Readings, measure_named
from preconcert.experiments.report import Entry, Finding, Report, ReportFigure, ReportTable
from preconcert.experiments.statistics import Comparison, Estimate, holm, mean, p_shown

SUBJECT = "token"
"""The arm that the targets are about."""
UNTOLD, WORDLESS = "token-untold", "token-wordless"
"""Token models whose prompts lack something."""
RECALLING = "token-recalling"
"""The token model whose prompts show earlier moments."""
SHUFFLED, TABLE = "shuffled", "count-table"
RIVALS = ("copy-last", "recurrent")
MODES = {"a": "true joint actions given", "b": "teammates imagined"}
FIGURES = (
    ("mse", "MSE"), ("exact", "view exact"), ("field_exact", "field exact"), ("determined", "determined fields exact"),
    ("nll", "NLL (nats)"), ("reward_error", "reward error"), ("auroc", "end AUROC"), ("mate_accuracy", "mates, top 1"),
    ("mate_ce", "mates, CE"), ("mate_brier", "mates, Brier"), ("mate_ece", "mates, ECE"), ("malformed", "malformed"),
    ("ended_early", "ended early"),
)  # fmt: skip
EXACT_TARGET, CONSISTENT = 0.99, (0.9, 1 / 0.9)
LONG = (5, 10, 20)
"""Horizons at which the subject must have the lower error."""


def report(plan: Plan, cells: Sequence[CellResult]) -> Report:
    """Tables per task and mode, the targets, and drawings."""
    readings = Readings(cells)
    compared, verdicts = _comparisons(plan, readings)
    tables = [compared] if compared.rows else []
    for task in plan.tasks:
        tables += [_by_horizon(plan, readings, task.name, mode) for mode in MODES]
        tables.append(_whole(plan, readings, task.name))
    findings = [*_exactness(plan, readings), *verdicts, *_consistency(plan, readings), *_gaps(plan, readings)]
    figures = [
        _curves(plan, readings, "mse", "mean squared error of the view's fields"),
        _curves(plan, readings, "exact", "share of views that are right in all fields"),
        _reliability(plan, readings),
    ]
    return Report(findings, tables, [figure for figure in figures if figure is not None])


def horizons_of(plan: Plan) -> tuple[int, ...]:
    """Where models are measured."""
    return tuple(plan.options["horizons"])


def _by_horizon(plan: Plan, readings: Readings, task: str, mode: str) -> ReportTable:
    rows: list[tuple[Entry, ...]] = []
    for arm in plan.arms:
        for h in horizons_of(plan):
            found = [readings.estimate(arm.name, measure_named(f"{name}_{mode}_{h}"), task) for name, _ in FIGURES]
            if any(entry is not None for entry in found):
                rows.append((arm.title, h, *found))
    return ReportTable(
        f"fidelity-{task}-{mode}",
        f"{task}, {MODES[mode]}",
        ("model", "steps", *(title for _, title in FIGURES)),
        tuple(rows),
        "Interquartile mean over seeds (95% bootstrap interval) on held-out layouts, from real moments on, every step "
        "imagined on top of the imagined one before. What is malformed counts as wrong in the worst way from there on.",
    )


def _whole(plan: Plan, readings: Readings, task: str) -> ReportTable:
    names = (
        "drift_a", "drift_b", "played_agreement", "played_ratio", "inside_claimed", "free_success", "free_ratio",
        "inside_kept", "inside_ratio", "fit_s", "measure_s",
    )  # fmt: skip
    rows: list[tuple[Entry, ...]] = [
        (
            arm.title,
            _count(readings, arm.name, task),
            *(readings.estimate(arm.name, measure_named(name), task) for name in names[:-2]),
            *(_plain(readings.estimate(arm.name, measure_named(name), task, mean)) for name in names[-2:]),
        )
        for arm in plan.arms
        if readings.of(arm.name, task) or readings.failed(arm.name, task)
    ]
    shares = {
        name: readings.estimate(arm.name, measure_named(name), task, mean)
        for arm in plan.arms
        for name in ("seen_views", "seen_transitions")
        if readings.of(arm.name, task)
    }
    covered = ", ".join(
        f"{estimate.value:.0%} of the {'views' if name == 'seen_views' else 'views with their joint actions'}"
        for name, estimate in shares.items()
        if estimate is not None
    )
    return ReportTable(
        f"consistency-{task}",
        f"{task}: drift, and plans in the model and in the world",
        (
            "model", "seeds", "drift of MSE per step, a", "drift, b", "played plans: agreement",
            "played: world ÷ model", "policy: success in the model", "success in the world", "world ÷ model",
            "its plans carried out blindly", "blindly ÷ model", "fitting (s)", "measuring (s)",
        ),
        tuple(rows),
        "Played plans: joint actions of held-out episodes, given to the model from the first view on. Policy: the "
        "warm-started policy plays one agent inside the model, and the model the others; then the whole team plays the "
        "same instances in the world; then the agent carries out there what it did in the model, whatever it sees, "
        "among its real teammates. Seconds are clock time beside other cells; a model that was already fitted is "
        "loaded. "
        + (f"Training play holds {covered} that the cases start from." if covered else ""),
    )  # fmt: skip


def _comparisons(plan: Plan, readings: Readings) -> tuple[ReportTable, list[Finding]]:
    """MSE of the subject against its rivals, with the true joint actions; one family, corrected together."""
    horizons = [h for h in horizons_of(plan) if h in LONG] or [max(horizons_of(plan))]
    names = {arm.name: arm.title for arm in plan.arms}
    family = [(rival, h) for rival in RIVALS if rival in names and SUBJECT in names for h in horizons]
    pooled = [readings.compare(rival, SUBJECT, measure_named(f"mse_a_{h}")) for rival, h in family]
    adjusted = holm([1.0 if found is None else found.p_value for found in pooled])
    rows: list[tuple[Entry, ...]] = []
    findings: list[Finding] = []
    for (rival, h), found, p_value in zip(family, pooled, adjusted, strict=True):
        title = f"{names[rival]} – {names[SUBJECT]}, {h} steps"
        if found is None:
            rows.append((title, "all", 0, None, None, None, "not compared"))
            findings.append(Finding(f"Target missed: {title} could not be compared.", False))
            continue
        clear = found.verdict != 0 and p_value < SIGNIFICANT
        says = ("lower", "not told apart", "higher")[found.verdict + 1] if clear else "not told apart"
        rows.append((title, "all", found.difference.count, found.difference, found.improvement, p_shown(p_value), says))
        apart = []
        for task in plan.tasks:
            alone = readings.compare(rival, SUBJECT, measure_named(f"mse_a_{h}"), task.name)
            if alone is None:
                continue
            verdict = ("lower", "not told apart", "higher")[alone.verdict + 1]
            rows.append((title, task.name, alone.difference.count, alone.difference, alone.improvement, None, verdict))
            if alone.verdict != 1:
                apart.append(task.name)
        met = clear and found.verdict == 1
        text = (
            f"{'Target met' if met else 'Target missed'}: the error of {names[rival]} at {h} steps is {says} than the "
            f"token model's"
            if says != "not told apart"
            else f"Target missed: at {h} steps {names[rival]} and the token model are not told apart"
        )
        text += (
            f", difference {found.difference.value:+.4f} (95%: {found.difference.low:+.4f} to "
            f"{found.difference.high:+.4f}), p after Holm {p_shown(p_value)}."
        )
        if apart:
            text += f" By itself it is not clearly higher on {', '.join(apart)}."
        findings.append(Finding(text, clear))
    table = ReportTable(
        "comparisons",
        "Planned comparisons of MSE, true joint actions given",
        (
            "first – second", "task", "pairs", "paired difference (95%)", "P(first higher) (95%)", "p (Holm)",
            "first is",
        ),
        tuple(rows),
        "Interquartile mean of the differences on the same task and seed; a positive one means that the token model "
        "errs less. p by sign flips over all tasks together, Holm's correction over these rows. Single tasks go by "
        "their intervals alone: so few pairs cannot pass the correction.",
    )  # fmt: skip
    return table, findings


def _exactness(plan: Plan, readings: Readings) -> list[Finding]:
    found: list[Finding] = []
    for task in plan.tasks:
        value = readings.estimate(SUBJECT, measure_named("determined_a_1"), task.name)
        if value is None:
            continue
        met = value.value >= EXACT_TARGET
        clear = (value.low >= EXACT_TARGET or value.high < EXACT_TARGET) and value.count > 1
        text = (
            f"Target {'met' if met else 'missed'} on {task.name}: one step ahead the token model has "
            f"{_said(value)} of the determined fields right (target {EXACT_TARGET:g})"
        )
        table = readings.estimate(TABLE, measure_named("determined_a_1"), task.name)
        text += f"; a count table has {_said(table)}." if table else "."
        found.append(Finding(text, clear))
    return found


def _consistency(plan: Plan, readings: Readings) -> list[Finding]:
    found: list[Finding] = []
    low, high = CONSISTENT
    for task in plan.tasks:
        count = len(readings.of(SUBJECT, task.name))
        if not count:
            found.append(Finding(f"Not judged on {task.name}: there are no figures of the token model.", False))
            continue
        value = readings.estimate(SUBJECT, measure_named("free_ratio"), task.name)
        if value is None:
            found.append(Finding(f"Target missed on {task.name}: no plan succeeds inside the token model.", False))
            continue
        never = count - value.count
        blind = readings.estimate(SUBJECT, measure_named("inside_ratio"), task.name)
        met = low <= value.value <= high and not never
        clear = met and low <= value.low and value.high <= high and count > 1
        control, control_blind = (
            readings.estimate(SHUFFLED, measure_named(name), task.name) for name in ("free_ratio", "inside_ratio")
        )
        agreed = readings.estimate(SUBJECT, measure_named("played_agreement"), task.name)
        text = (
            f"Target {'met' if met else 'missed'} on {task.name}: the policy succeeds in the world {_said(value)} "
            f"times as often as inside the token model (target {low:g} to {high:.2f})"
        )
        text += f", and in {never} of {count} seeds nothing succeeds inside it" if never else ""
        text += f", its plans carried out blindly {_said(blind)} times" if blind else ""
        text += f"; on played plans it agrees with the world in {_said(agreed)} of cases" if agreed else ""
        if control is not None:
            text += f". Its answers shuffled: {_said(control)} times"
            text += f", and blindly {_said(control_blind)}" if control_blind else ""
        text += "."
        found.append(Finding(text, clear))
    return found


def _gaps(plan: Plan, readings: Readings) -> list[Finding]:
    """What not knowing the others costs, and what the control does."""
    found: list[Finding] = []
    at = max(horizons_of(plan))
    for task in plan.tasks:
        given, alone, shuffled = (
            readings.estimate(arm, measure_named(name), task.name)
            for arm, name in ((SUBJECT, f"mse_a_{at}"), (SUBJECT, f"mse_b_{at}"), ("shuffled", f"mse_a_{at}"))
        )
        if given is None or alone is None:
            continue
        text = (
            f"{task.name}: at {at} steps the token model errs by {_said(given)} with the others' actions given and by "
            f"{_said(alone)} without"
        )
        text += f"; its answers shuffled err by {_said(shuffled)}." if shuffled else "."
        found.append(Finding(text, alone.low > given.high and min(alone.count, given.count) > 1))
        for arm, what in ((UNTOLD, "whose play it is"), (WORDLESS, "what the agent itself said last")):
            told = readings.compare(SUBJECT, arm, measure_named("mate_ce_a_1"), task.name)
            if told is not None:
                found.append(_of_being_told(readings, task.name, arm, what, told))
        recalled = _of_recalling(plan, readings, task.name)
        found += [] if recalled is None else [recalled]
    return found


def _of_recalling(plan: Plan, readings: Readings, task: str) -> Finding | None:
    """What it is worth that prompts show earlier moments, by the error at every horizon; clear where it is at all of
    the long ones, and in the same direction."""
    said: list[str] = []
    verdicts: dict[int, int] = {}
    for h in horizons_of(plan):
        found = readings.compare(RECALLING, SUBJECT, measure_named(f"mse_a_{h}"), task)
        if found is not None:
            verdicts[h] = found.verdict if found.difference.count > 1 else 0
            by = found.difference
            said.append(f"{by.value:+.4f} (95%: {by.low:+.4f} to {by.high:+.4f}) at {h}")
    if not said:
        return None
    text = f"{task}: shown three earlier moments, the token model's error differs by {', '.join(said)} steps"
    long = {verdict for h, verdict in verdicts.items() if h in LONG}
    clear = len(long) == 1 and long != {0}
    ratios = [readings.estimate(arm, measure_named("free_ratio"), task) for arm in (RECALLING, SUBJECT)]
    if ratios[0] is not None and ratios[1] is not None:
        text += f"; the ratio of success in the world to that inside it is {_said(ratios[0])} beside {_said(ratios[1])}"
    return Finding(f"{text}.", clear)


def _of_being_told(readings: Readings, task: str, untold: str, what: str, costs: Comparison) -> Finding:
    """What it is worth that prompts say something, beside the arm whose prompts do not."""
    text = (
        f"{task}: told {what}, the token model is surer of a teammate's next action by "
        f"{-costs.difference.value:.3f} nats (95%: {-costs.difference.high:.3f} to {-costs.difference.low:.3f})"
    )
    ratios = [readings.estimate(arm, measure_named("free_ratio"), task) for arm in (SUBJECT, untold)]
    if ratios[0] is not None and ratios[1] is not None:
        text += (
            f", and the policy succeeds in the world {_said(ratios[0])} times as often as inside it; untold, "
            f"{_said(ratios[1])} times"
        )
    return Finding(f"{text}.", costs.verdict == -1 and costs.difference.count > 1)


def _curves(plan: Plan, readings: Readings, name: str, what: str) -> ReportFigure | None:
    panels: dict[str, dict[str, list[tuple[list[float], list[float]]]]] = {}
    for task in plan.tasks:
        for mode, title in MODES.items():
            lines: dict[str, list[tuple[list[float], list[float]]]] = {}
            for arm in plan.arms:
                found = [_line(cell, f"{name}_{mode}") for cell in readings.of(arm.name, task.name)]
                if any(x for x, _ in found):
                    lines[arm.title] = [line for line in found if line[0]]
            if lines:
                panels[f"{task.name}, {title}"] = lines
    if not panels:
        return None
    return ReportFigure(
        name,
        f"{what[0].upper()}{what[1:]} against the steps imagined: interquartile mean over seeds with 95% bootstrap "
        "bands. Always the same cases, those that last to the longest horizon.",
        curves_figure(panels, "steps imagined", what, smooth=1),
    )


def _line(cell: CellResult, name: str) -> tuple[list[float], list[float]]:
    values = [value for value in cell.curves.get(name, ()) if value is not None]
    return [float(h) for h in range(1, len(values) + 1)], values


def _reliability(plan: Plan, readings: Readings) -> ReportFigure | None:
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    at = horizons_of(plan)[0]
    for task in plan.tasks:
        for arm in plan.arms:
            points = [
                (float(said), float(was), float(count))
                for cell in readings.of(arm.name, task.name)
                for said, was, count in zip(
                    *(cell.curves.get(f"reliability_{part}_{at}", ()) for part in ("said", "was", "count")),
                    strict=True,
                )
                if said is not None and was is not None and count is not None
            ]
            if points:
                panels.setdefault(task.name, {})[arm.title] = points
    if not panels:
        return None
    return ReportFigure(
        "reliability",
        f"Reliability of the likeliest action foretold of a teammate, {at} step ahead, all seeds together: how often "
        "it was right against how certain the model was. On the line a model is right as often as it says.",
        reliability_figure(panels),
    )


def _said(value: Estimate) -> str:
    return f"{value.value:.3f} (95%: {value.low:.3f} to {value.high:.3f})"


def _plain(value: Estimate | None) -> float | None:
    return None if value is None else value.value


def _count(readings: Readings, arm: str, task: str) -> str:
    failed = readings.failed(arm, task)
    return f"{len(readings.of(arm, task))}" + (f" ({failed} failed)" if failed else "")
