"""Experiment `credit`: who is given which credit, with one adapter for all or one for each.

Arms are credit estimators and critics × adapters. All cells of a task and seed share their warm start and are updated
equally often. Arms that play whole games play equally many of them. Agent × turn branches off every moment of a game
and plays each branch to its end; as a game of H steps then costs (H + 1) / 2 times as much, it is given fewer. What is
left of a difference (better teams finish earlier) is shown: curves are drawn against the environment steps that were
really played, and read at the largest number that every cell has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from preconcert.experiments.experiment import (
    CellResult,
    Experiment,
    ExperimentArm,
    ExperimentTask,
    Plan,
    Scale,
)
from preconcert.experiments.figures import curves_figure, intervals_figure
from preconcert.experiments.judgement import LAST, SPIKE, at_budget
from preconcert.experiments.readings import Contrast, Readings, comparisons_table, measure_named
from preconcert.experiments.report import Entry, Finding, Report, ReportFigure, ReportTable
from preconcert.experiments.statistics import mean

_PPO: Mapping[str, Any] = {"algorithm": "ppo", "grpo.credit": {"type": "gae", "gamma": 0.95}}
ESTIMATORS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "global": ("global", {"grpo.credit": "global"}),
    "agent": ("agent-wise", {"grpo.credit": "agent"}),
    "turn": ("turn-level", {"grpo.credit": "turn"}),
    "agent-turn": ("agent × turn", {"grpo.credit": "agent-turn"}),
    "ppo-central": ("PPO, central critic", {**_PPO, "critic.context": "agent-central"}),
    "ppo-own": ("PPO, own-context critic", {**_PPO, "critic.context": "own"}),
    "ppo-sequential": ("PPO, sequential", {**_PPO, "critic.context": "agent-central", "update.order": "sequential"}),
}
"""Title and overrides by name; `global` is what the others are held against."""
ADAPTERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "shared": ("one adapter", {"adapters": "shared"}),
    "own": ("adapter each", {"adapters": "per_agent"}),
}
SCALED = {"grpo.rewards": {"scale": {"agent_1": 10.0}}}
"""The sub-study: one agent's rewards count ten times as much in training."""
SCALED_ESTIMATORS = ("global", "agent")
REFERENCE = "global"
BRANCHING = "agent-turn"
WARM = "warm"
_LEAN: Mapping[str, Any] = {"gate": {"min_gap": 0.0, "episodes": 16}, "keep_episodes": False}


def arm_name(estimator: str, adapters: str, scaled: bool = False) -> str:
    """How an arm is called."""
    return f"{estimator}{'-scaled' if scaled else ''}.{adapters}"


def arms(branching: Mapping[str, int], scaled_on: tuple[str, ...] = ()) -> tuple[ExperimentArm, ...]:
    """The warm start alone, every estimator with both kinds of adapters, and the sub-study.

    Args:
        branching: by task, `grpo.seeds` of agent × turn, such that it plays about as many steps as the others.
        scaled_on: the tasks of the sub-study; empty means all.
    """
    fewer = {task: {"grpo.seeds": seeds} for task, seeds in branching.items()}
    found = [ExperimentArm(WARM, "warm start alone", {"grpo.iterations": 0, "adapters": "shared"})]
    for adapters, (place, kind) in ADAPTERS.items():
        found += [
            ExperimentArm(
                arm_name(name, adapters), f"{title}, {place}", {**given, **kind}, fewer if name == BRANCHING else {}
            )
            for name, (title, given) in ESTIMATORS.items()
        ]
    for adapters, (place, kind) in ADAPTERS.items():
        found += [
            ExperimentArm(
                arm_name(name, adapters, True),
                f"{ESTIMATORS[name][0]}, {place}, rewards 1:10",
                {**ESTIMATORS[name][1], **kind, **SCALED},
                tasks=scaled_on,
            )
            for name in SCALED_ESTIMATORS
        ]
    return tuple(found)


def contrasts(plan: Plan) -> list[Contrast]:
    """Every comparison that is made; fixed by the plan, not by the results."""
    titles = {arm.name: arm.title for arm in plan.arms}
    pairs = [(arm_name(name, where), arm_name(REFERENCE, where)) for where in ADAPTERS for name in ESTIMATORS]
    pairs += [(arm_name(name, "own"), arm_name(name, "shared")) for name in ESTIMATORS]
    pairs += [(arm_name("agent", where, True), arm_name("global", where, True)) for where in ADAPTERS]
    return [
        Contrast(first, second, f"{titles[first]} – {titles[second]}")
        for first, second in pairs
        if first != second and first in titles and second in titles
    ]


def budgets(cells: Sequence[CellResult]) -> dict[str, float]:
    """By task, the environment steps that every trained cell has played."""
    found: dict[str, float] = {}
    for each in cells:
        steps = each.curves.get("env_steps")
        if steps and steps[-1] is not None:
            found[each.cell.task] = min(found.get(each.cell.task, float("inf")), steps[-1])
    return found


def read_at_budget(cell: CellResult, name: str, limits: Mapping[str, float]) -> float | None:
    """A training curve at the budget that all cells of its task have."""
    limit = limits.get(cell.cell.task)
    return at_budget(cell.curves, name, limit) if limit is not None else None


def report(plan: Plan, cells: Sequence[CellResult]) -> Report:
    """Tables of outcome and stability, the planned comparisons, and the curves."""
    readings = Readings(cells)
    limits = budgets(cells)
    budget_read = partial(read_at_budget, name="success", limits=limits)
    table, findings = comparisons_table(
        readings, contrasts(plan), measure_named("success_sampled"), "held-out success, sampled"
    )
    tables = [_outcomes(plan, readings, task.name, limits) for task in plan.tasks]
    tables += [table] if table.rows else []
    tables += [_course(plan, readings, task.name) for task in plan.tasks]
    figures = [
        *_curves(plan, readings, False),
        ReportFigure(
            "success",
            "Held-out success after training: interquartile means over seeds and 95% bootstrap intervals. The same "
            "instances for every cell.",
            intervals_figure(
                {
                    task.name: [
                        (
                            arm.title,
                            {
                                "sampled": readings.estimate(arm.name, measure_named("success_sampled"), task.name),
                                "greedy": readings.estimate(arm.name, measure_named("success_greedy"), task.name),
                                "at the common budget": readings.estimate(arm.name, budget_read, task.name),
                            },
                        )
                        for arm in plan.arms
                    ]
                    for task in plan.tasks
                },
                "success",
            ),
        ),
        *_curves(plan, readings, True),
    ]
    return Report([*findings, *_controls(plan, readings)], tables, figures)


def _outcomes(plan: Plan, readings: Readings, task: str, limits: Mapping[str, float]) -> ReportTable:
    rows: list[tuple[Entry, ...]] = []
    columns = ("success_sampled", "success_greedy", "return_sampled", "return_greedy", "success_shuffled")
    for arm in plan.arms:
        if not readings.of(arm.name, task) and not readings.failed(arm.name, task):
            continue
        at = partial(read_at_budget, name="success", limits=limits)
        rows.append(
            (
                arm.title,
                _count(readings, arm.name, task),
                *(readings.estimate(arm.name, measure_named(name), task) for name in columns),
                readings.estimate(arm.name, at, task),
            )
        )
    limit = limits.get(task)
    return ReportTable(
        f"outcome-{task}",
        f"{task}: held-out play after training",
        (
            "arm", "seeds", "success, sampled", "success, greedy", "return, sampled", "return, greedy",
            "success, messages shuffled", "training success at the common budget",
        ),
        tuple(rows),
        "Interquartile mean over seeds (95% stratified bootstrap interval). Common budget: "
        + (f"{limit:,.0f} environment steps, " if limit is not None else "none, ")
        + f"the mean of the last {LAST} iterations before it.",
    )  # fmt: skip


def _course(plan: Plan, readings: Readings, task: str) -> ReportTable:
    # The share of a single adapter is always 1.
    shares = sorted({key for each in readings.cells for key in each.measures if "share/agent" in key})
    rows: list[tuple[Entry, ...]] = []
    names = ("spikes_per_100", "peak_minus_final", "explained_variance", *shares, "env_steps", "tokens", "train_s")
    for arm in plan.arms:
        if arm.name == WARM or not readings.of(arm.name, task):
            continue
        estimates = [readings.estimate(arm.name, measure_named(name), task, mean) for name in names]
        rows.append((arm.title, *(estimate and estimate.value for estimate in estimates)))
    return ReportTable(
        f"course-{task}",
        f"{task}: the course of training",
        (
            "arm", f"gradient spikes per 100 (> {SPIKE:g} × running median)", "peak minus final success",
            "explained variance", *(name.replace("_", " ").replace("/", " of ") for name in shares),
            "environment steps", "generated tokens", "training seconds",
        ),
        tuple(rows),
        "Means over seeds. Spikes are counted among iterations, each by the largest gradient of its steps. Seconds are "
        "clock time beside other cells on the same machine, without the warm start.",
    )  # fmt: skip


def _curves(plan: Plan, readings: Readings, scaled: bool) -> list[ReportFigure]:
    panels: dict[str, dict[str, list[tuple[list[float], list[float]]]]] = {}
    for task in plan.tasks:
        for adapters, (place, _) in ADAPTERS.items():
            lines: dict[str, list[tuple[list[float], list[float]]]] = {}
            for estimator in SCALED_ESTIMATORS if scaled else ESTIMATORS:
                found = [_line(cell) for cell in readings.of(arm_name(estimator, adapters, scaled), task.name)]
                if any(x for x, _ in found):
                    lines[ESTIMATORS[estimator][0]] = found
            if lines:
                panels[f"{task.name}, {place}"] = lines
    if not panels:
        return []
    kind = "with one agent's rewards ten times the other's" if scaled else "with sampled play"
    return [
        ReportFigure(
            "curves-scaled" if scaled else "curves",
            f"Training success {kind} against environment steps: interquartile mean over seeds of running means over "
            f"{LAST} iterations; bands are 95% bootstrap intervals, drawn where every seed has a curve.",
            curves_figure(panels, "environment steps", "success"),
        )
    ]


def _line(cell: CellResult) -> tuple[list[float], list[float]]:
    pairs = [
        (x, y)
        for x, y in zip(cell.curves.get("env_steps", ()), cell.curves.get("success", ()), strict=True)
        if x is not None and y is not None
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _controls(plan: Plan, readings: Readings) -> list[Finding]:
    """Did training do anything, and do the teams use their messages? One sentence per task."""
    found: list[Finding] = []
    for task in plan.tasks:
        warm = readings.estimate(WARM, measure_named("success_sampled"), task.name)
        trained = [arm for arm in plan.arms if arm.name != WARM]
        ends = {
            arm.title: value
            for arm in trained
            if (value := readings.estimate(arm.name, measure_named("success_sampled"), task.name)) is not None
        }
        shuffled = [
            value.value
            for arm in trained
            if (value := readings.estimate(arm.name, measure_named("success_shuffled"), task.name)) is not None
        ]
        if warm is None or not ends:
            continue
        above = sum(value.low > warm.high and min(value.count, warm.count) > 1 for value in ends.values())
        text = (
            f"{task.name}: the warm start succeeds in {warm.value:.2f} ({warm.low:.2f} to {warm.high:.2f}) of held-out "
            f"instances; {above} of {len(ends)} trained arms have an interval wholly above it."
        )
        if shuffled:
            text += f" With messages shuffled the trained arms lie between {min(shuffled):.2f} and {max(shuffled):.2f}."
        found.append(Finding(text, False))
    return found


def _count(readings: Readings, arm: str, task: str) -> str:
    failed = readings.failed(arm, task)
    return f"{len(readings.of(arm, task))}" + (f" ({failed} failed)" if failed else "")


SMOKE = Plan(
    arms=tuple(arm for arm in arms({}) if arm.name in (arm_name("global", "own"), arm_name("ppo-central", "own"))),
    tasks=(
        ExperimentTask(
            "rendezvous",
            {
                **_LEAN,
                "task": "rendezvous",
                "params": {"size": 3, "landmarks": 2, "horizon": 4},
                "starter": {"layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "ffn": 32},
                "warm_start": {"episodes": 64, "steps": 15, "batch": 64},
                "grpo": {"iterations": 2, "seeds": 2, "group": 2, "minibatches": 2, "checkpoint_every": 1},
            },
        ),
    ),
    seeds=2,
    options={"episodes": 8},
)
_BOX_PUSH: Mapping[str, Any] = {"hindsight_weight": 0.1}
"""As in the task's recipe."""
STANDARD = Plan(
    arms=arms({"rendezvous": 2, "box-push": 1}, scaled_on=("rendezvous",)),
    tasks=(
        ExperimentTask(
            "rendezvous",
            {**_LEAN, "task": "rendezvous", "grpo": {"iterations": 24, "seeds": 8, "group": 8}},
        ),
        ExperimentTask(
            "box-push",
            {
                **_LEAN,
                "task": "box-push",
                "warm_start": {"episodes": 4000, "steps": 900},
                "grpo": {**_BOX_PUSH, "iterations": 24, "seeds": 8, "group": 4},
            },
        ),
    ),
    seeds=5,
    options={"episodes": 100},
)
FULL = Plan(
    arms=arms({"rendezvous": 4, "box-push": 2}),
    tasks=(
        ExperimentTask("rendezvous", {**_LEAN, "task": "rendezvous", "grpo": {"iterations": 60, "seeds": 16}}),
        ExperimentTask(
            "box-push",
            {
                **_LEAN,
                "task": "box-push",
                "warm_start": {"episodes": 8000, "steps": 2000},
                "grpo": {**_BOX_PUSH, "iterations": 60, "seeds": 16},
            },
        ),
    ),
    seeds=10,
    options={"episodes": 200},
)

CREDIT = Experiment(
    name="credit",
    question=(
        "Does it matter whose returns an agent's return is compared with, or which critic judges it, when a team of "
        "language-model agents learns together, and does the answer depend on whether the agents share an adapter?"
    ),
    plans={Scale.SMOKE: SMOKE, Scale.STANDARD: STANDARD, Scale.FULL: FULL},
    work="preconcert.experiments.judgement:train_and_judge",
    report=report,
    limits=(
        "The models are starters of about 0.13 million parameters, made from nothing and taught by a script. Whether "
        "the order of the arms is the same for pretrained models of useful size is not known from this.",
        "There are two agents and two small grid tasks, and both agents always earn the same reward unless it is "
        "scaled: agent-wise and global credit are then the same by construction, and only the sub-study tells them "
        "apart. Many agents, roles that differ and long episodes are not touched.",
        "Every arm runs with the same learning rate, clipping and number of passes, which were chosen with agent-wise "
        "credit. An arm that loses here might win with settings of its own.",
        "Environment steps are matched approximately, as the tables show. Held-out figures are those after the last "
        "iteration; the figure at the common budget is of sampled play on training instances.",
        "Gradient spikes are counted once per iteration, by the largest gradient of its steps.",
        "Percentile intervals from five seeds are known to be somewhat too narrow.",
    ),
)
