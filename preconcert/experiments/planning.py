"""Experiment `planning`: does it pay to imagine before acting, at the same number of generated tokens?

All arms of a task and seed play the same held-out instances with the same warm-started team, which is imperfect on
purpose, and differ only in how a turn is chosen: sampled; the likeliest, or the commonest, of as many turns as cost
what planning costs; by search in the learned token world model, in a recurrent one, in the environment itself, and in
the token model with its answers exchanged between episodes. Nothing learns after the warm start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preconcert.experiments.bars import bars_figure
from preconcert.experiments.experiment import (
    CellResult,
    Experiment,
    ExperimentArm,
    ExperimentTask,
    Plan,
    Scale,
)
from preconcert.experiments.readings import Contrast, Readings, comparisons_table, measure_named
from preconcert.experiments.report import Entry, Finding, Report, ReportFigure, ReportTable
from preconcert.experiments.statistics import Estimate, mean

REACTIVE, SAME, COMMONEST = "reactive", "same-tokens", "self-consistency"
BEST, BEAM, TREE = "best-of-k", "beam", "tree"
RECURRENT, ORACLE, SHUFFLED = "recurrent", "oracle", "shuffled"
LEARNED = (BEST, BEAM, TREE)
"""Arms that plan in the token model."""
_GAP = 0.5
"""The share of the oracle's gain that learned planning is to reach."""
_ENOUGH_TASKS = 2
_SUCCESS = measure_named("success")


def arms(search: Mapping[str, Any], beam: Mapping[str, Any], tree: Mapping[str, Any]) -> tuple[ExperimentArm, ...]:
    """The arms.

    Args:
        search: settings of best-of-K, for all arms that search that way.
        beam: settings of beam search.
        tree: settings of tree search.
    """
    best = {"type": "best-of-k", **search}

    def arm(name: str, title: str, imagines: str, planner: Mapping[str, Any] = best) -> ExperimentArm:
        return ExperimentArm(name, title, options={"imagines": imagines, "planner": dict(planner)})

    return (
        arm(REACTIVE, "reactive", "nothing"),
        arm(SAME, "reactive, same tokens", "same-tokens"),
        arm(COMMONEST, "self-consistency, same tokens", "self-consistency"),
        arm(BEST, "best-of-K, token model", "token"),
        arm(BEAM, "beam, token model", "token", {"type": "beam", **beam}),
        arm(TREE, "tree, token model", "token", {"type": "tree", **tree}),
        arm(RECURRENT, "best-of-K, recurrent model", "recurrent"),
        arm(SHUFFLED, "best-of-K, shuffled model", "shuffled"),
        arm(ORACLE, "best-of-K, oracle", "oracle", {**best, "horizon": 64}),
    )


CONTRASTS = (
    *(Contrast(name, SAME, f"{name} – same tokens") for name in LEARNED),
    Contrast(BEST, REACTIVE, "best-of-K – reactive"),
    Contrast(SAME, REACTIVE, "same tokens – reactive"),
    Contrast(SHUFFLED, REACTIVE, "shuffled model – reactive"),
    *(Contrast(name, COMMONEST, f"{name} – self-consistency") for name in LEARNED),
    Contrast(SHUFFLED, COMMONEST, "shuffled model – self-consistency"),
    Contrast(BEST, SHUFFLED, "token model – shuffled model"),
    Contrast(BEST, RECURRENT, "token model – recurrent model"),
    Contrast(ORACLE, BEST, "oracle – token model"),
)
"""What is compared; fixed before the runs."""


def gap_share(readings: Readings, arm: str, task: str) -> Estimate | None:
    """The share of what the oracle gains over the reactive team that an arm gains, and its bootstrap interval.

    A ratio of means over the seeds that all three have; seeds are drawn together. None where the oracle's own gain is
    not clear, as it never is from one seed: nobody can say what share of nothing is.
    """
    values = [readings.values(name, _SUCCESS, task).get(task, {}) for name in (arm, REACTIVE, ORACLE)]
    seeds = sorted(set(values[0]) & set(values[1]) & set(values[2]))
    if len(seeds) < 2:
        return None
    table = np.array([[each[seed] for seed in seeds] for each in values])
    rng = np.random.default_rng(readings.seed)
    drawn = table[:, rng.integers(len(seeds), size=(10_000, len(seeds)))].mean(axis=-1)
    gains, gaps = drawn[0] - drawn[1], drawn[2] - drawn[1]
    gain, gap = float((table[0] - table[1]).mean()), float((table[2] - table[1]).mean())
    if float(np.percentile(gaps, 2.5)) <= 0:
        return None
    low, high = np.percentile(gains / np.maximum(gaps, 1e-9), (2.5, 97.5))
    return Estimate(gain / gap, float(low), float(high), len(seeds))


def report(plan: Plan, cells: Sequence[CellResult]) -> Report:
    """Success, what it costs, shares of the oracle's gain, the planned comparisons, and a figure."""
    readings = Readings(cells)
    table, said = comparisons_table(readings, CONTRASTS, _SUCCESS, "held-out success")
    tables = [_successes(plan, readings, task.name) for task in plan.tasks]
    tables += [_costs(plan, readings, task.name) for task in plan.tasks]
    tables += [table] if table.rows else []
    tasks = [task.name for task in plan.tasks]
    figure = ReportFigure(
        "success",
        "Held-out success by arm: interquartile means over seeds with 95% bootstrap intervals. Dashed: the reactive "
        "team that may write as many tokens as the planners.",
        bars_figure(
            {
                task: [(arm.title, readings.estimate(arm.name, _SUCCESS, task)) for arm in plan.arms]
                for task in tasks
            },
            "success",
            next((arm.title for arm in plan.arms if arm.name == SAME), None),
        ),
    )
    return Report([*_targets(readings, tasks), *said], tables, [figure])


def _successes(plan: Plan, readings: Readings, task: str) -> ReportTable:
    rows: list[tuple[Entry, ...]] = []
    for arm in plan.arms:
        failed = readings.failed(arm.name, task)
        count = f"{len(readings.of(arm.name, task))}" + (f" ({failed} failed)" if failed else "")
        share = None if arm.name in (REACTIVE, ORACLE) else gap_share(readings, arm.name, task)
        rows.append(
            (
                arm.title,
                count,
                readings.estimate(arm.name, _SUCCESS, task),
                readings.estimate(arm.name, measure_named("return"), task),
                readings.estimate(arm.name, measure_named("tokens_per_decision"), task, mean),
                share,
            )
        )
    greedy = readings.estimate(REACTIVE, measure_named("success_greedy"), task)
    if greedy is not None:
        rows.append(("reactive, greedy", str(greedy.count), greedy, None, None, None))
    return ReportTable(
        f"success-{task}",
        f"{task}: held-out play",
        ("arm", "seeds", "success", "return", "tokens per decision", "share of the oracle's gain"),
        tuple(rows),
        "Success and return: interquartile mean over seeds (95% bootstrap interval), the same instances for every arm. "
        "Tokens are all that policy and world model write for a decision, those that the grammar forces included; the "
        "recurrent model and the oracle write none themselves, but the oracle lets the policy play the others. Share: "
        "(arm – reactive) / (oracle – reactive), means over seeds; none where the oracle's gain is not clear of 0. The "
        "oracle looks to the end of the episode, the learned models as many steps as the planner's horizon says.",
    )


def _costs(plan: Plan, readings: Readings, task: str) -> ReportTable:
    names = ("seconds_per_decision", "candidates", "advantage", "malformed_imaginations", "samples")
    rows: list[tuple[Entry, ...]] = []
    for arm in plan.arms:
        if readings.of(arm.name, task):
            found = [readings.estimate(arm.name, measure_named(name), task, mean) for name in names]
            rows.append((arm.title, *(each and each.value for each in found)))
    return ReportTable(
        f"costs-{task}",
        f"{task}: what a decision takes",
        (
            "arm", "seconds per decision", "different candidates", "mean return, best – worst", "malformed ways",
            "turns sampled instead",
        ),
        tuple(rows),
        "Means over seeds. Seconds are clock time beside other cells on the same machine, with many agents deciding at "
        "once.",
    )  # fmt: skip


def _targets(readings: Readings, tasks: Sequence[str]) -> list[Finding]:
    """The three targets, each said as it came out."""
    found: list[Finding] = []
    clear: dict[str, list[str]] = {}
    closed: dict[str, dict[str, float]] = {}
    for task in tasks:
        same = readings.estimate(SAME, _SUCCESS, task)
        for name in LEARNED:
            planned = readings.estimate(name, _SUCCESS, task)
            if planned is not None and same is not None and _apart(planned, same):
                clear.setdefault(name, []).append(task)
            share = gap_share(readings, name, task)
            if share is not None and share.value >= _GAP:
                closed.setdefault(name, {})[task] = share.value
    short = _short(readings)
    enough = [name for name, where in clear.items() if len(where) >= _ENOUGH_TASKS]
    beaten = "; ".join(f"{name} on {', '.join(where)}" for name, where in clear.items()) or "none on any task"
    found.append(
        Finding(
            f"Target: learned planning beats the reactive team of the same tokens on at least {_ENOUGH_TASKS} tasks, "
            f"intervals clear of each other. {'Met' if enough else 'Not met'}: {beaten}{short}.",
            bool(enough),
        )
    )
    gaps = [task for task in tasks if gap_share(readings, ORACLE, task) is not None]
    shares = (
        "; ".join(
            f"{name} on {', '.join(f'{task} ({share:.2f})' for task, share in where.items())}"
            for name, where in closed.items()
        )
        or "no arm on any task"
    )
    target = "Target: at least half of the oracle's gain over the reactive team, with one way of planning. "
    if gaps:
        met = any(set(gaps) <= set(where) for where in closed.values())
        text = (
            f"{'Met' if met else 'Not met'} on all tasks where the oracle's gain is clear ({', '.join(gaps)}): {shares}"
        )
        found.append(Finding(f"{target}{text}{short}.", met))
    else:
        found.append(Finding(f"{target}Not judged: the oracle's gain is clear on no task{short}.", False))
    compared = readings.compare(SHUFFLED, REACTIVE, _SUCCESS)
    if compared is not None:
        difference = compared.difference
        fails, holds = compared.verdict > 0, difference.high <= 0
        text = "FAILS" if fails else "Holds" if holds else "Not found to be better"
        found.append(
            Finding(
                f"Control: planning with a shuffled model is no better than reacting. {text}: the difference is "
                f"{difference.value:+.3f} (95%: {difference.low:+.3f} to {difference.high:+.3f}).",
                (fails or holds) and difference.count > 1,
            )
        )
    return found


def _apart(first: Estimate, second: Estimate) -> bool:
    """Is the first's interval above the second's? Of a single seed nobody can tell."""
    return first.low > second.high and min(first.count, second.count) > 1


def _short(readings: Readings) -> str:
    """How many cells of the arms that the targets are about are missing."""
    missing = sum(readings.failed(name) for name in (REACTIVE, SAME, *LEARNED, ORACLE))
    return f" ({missing} of their cells failed)" if missing else ""


_LEAN: Mapping[str, Any] = {"gate": {"min_gap": 0.0, "episodes": 16}, "keep_episodes": False, "adapters": "shared"}
_SMALL: Mapping[str, Any] = {"candidates": 3, "samples": 1, "horizon": 2}
SMOKE = Plan(
    arms=arms(
        _SMALL,
        {**_SMALL, "width": 2, "branch": 2},
        {"candidates": 3, "branch": 2, "rounds": 2, "leaves": 2, "horizon": 2},
    ),
    tasks=(
        ExperimentTask(
            "rendezvous",
            {
                **_LEAN,
                "task": "rendezvous",
                "params": {"size": 3, "landmarks": 2, "horizon": 4},
                "starter": {"layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "ffn": 32},
                "warm_start": {"episodes": 64, "steps": 15, "batch": 64},
                "grpo": {"iterations": 0},
                "world_model": {
                    "random_episodes": 16,
                    "scripted_episodes": 16,
                    "learner_episodes": 16,
                    "heldout_episodes": 4,
                    "training": {"steps": 4, "batch": 16},
                },
            },
        ),
    ),
    seeds=1,
    options={"episodes": 8, "mixture": {"random": 8, "scripted": 8, "learner": 8}, "recurrent": {"steps": 4}},
)
_SEARCH: Mapping[str, Any] = {"candidates": 8, "samples": 2, "horizon": 3}
_BEAM: Mapping[str, Any] = {"candidates": 8, "samples": 2, "horizon": 3, "width": 3, "branch": 2}
_TREE: Mapping[str, Any] = {"candidates": 8, "branch": 2, "rounds": 5, "leaves": 4, "horizon": 3}
_MIXTURE: Mapping[str, int] = {"random": 1500, "scripted": 1500, "learner": 1000}
_WORLD: Mapping[str, Any] = {"heldout_episodes": 10}
STANDARD = Plan(
    arms=arms(_SEARCH, _BEAM, _TREE),
    tasks=(
        ExperimentTask("rendezvous", {**_LEAN, "task": "rendezvous", "grpo": {"iterations": 0}, "world_model": _WORLD}),
        ExperimentTask(
            "box-push",
            {
                **_LEAN,
                "task": "box-push",
                "warm_start": {"episodes": 4000, "steps": 900},
                "grpo": {"iterations": 0},
                "world_model": _WORLD,
            },
        ),
        ExperimentTask(
            "pursuit",
            {
                **_LEAN,
                "task": "pursuit",
                "warm_start": {"episodes": 4000, "steps": 900},
                "grpo": {"iterations": 0},
                "world_model": _WORLD,
            },
        ),
    ),
    seeds=5,
    options={"episodes": 100, "mixture": _MIXTURE, "recurrent": {}},
)
FULL = Plan(
    arms=arms(
        {"candidates": 16, "samples": 4, "horizon": 5},
        {"candidates": 16, "samples": 4, "horizon": 5, "width": 4, "branch": 4},
        {"candidates": 16, "branch": 4, "rounds": 20, "leaves": 12, "horizon": 5},
    ),
    tasks=STANDARD.tasks,
    seeds=10,
    options={**STANDARD.options, "episodes": 200},
)

PLANNING = Experiment(
    name="planning",
    question=(
        "Does an agent that imagines what its candidates lead to, its teammates' actions included, act better than one "
        "that reacts, given as many generated tokens?"
    ),
    plans={Scale.SMOKE: SMOKE, Scale.STANDARD: STANDARD, Scale.FULL: FULL},
    work="preconcert.experiments.planning_work:plan_and_judge",
    report=report,
    limits=(
        "The teams are small starter models after their warm start; whether planning still pays for a team that has "
        "learned to the end is not asked.",
        "Planners take their teammates to react, although those plan too.",
        "What a candidate is worth (a lambda-return with lambda 0.5, and 0.05 times the logarithm of how often the "
        "policy proposed it) was tuned with one seed on training layouts of the same tasks. All arms that search share "
        "it, the controls included.",
        "The oracle arm searches with the same candidates, but to the end of the episode and by what is really paid "
        "there: its gain is what a perfect model and unlimited depth are worth together.",
        "Tokens are matched to best-of-K in the token model; beam and tree search write more or fewer, as the table "
        "says.",
    ),
)
