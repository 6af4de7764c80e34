"""Experiment `two-bases`: can agents with different base models act together through vectors?

One agent is Qwen3-shaped, the other Llama-shaped and wider; what they exchange is k × d quantised numbers. Both are
warm-started apart on an expert's play and then learn to talk together, supervised (`training/mixed.py`). The arm
`one-base` is the same with one architecture for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preconcert.agents import ChannelMode
from preconcert.experiments.bars import bars_figure
from preconcert.experiments.cell import CellFound
from preconcert.experiments.communication_work import rate
from preconcert.experiments.evaluation import heldout_specs, no_message_ceiling
from preconcert.experiments.experiment import CellResult, Experiment, ExperimentArm, ExperimentTask, Plan, Scale
from preconcert.experiments.readings import Readings, measure_named
from preconcert.experiments.report import Entry, Finding, Report, ReportFigure, ReportTable
from preconcert.training.measures import wilson
from preconcert.training.mixed import MixedTeam, train_mixed
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter
from preconcert.training.rollout import rollout

_MODES = (ChannelMode.ON, ChannelMode.SHUFFLED, ChannelMode.CONSTANT, ChannelMode.OFF)
TWO, ONE = "two-bases", "one-base"


def mix_and_judge(
    recipe: Recipe, folder: Path, options: Mapping[str, Any], warm_cache: Path, reporter: Reporter
) -> CellFound:
    """Train a mixed team in FOLDER/team and play held-out instances with its messages and with the controls.

    Args:
        recipe: of all agents.
        folder: of the cell.
        options: `episodes`; `bases`, by agent what is different in its recipe.
        warm_cache: shared warm starts.
        reporter: receives progress.
    """
    out = train_mixed(recipe, options["bases"], folder / "team", reporter, warm_cache)
    specs = heldout_specs(recipe, int(options["episodes"]), 0)
    measures: dict[str, float | None] = {"ceiling": no_message_ceiling(recipe)}
    for greedy in (False, True):
        team = MixedTeam.load(out, 0.0 if greedy else 1.0)
        for mode in _MODES if not greedy else (ChannelMode.ON,):
            reporter.stage(f"held-out play, {mode.value}", len(specs))
            episodes = rollout(specs, team.policies, recipe.channel.model_copy(update={"mode": mode}), 0)
            measures[f"success_{'greedy' if greedy else mode.value}"] = rate(episodes)
            if mode is ChannelMode.ON and not greedy:
                turns = [turn for e in episodes for t in e.trajectories.values() for turn in t.turns]
                sent = [turn.message for turn in turns if turn.message is not None]
                measures["bits"] = sum(message.raw_bits for message in sent) / len(episodes)
                measures["malformed"] = sum(turn.malformed for turn in turns) / len(turns)
    return CellFound(measures, {})


def report(plan: Plan, cells: Sequence[CellResult]) -> Report:
    """Success with messages and with the controls, beside what no team without messages can reach."""
    readings = Readings(cells)
    instances = int(plan.options["episodes"])
    columns = ("on", "greedy", "shuffled", "constant", "off")
    findings: list[Finding] = []
    tables: list[ReportTable] = []
    for task in plan.tasks:
        rows: list[tuple[Entry, ...]] = []
        for arm in plan.arms:
            found = [readings.estimate(arm.name, measure_named(f"success_{name}"), task.name) for name in columns]
            bits = readings.estimate(arm.name, measure_named("bits"), task.name)
            ceiling = readings.estimate(arm.name, measure_named("ceiling"), task.name)
            failed = readings.failed(arm.name, task.name)
            count = f"{len(readings.of(arm.name, task.name))}" + (f" ({failed} failed)" if failed else "")
            rows.append((arm.title, count, *found, bits, None if ceiling is None else ceiling.value))
            if found[0] is not None and ceiling is not None:
                success = found[0]
                # All seeds play the same instances, whose luck is in no interval over seeds.
                least = wilson(round(success.value * instances), instances)[0]
                good = min(success.low, least) > ceiling.value and success.count > 1
                findings.append(
                    Finding(
                        f"{task.name}, {arm.title}. Target: clearly above the {ceiling.value:.2f} that no team without "
                        f"messages exceeds. {'Met' if good else 'Not met'}: {success.value:.2f} ({success.low:.2f} "
                        f"to {success.high:.2f} over seeds; the luck of {instances} instances alone leaves "
                        f"{least:.2f}).",
                        good,
                    )
                )
        tables.append(
            ReportTable(
                f"success-{task.name}",
                f"{task.name}: held-out play",
                (
                    "arm", "seeds", "success, sampled", "success, greedy", "messages shuffled", "constant", "off",
                    "bits per episode", "ceiling without messages",
                ),
                tuple(rows),
                "Interquartile mean over seeds (95% bootstrap interval), the same instances for every arm and control.",
            )
        )  # fmt: skip
    figure = ReportFigure(
        "success",
        "Held-out success of sampled play with messages as sent and with the controls.",
        bars_figure(
            {
                f"{task.name}, {arm.title}": [
                    (name, readings.estimate(arm.name, measure_named(f"success_{name}"), task.name))
                    for name in columns
                    if name != "greedy"
                ]
                for task in plan.tasks
                for arm in plan.arms
            },
            "success",
        ),
    )
    return Report(findings, tables, [figure])


def arms(other: Mapping[str, Any]) -> tuple[ExperimentArm, ...]:
    """Different bases, and the same with one architecture."""
    return (
        ExperimentArm(TWO, "Qwen3- and Llama-shaped", options={"bases": {"agent_1": dict(other)}}),
        ExperimentArm(ONE, "both Qwen3-shaped", options={"bases": {}}),
    )


def _task(warm: Mapping[str, Any], latent: Mapping[str, Any], **more: Any) -> ExperimentTask:
    codec = {"type": "latent", "tokens": 2, "dims": 4, "levels": 5}
    recipe = {
        "task": "rendezvous",
        "agent": {"codec": codec},
        "warm_start": {"player": "expert", **warm},
        "latent_start": dict(latent),
        **more,
    }
    return ExperimentTask("rendezvous", recipe)


_LLAMA = {"starter": {"family": "llama", "layers": 2, "width": 96, "heads": 4, "kv_heads": 2, "ffn": 160}}
_TINY = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "ffn": 32}
SMOKE = Plan(
    arms=arms({"starter": {**_TINY, "family": "llama", "width": 48}}),
    tasks=(
        _task(
            {"episodes": 64, "steps": 10, "batch": 32},
            {"steps": 3, "batch": 4},
            params={"size": 3, "landmarks": 2, "horizon": 4},
            starter=_TINY,
        ),
    ),
    seeds=2,
    options={"episodes": 8},
)
STANDARD = Plan(
    arms=arms(_LLAMA),
    tasks=(_task({"episodes": 2500, "steps": 500}, {"steps": 250}),),
    seeds=5,
    options={"episodes": 100},
)
FULL = Plan(
    arms=arms(_LLAMA),
    tasks=(_task({"episodes": 6000, "steps": 1000}, {"steps": 600}),),
    seeds=10,
    options={"episodes": 200},
)

TWO_BASES = Experiment(
    name="two-bases",
    question="Can agents with different base models, widths and weights act together through a few quantised numbers?",
    plans={Scale.SMOKE: SMOKE, Scale.STANDARD: STANDARD, Scale.FULL: FULL},
    work="preconcert.experiments.two_bases:mix_and_judge",
    report=report,
    limits=(
        "Both bases are starters of about 0.1 to 0.2 million parameters with the same words; tokenizers that differ "
        "are covered by a test, not by this figure.",
        "The teams imitate an expert that always says what it knows and never look further: only the supervised phase "
        "runs over several bases.",
        "The sender writes its message in the task's words before it puts it into numbers; the words are not sent.",
    ),
)
