"""Experiment `channel`: what becomes of teams whose messages are lost, changed, late or cut, and does training help?

Arms are text (`slots`) and vectors (`latent`), each trained on a clean channel, on one that harms every message by
chance (`noisy`), and on one that is drawn anew for each task instance (`varied`: clean, dead, or harmed in one way);
and a team that never talks. Arms named `fallback` are teams of other arms with that silent team of the same seed to
fall back on where nothing is heard. Every team is played through the same grid of channels, one kind of harm at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from preconcert.experiments.communication import WORK, latent
from preconcert.experiments.communication_report import axes_of, legend_of, plain
from preconcert.experiments.experiment import CellResult, Experiment, ExperimentArm, ExperimentTask, Plan, Scale
from preconcert.experiments.figures import look
from preconcert.experiments.readings import Contrast, Readings, comparisons_table, measure_named
from preconcert.experiments.report import Entry, Finding, Report, ReportFigure, ReportTable

NONE = "none"
FORMS = {
    "text": ("slots", "slots-noisy", "slots-varied", "slots-fallback", "slots-noisy-fallback"),
    "latent": ("latent", "latent-noisy", "latent-varied", "latent-fallback"),
}
"""By form of message: the arm that was trained on a clean channel, and the others."""
TRAINED = {"text": ("slots-noisy", "slots-varied"), "latent": ("latent-noisy", "latent-varied")}
"""By form of message: the arms that were trained on bad channels."""
FALLEN = {"slots-fallback": "slots", "slots-noisy-fallback": "slots-noisy", "latent-fallback": "latent"}
"""Teams with another to fall back on, and what they are without."""
PATIENCE = 3
"""Steps after which those fall back."""
VARIED: Mapping[str, Mapping[str, Any]] = {
    "clean": {"weight": 2.0},
    "dead": {"drop": 1.0, "weight": 2.0},
    "late": {"delay": 3},
    "cut": {"cap_bits": 4.0},
}
"""What a task instance can meet in training; `garbled` is added, which words and vectors are in different ways."""
GRID: Mapping[str, tuple[tuple[str, Mapping[str, Any]], ...]] = {
    "erasure": tuple((f"{p:g}", {"drop": p}) for p in (0.0, 0.1, 0.3, 0.5, 1.0)),
    "substitution": tuple((f"{p:g}", {"drop": 0.0, "substitute": p}) for p in (0.1, 0.3, 0.6)),
    "noise": tuple((f"{s:g}", {"drop": 0.0, "noise": s}) for s in (0.15, 0.3, 0.6)),
    "delay": tuple((f"{d}", {"drop": 0.0, "delay": d}) for d in (1, 2, 4)),
    "cap": tuple((f"{b}", {"drop": 0.0, "cap_bits": float(b)}) for b in (0, 4, 8, 16, 32)),
}
"""By kind of harm its sizes and what they are in the channel. Training noise is off unless it is what is varied."""
_ONLY = {"text": ("erasure", "substitution", "delay", "cap"), "latent": ("erasure", "noise", "delay", "cap")}
_LEAN: Mapping[str, Any] = {"gate": {"min_gap": 0.0, "episodes": 16}, "keep_episodes": False, "adapters": "shared"}
CLEAN = "on"
MARGIN_NONE, MARGIN_CLEAN = 0.03, 0.02
"""Targets: at total erasure no further below the team that never talks; training with noise may cost so much."""


def channels(form: str) -> dict[str, Mapping[str, Any]]:
    """Every channel that teams with one form of message are played through, by name."""
    found: dict[str, Mapping[str, Any]] = {CLEAN: {"drop": 0.0, "substitute": 0.0, "noise": 0.0}}
    for kind in _ONLY[form]:
        for size, changed in GRID[kind]:
            found[f"{kind}_{size}"] = {"drop": 0.0, "substitute": 0.0, "noise": 0.0, **changed}
    return found


def arms() -> tuple[ExperimentArm, ...]:
    """Two forms of message with their ways of training, silence, and teams that can fall back on it."""

    def arm(name: str, title: str, changed: Mapping[str, Any], form: str, patience: int | None = None) -> ExperimentArm:
        options: dict[str, Any] = {"channels": channels(form)}
        if patience is not None:
            options["patience"] = patience
        return ExperimentArm(name, title, changed, options=options)

    vectors = {"agent.codec": latent(2)}
    lossy = {"channel": {"drop": 0.3, "substitute": 0.1}}
    return (
        ExperimentArm(NONE, "no messages", {"agent.spans.say": False}, options={"channels": {CLEAN: {}}}),
        arm("slots", "words, trained clean", {}, "text"),
        arm("latent", "vectors, trained clean", vectors, "latent"),
        arm("slots-noisy", "words, trained lossy", lossy, "text"),
        arm("latent-noisy", "vectors, trained lossy", {**vectors, "channel": {"drop": 0.3, "noise": 0.2}}, "latent"),
        arm(
            "slots-varied",
            "words, trained on varied channels",
            {"channels": {**VARIED, "garbled": {"substitute": 0.5}}},
            "text",
        ),
        arm(
            "latent-varied",
            "vectors, trained on varied channels",
            {**vectors, "channels": {**VARIED, "garbled": {"noise": 0.5}}},
            "latent",
        ),
        # Last, so that there is nothing left to train for them.
        arm("slots-fallback", "words, trained clean, with fallback", {}, "text", PATIENCE),
        arm("slots-noisy-fallback", "words, trained lossy, with fallback", lossy, "text", PATIENCE),
        arm("latent-fallback", "vectors, trained clean, with fallback", vectors, "latent", PATIENCE),
    )


_HOW = {"noisy": "lossy", "varied": "on varied channels"}
CONTRASTS = (
    *(
        Contrast(bad, FORMS[form][0], f"{form}: trained {_HOW[bad.split('-')[-1]]} – trained clean")
        for form, others in TRAINED.items()
        for bad in others
    ),
    *(
        Contrast(f"{form}-varied", f"{form}-noisy", f"{name}: trained on varied channels – trained lossy")
        for name, (form, *_) in FORMS.items()
    ),
)
"""Of the worst case."""
SILENCES = (
    *(Contrast(name, without, f"{name} – without falling back") for name, without in FALLEN.items()),
    *(Contrast(bad, FORMS[form][0], f"{bad} – {FORMS[form][0]}") for form, others in TRAINED.items() for bad in others),
)
"""Of total erasure."""


def worst(cell: CellResult) -> float | None:
    """A team's least success over the grid, but for total erasure and a cap of nothing: there nobody hears anything."""
    hopeless = ("success_erasure_1", "success_cap_0")
    found = [
        value
        for name, value in cell.measures.items()
        if name.startswith("success_") and name not in hopeless and value is not None
        and any(name.startswith(f"success_{kind}_") for kind in GRID)
    ]
    return min(found) if found else None


def report(plan: Plan, cells: Sequence[CellResult]) -> Report:
    """The grid, the targets, the planned comparisons of the worst case, and curves."""
    readings = Readings(cells)
    table, said = comparisons_table(readings, CONTRASTS, worst, "the worst case of the grid")
    silent, told = comparisons_table(readings, SILENCES, measure_named("success_erasure_1"), "success at total erasure")
    tasks = [task.name for task in plan.tasks]
    tables = [_grid(plan, readings, task, form) for task in tasks for form in FORMS]
    tables += [each for each in (table, replace(silent, name="comparisons-erasure")) if each.rows]
    figures = [
        ReportFigure(
            f"robustness-{task}-{form}",
            f"{task}, {'words' if form == 'text' else 'vectors'}: held-out success against the size of each harm, "
            "interquartile means over seeds with 95% bootstrap intervals. Dashed: the team that never talks.",
            _curves(plan, readings, task, form),
        )
        for task in tasks
        for form in FORMS
        if any(readings.of(name, task) for name in FORMS[form])
    ]
    return Report([*_targets(readings, tasks), *said, *told], tables, figures)


def _grid(plan: Plan, readings: Readings, task: str, form: str) -> ReportTable:
    titles = {arm.name: arm.title for arm in plan.arms}
    rows: list[tuple[Entry, ...]] = []
    for name in (*FORMS[form], NONE):
        if not readings.of(name, task):
            continue
        found = [readings.estimate(name, measure_named(f"success_{key}"), task) for key in channels(form)]
        rows.append((titles[name], len(readings.of(name, task)), *found, readings.estimate(name, worst, task)))
    heads = tuple("clean" if key == CLEAN else key.replace("_", " ") for key in channels(form))
    return ReportTable(
        f"grid-{task}-{form}",
        f"{task}: held-out success by channel, {'words' if form == 'text' else 'vectors'}",
        ("arm", "seeds", *heads, "worst case"),
        tuple(rows),
        "Interquartile mean over seeds (95% bootstrap interval), the same instances for every arm and channel. Delay "
        "in steps beyond the one that every message takes; caps in bits per message; noise in units of the numbers, "
        "which go from -1 to 1. Worst case: the least of the row, but for total erasure and a cap of 0.",
    )


def _targets(readings: Readings, tasks: Sequence[str]) -> list[Finding]:
    found: list[Finding] = []
    for task in tasks:
        none = readings.estimate(NONE, measure_named("success_on"), task)
        for form, (clean, *others) in FORMS.items():
            for name in (clean, *others):
                lost = readings.estimate(name, measure_named("success_erasure_1"), task)
                if lost is None or none is None:
                    continue
                good = lost.value >= none.value - MARGIN_NONE
                found.append(
                    Finding(
                        f"{task}, {name}. Target: at total erasure at most {100 * MARGIN_NONE:.0f} points below the "
                        f"team that never talks ({none.value:.2f}). {'Met' if good else 'Not met'}: {lost.value:.2f}.",
                        good,
                    )
                )
            found += [
                each for name in TRAINED[form] if (each := _worst_case(readings, task, form, clean, name)) is not None
            ]
    return found


def _worst_case(readings: Readings, task: str, form: str, clean: str, bad: str) -> Finding | None:
    """Does training on bad channels make the worst case better, and what does it cost?"""
    plain_, harmed = (readings.estimate(name, measure_named("success_on"), task) for name in (clean, bad))
    before, after = (readings.estimate(name, worst, task) for name in (clean, bad))
    compared = readings.compare(bad, clean, worst, task)
    if plain_ is None or harmed is None or before is None or after is None or compared is None:
        return None
    gain = compared.difference
    good = gain.low > 0 and gain.count > 1 and harmed.value >= plain_.value - MARGIN_CLEAN
    return Finding(
        f"{task}, {form}, {bad}. Target: training with noise improves the worst case at no more than "
        f"{100 * MARGIN_CLEAN:.0f} points of clean success. {'Met' if good else 'Not met'}: worst case "
        f"{before.value:.2f} to {after.value:.2f} (paired difference {gain.value:+.2f}, {gain.low:+.2f} to "
        f"{gain.high:+.2f}), clean {plain_.value:.2f} to {harmed.value:.2f}.",
        good,
    )


def _curves(plan: Plan, readings: Readings, task: str, form: str) -> Figure:
    figure = Figure(figsize=(14.0, 3.9), layout="constrained")
    axes = axes_of(figure, len(_ONLY[form]))
    none = readings.estimate(NONE, measure_named("success_on"), task)
    for axis, kind in zip(axes, _ONLY[form], strict=True):
        names = [size for size, _ in GRID[kind]]
        places = names if kind in ("erasure", "cap") else ["0", *names]
        for number, arm in enumerate(arm for arm in plan.arms if arm.name in FORMS[form]):
            keys = [f"success_{kind}_{size}" for size in names]
            keys = keys if kind in ("erasure", "cap") else ["success_on", *keys]
            found = [readings.estimate(arm.name, measure_named(key), task) for key in keys]
            held = [(place, each) for place, each in enumerate(found) if each is not None]
            if len(held) < len(keys):
                continue
            colour, mark = look(number)
            axis.fill_between(
                [place for place, _ in held],
                [each.low for _, each in held],
                [each.high for _, each in held],
                color=colour,
                alpha=0.12,
                lw=0,
            )
            axis.plot(
                [place for place, _ in held],
                [each.value for _, each in held],
                color=colour,
                marker=mark,
                ms=4,
                lw=1.5,
                label=arm.title,
            )
        if none is not None:
            axis.axhline(none.value, color="#5f6673", lw=1, ls="--")
        axis.set_xticks(range(len(places)), places)
        plain(axis, kind, "")
    axes[0].set_ylabel("success", fontsize=9)
    legend_of(figure, axes)
    return figure


SMOKE = Plan(
    arms=tuple(arm for arm in arms() if arm.name in (NONE, "latent", "latent-varied", "latent-fallback")),
    tasks=(
        ExperimentTask(
            "rendezvous",
            {
                **_LEAN,
                "task": "rendezvous",
                "params": {"size": 3, "landmarks": 2, "horizon": 4},
                "starter": {"layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "ffn": 32},
                "warm_start": {"episodes": 64, "steps": 15, "batch": 64},
                "latent_start": {"steps": 3, "batch": 4},
                "grpo": {"iterations": 2, "seeds": 2, "group": 2, "minibatches": 2, "checkpoint_every": 1},
            },
        ),
    ),
    seeds=2,
    options={"episodes": 8, "fitting": 8},
)
STANDARD = Plan(
    arms=arms(),
    tasks=(
        ExperimentTask(
            "rendezvous", {**_LEAN, "task": "rendezvous", "grpo": {"iterations": 60, "seeds": 16, "group": 8}}
        ),
    ),
    seeds=5,
    options={"episodes": 100, "fitting": 20},
)
FULL = Plan(
    arms=arms(),
    tasks=(
        ExperimentTask("rendezvous", {**_LEAN, "task": "rendezvous", "grpo": {"iterations": 120}}),
        ExperimentTask(
            "box-push",
            {
                **_LEAN,
                "task": "box-push",
                "warm_start": {"episodes": 8000, "steps": 2000},
                "grpo": {"iterations": 60, "hindsight_weight": 0.1},
            },
        ),
    ),
    seeds=10,
    options={"episodes": 200, "fitting": 50},
)

CHANNEL = Experiment(
    name="channel",
    question=(
        "How much of what a team gains by talking is left when messages are lost, changed, late or cut short, and does "
        "it help to have learned on such a channel?"
    ),
    plans={Scale.SMOKE: SMOKE, Scale.STANDARD: STANDARD, Scale.FULL: FULL},
    work=WORK,
    report=report,
    limits=(
        "One harm at a time; nobody is told which one, or that there is any.",
        "The lossy channel of training erases three in ten messages and changes one word in ten, or shakes numbers by "
        "0.2; delays and caps are trained with on varied channels alone.",
        f"A team that can fall back is two teams, of twice the training: its agents act as the silent one does from "
        f"step {PATIENCE} on for as long as nothing at all has arrived. {PATIENCE} of 1, 2 and 3 was chosen on "
        "training instances of seed 0, with the first seed's teams trained clean.",
        "Varied channels are also met in the warm start, as far as messages are lost or late; lossy ones in "
        "reinforcement learning alone. Vectors are learned from words on a clean channel.",
        "Teams are judged on kinds of harm that varied channels train with: nothing is said of harms that nobody has "
        "met.",
        "The worst case is the least of some fifteen noisy figures, and so lies below each of them in expectation.",
        "Models are starters of about 0.13 million parameters; at standard scale the task is rendezvous alone.",
    ),
)
