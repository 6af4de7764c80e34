"""What experiment `foresight` makes of its cells: predictions, predictability, success kept or lost, steps saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from preconcert.experiments.experiment import CellResult, ExperimentArm, Plan
from preconcert.experiments.figures import curves_figure, intervals_figure, running_mean
from preconcert.experiments.foresight_arms import (
    CONTRASTS,
    IMAGINATIONS,
    IMAGINED,
    IMAGINED_SLOW,
    PAID,
    PASSES,
    PLAIN,
    PREDICTIONS,
    REAL,
    REAL_SLOW,
    UNDAMPED,
    WARM,
)
from preconcert.experiments.judgement import LAST
from preconcert.experiments.readings import Contrast, Readings, comparisons_table, measure_named
from preconcert.experiments.report import Entry, Finding, Report, ReportFigure, ReportTable
from preconcert.experiments.statistics import Estimate, mean

MARGIN = 0.02
"""Success that may be lost without it counting as a loss; fixed beforehand."""
HALF = 0.5
"""Share of the real steps within which imagination has to reach what real games alone reach."""
ACCURACY = "prediction/top"
"""Teammate-action accuracy: of the action that an agent holds likeliest. Words are sampled, so that an agent that knows
how unsure it must be writes the right one less often."""
PREDICTED = (
    (ACCURACY, "teammate-action accuracy"),
    ("prediction/accuracy", "words right"),
    ("prediction/brier", "Brier score (1 is best)"),
    ("prediction/kept_word", "announced actions taken"),
    ("prediction/field_f1", "foreseen fields"),
    ("success_sampled", "success, sampled"),
    ("success_greedy", "success, greedy"),
    ("return_sampled", "return, sampled"),
)
"""Measures and columns of the first part."""
PREDICTABLE = (
    ("predictability/entropy_bits", "entropy of actions, bits"),
    ("predictability/copy_last", "by copying the last action"),
    ("predictability/by_view", "by the observer's view"),
    ("predictability/by_own_view", "by the agent's own view"),
    (ACCURACY, "by the agents themselves"),
)
"""Measures and columns that say how well agents could be foretold, and by what."""


def report(plan: Plan, cells: Sequence[CellResult]) -> Report:
    """Tables of predictions, predictability and steps, the planned comparisons, and the curves."""
    readings = Readings(cells)
    names = {arm.name for arm in plan.arms}
    tables: list[ReportTable] = []
    findings: list[Finding] = []
    figures: list[ReportFigure] = []
    if PAID in names:
        tasks = [task.name for task in plan.tasks if readings.of(PLAIN, task.name) or readings.of(PAID, task.name)]
        for task in tasks:
            tables.append(_measures(plan, readings, task, f"predictions-{task}", f"{task}: held-out play", PREDICTED))
            tables.append(
                _measures(
                    plan, readings, task, f"predictable-{task}", f"{task}: how well agents can be foretold", PREDICTABLE
                )
            )
        found, said = _comparisons(readings)
        tables += found
        findings += said
        figures += _prediction_figures(plan, readings, tasks)
    if IMAGINED in names:
        found, said = _steps(plan, readings)
        tables += found
        findings += said
        figures += _imagination_figures(plan, readings)
    return Report(findings, tables, figures)


def _measures(
    plan: Plan, readings: Readings, task: str, name: str, title: str, columns: Sequence[tuple[str, str]]
) -> ReportTable:
    rows: list[tuple[Entry, ...]] = []
    for arm in PREDICTIONS:
        if arm.name in {each.name for each in plan.arms} and (
            readings.of(arm.name, task) or readings.failed(arm.name, task)
        ):
            rows.append(
                (
                    arm.title,
                    _count(readings, arm.name, task),
                    *(readings.estimate(arm.name, measure_named(key), task) for key, _ in columns),
                )
            )
    return ReportTable(
        name,
        title,
        ("arm", "seeds", *(label for _, label in columns)),
        tuple(rows),
        "Interquartile mean over seeds (95% stratified bootstrap interval) of held-out play, sampled. Actions count "
        "where the other had a choice. Accuracy is that of the likeliest action, words are sampled. By a view: the "
        "most frequent action in the other games with that view.",
    )


def _comparisons(readings: Readings) -> tuple[list[ReportTable], list[Finding]]:
    """The planned comparisons of accuracy, and whether success was lost."""
    table, findings = comparisons_table(
        readings, CONTRASTS, measure_named(ACCURACY), "teammate-action accuracy"
    )
    kept, said = _kept(readings, CONTRASTS[:2] + CONTRASTS[3:4])
    return [replace(table, name="comparisons-accuracy"), kept], [*findings, *said]


def _kept(readings: Readings, contrasts: Sequence[Contrast]) -> tuple[ReportTable, list[Finding]]:
    """Non-inferiority: the paired difference's interval must lie above minus the margin."""
    rows: list[tuple[Entry, ...]] = []
    findings: list[Finding] = []
    for contrast in contrasts:
        found = readings.compare(contrast.first, contrast.second, measure_named("success_sampled"))
        if found is None:
            rows.append((contrast.title, 0, None, "not compared"))
            continue
        kept = found.difference.low > -MARGIN
        lost = found.difference.high < -MARGIN
        says = "is not worse" if kept else "is worse" if lost else "could be worse"
        rows.append((contrast.title, found.difference.count, found.difference, says))
        findings.append(
            Finding(
                f"{contrast.title}: held-out success {says} by more than {MARGIN:.0%} (difference "
                f"{found.difference.value:+.3f}, 95%: {found.difference.low:+.3f} to {found.difference.high:+.3f}).",
                kept or lost,
            )
        )
    return ReportTable(
        "kept",
        f"Is success kept, to within {MARGIN:.0%}?",
        ("first – second", "pairs", "paired difference of success (95%)", "success"),
        tuple(rows),
        f"Is not worse: the interval lies above −{MARGIN:.2f}. Is worse: it lies below. Could be worse: it lies on "
        "both sides.",
    ), findings


def steps_to(cell: CellResult, success: float, width: int = LAST) -> float | None:
    """Real environment steps until the running mean of training success first reaches a level; None where it never does
    (or where not even `width` iterations were played)."""
    steps, values = _line(cell, "success")
    for at, level in list(zip(steps, running_mean(values, width).tolist(), strict=True))[width - 1 :]:
        if level >= success - 1e-12:
            return at
    return None


def step_ratios(readings: Readings, task: str, arm: str) -> tuple[dict[int, float], int]:
    """By seed, the real steps that an arm needs for the success that real games alone end with, over theirs.

    Returns:
        The ratios, and how many of the seeds never get there; those count with all the steps that they played.
    """
    ratios: dict[int, float] = {}
    never = 0
    arms = {each.cell.seed: each for each in readings.of(arm, task)}
    for real in readings.of(REAL, task):
        own = arms.get(real.cell.seed)
        _, values = _line(real, "success")
        if own is None or len(values) < LAST:
            continue
        level = float(running_mean(values, LAST)[-1])
        needed, reached = steps_to(real, level), steps_to(own, level)
        played = own.curves["env_steps"][-1]
        assert needed is not None
        assert played is not None
        never += reached is None
        ratios[real.cell.seed] = (played if reached is None else reached) / needed
    return ratios, never


def _steps(plan: Plan, readings: Readings) -> tuple[list[ReportTable], list[Finding]]:
    """The criterion of half the steps, per task and arm."""
    rows: list[tuple[Entry, ...]] = []
    findings: list[Finding] = []
    titles = {arm.name: arm.title for arm in plan.arms}
    for task in plan.tasks:
        for arm in (each.name for each in IMAGINATIONS):
            if arm not in titles or not readings.of(arm, task.name):
                continue
            found, never = _ratio(readings, task.name, arm)
            figures = [
                readings.estimate(arm, measure_named(key), task.name, mean)
                for key in ("env_steps", "tokens", "imagined_tokens", "train_s")
            ]
            rows.append(
                (
                    task.name,
                    titles[arm],
                    _count(readings, arm, task.name),
                    readings.estimate(arm, measure_named("success_sampled"), task.name),
                    found,
                    never,
                    *(each and each.value for each in figures),
                )
            )
            if arm == IMAGINED and found is not None:
                enough = found.high <= HALF and not never and found.count > 1
                findings.append(
                    Finding(
                        f"{task.name}: with imagined games, the success that real games alone end with takes "
                        f"{found.value:.2f} of their real steps (95%: {found.low:.2f} to {found.high:.2f}; never "
                        f"within the budget in {never} of {found.count} seeds)"
                        + (", at most half." if enough else "; that is not shown to be at most half."),
                        enough,
                    )
                )
    contrasts = [
        Contrast(IMAGINED, REAL, "imagined beside real – real only"),
        Contrast(IMAGINED, PASSES, "imagined beside real – real only, more passes"),
        Contrast(IMAGINED_SLOW, REAL_SLOW, "imagined beside real – real only, both at learning rate 0.001"),
        Contrast(IMAGINED, UNDAMPED, "imagined, damped – not damped"),
    ]
    kept, said = _kept(readings, contrasts)
    table = ReportTable(
        "steps",
        "Real environment steps until the success that real games alone end with",
        (
            "task", "arm", "seeds", "held-out success, sampled", "steps needed / steps of real only (95%)", "never",
            "real steps", "tokens in real games", "tokens in imagined games", "training seconds",
        ),
        tuple(rows),
        f"Success is the running mean over {LAST} iterations of training. A seed that never gets there counts with all "
        "the steps that it played. The last four columns are means. Seconds are clock time beside other cells.",
    )  # fmt: skip
    return [table, replace(kept, name="kept-imagined")], [*findings, *said]


def _ratio(readings: Readings, task: str, arm: str) -> tuple[Estimate | None, int]:
    ratios, never = step_ratios(readings, task, arm)

    def read(cell: CellResult) -> float | None:
        return ratios.get(cell.cell.seed)

    return readings.estimate(arm, read, task), never


def _prediction_figures(plan: Plan, readings: Readings, tasks: Sequence[str]) -> list[ReportFigure]:
    if not tasks:
        return []
    shown = [arm for arm in PREDICTIONS if arm.name in {each.name for each in plan.arms}]
    panels = {
        f"{task}: {label}": _lines(readings, task, [arm for arm in shown if arm.name != WARM], name)
        for task in tasks
        for name, label in ((ACCURACY, "teammate-action accuracy"), ("success", "success"))
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    intervals = intervals_figure(
        {
            task: [
                (
                    arm.title,
                    {
                        label: readings.estimate(arm.name, measure_named(name), task)
                        for name, label in (
                            (ACCURACY, "teammate-action accuracy"),
                            ("predictability/by_own_view", "foretold by the agent's own view"),
                            ("success_sampled", "success"),
                        )
                    },
                )
                for arm in shown
            ]
            for task in tasks
        },
        "share",
    )
    found = [ReportFigure("predictions", "Held-out play: interquartile means and 95% intervals.", intervals)]
    if panels:
        found.append(
            ReportFigure(
                "course",
                "In training, against environment steps: interquartile mean over seeds and 95% bootstrap bands.",
                curves_figure(panels, "environment steps", "share"),
            )
        )
    return found


def _imagination_figures(plan: Plan, readings: Readings) -> list[ReportFigure]:
    shown = [arm for arm in IMAGINATIONS if arm.name in {each.name for each in plan.arms}]
    panels = {task.name: _lines(readings, task.name, shown, "success") for task in plan.tasks}
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return []
    return [
        ReportFigure(
            "imagination",
            "Training success against real environment steps: interquartile mean over seeds of running means over "
            f"{LAST} iterations, with 95% bootstrap bands.",
            curves_figure(panels, "real environment steps", "success"),
        )
    ]


def _lines(
    readings: Readings, task: str, arms: Sequence[ExperimentArm], name: str
) -> dict[str, list[tuple[list[float], list[float]]]]:
    found: dict[str, list[tuple[list[float], list[float]]]] = {}
    for arm in arms:
        lines = [line for cell in readings.of(arm.name, task) if (line := _line(cell, name))[0]]
        if lines:
            found[arm.title] = lines
    return found


def _line(cell: CellResult, name: str) -> tuple[list[float], list[float]]:
    pairs = [
        (x, y)
        for x, y in zip(cell.curves.get("env_steps", ()), cell.curves.get(name, ()), strict=False)
        if x is not None and y is not None
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _count(readings: Readings, arm: str, task: str) -> str:
    failed = readings.failed(arm, task)
    return f"{len(readings.of(arm, task))}" + (f" ({failed} failed)" if failed else "")
