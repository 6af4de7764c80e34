"""Experiment `world-model`: how far what a world model imagines can be trusted, step by step on held-out layouts.

All models of a task and seed are asked about the same held-out moments, and about plans of the same learner, a
warm-started team. Those that are fitted to play learn from the same play. A token model whose prompts are other ones
has a base of its own, which was shown such prompts, and has learned from the play of the team on that base.

Parts: `Subject` (the models), `fit_and_measure` (the work of a cell), the plans and `WORLD_MODEL`. What is made of the
cells is in `world_model_report.py`, what is measured in `world_models/fidelity.py` and `world_models/consistency.py`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from preconcert.agents import ChannelSettings
from preconcert.core import Episode, Policy, WorldModel, derive_seed
from preconcert.experiments.cell import CellFound
from preconcert.experiments.evaluation import Players
from preconcert.experiments.experiment import Experiment, ExperimentArm, ExperimentTask, Plan, Scale, overridden
from preconcert.experiments.world_data import (
    Mixture,
    coverage,
    heldout_cases,
    imitated_with,
    mixed_play,
    shared_play,
    shared_run,
    valued_by,
)
from preconcert.experiments.world_model_report import report
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter
from preconcert.training.rollout import EpisodeSpec, rollout
from preconcert.training.world_stage import load_world_model, world_settings
from preconcert.world_models import CopyLast, CountTable, RecurrentWorldModel, ShuffledWorldModel, TokenWorldModel
from preconcert.world_models.consistency import Recital, claims, consistency_of, play_inside, success_threshold
from preconcert.world_models.fidelity import Case, Mode, measure_fidelity
from preconcert.world_models.recurrent import RecurrentSettings
from preconcert.world_models.recurrent_training import train_recurrent

_TEAM = "team"
"""Folder of the team that plays, where that is not the cell's own."""


class Subject(StrEnum):
    """The models that are measured."""

    TOKEN = "token"
    RECURRENT = "recurrent"
    COPY_LAST = "copy-last"
    COUNT_TABLE = "count-table"
    SHUFFLED = "shuffled"
    """The token model, its answers exchanged between episodes."""


def fit_and_measure(
    recipe: Recipe, folder: Path, options: Mapping[str, Any], warm_cache: Path, reporter: Reporter
) -> CellFound:
    """Make the team and its token world model in FOLDER/run, fit the cell's own model, and measure it.

    Args:
        recipe: of the run, with a `world_model` and without reinforcement learning.
        folder: of the cell.
        options: `subject`, the model; `free`, whether the token model writes without its grammar; `heldout`, the
            episodes that are asked about, by who plays them; `plays_as`, overrides by dotted key that make the recipe
            of the team that plays, where the cell's own is another one; `greedy`, whether models say what they find
            likeliest, word by word, instead of drawing; `starts` per episode; `horizons`; `samples` per start;
            `plans`, held-out instances that the policy plays inside the model; `recurrent`, settings.
        warm_cache: shared warm starts and play.
        reporter: receives progress.
    """
    started = time.perf_counter()
    run = shared_run(recipe, folder, warm_cache, reporter)
    players = Players(run, recipe)
    played_by, team = recipe, players
    if options.get("plays_as"):
        played_by = overridden(recipe, options["plays_as"])
        team = Players(shared_run(played_by, folder / _TEAM, warm_cache, reporter), played_by)
    learner = team.team(warm=True)
    world = world_settings(recipe)
    mixture = Mixture(
        world.random_episodes, world.scripted_episodes, world.learner_episodes, imitated_with(recipe)
    )
    episodes = shared_play(played_by, learner, mixture, folder, warm_cache, reporter)
    heldout = Mixture(**options["heldout"])
    held = mixed_play(played_by, learner, heldout, "heldout", 0, reporter)
    horizons = tuple(options["horizons"])
    cases = heldout_cases(held, horizons, int(options["starts"]), heldout)
    model = _fitted(Subject(options["subject"]), players, run, episodes, mixture, options, reporter)
    fitted = time.perf_counter()

    measures: dict[str, float | None] = dict(coverage(episodes, cases))
    curves: dict[str, Sequence[float | None]] = {}
    for mode in Mode:
        reporter.stage(f"fidelity, mode {mode}", len(cases))
        found = measure_fidelity(model, cases, mode, horizons, int(options["samples"]), seed=0)
        measures |= found.measures(mode)
        measures |= {f"cases_{h}": float(count) for h, count in found.cases.items()}
        curves[f"mse_{mode}"], curves[f"exact_{mode}"] = found.mse, found.exact
        if mode is Mode.IMAGINED:
            for h, bins in found.reliability.items():
                for part, values in zip(("said", "was", "count"), zip(*bins, strict=True), strict=False):
                    curves[f"reliability_{part}_{h}"] = [float(value) for value in values]
    # Whether plans come true is a matter of probabilities, so here what is imagined is drawn.
    _draw(model)
    measures |= _consistency(
        model, team.team(warm=True), episodes, held, cases, int(options["plans"]), recipe.channel, reporter
    )
    shutil.rmtree(folder / _TEAM, ignore_errors=True)  # the cache has it
    measures["fit_s"] = fitted - started
    measures["measure_s"] = time.perf_counter() - fitted
    return CellFound(measures, curves)


def _fitted(
    subject: Subject,
    players: Players,
    run: Path,
    episodes: Sequence[Episode],
    mixture: Mixture,
    options: Mapping[str, Any],
    reporter: Reporter,
) -> WorldModel:
    language, seed = players.env.language, players.recipe.seed
    if subject is Subject.COPY_LAST:
        return CopyLast(episodes, language)
    greedy = bool(options["greedy"])
    if subject is Subject.COUNT_TABLE:
        return CountTable(episodes, language, greedy=greedy)
    if subject is Subject.RECURRENT:
        settings = RecurrentSettings(**options["recurrent"])
        reporter.stage("recurrent world model", settings.steps)
        recurrent = train_recurrent(
            episodes,
            language,
            settings,
            seed,
            lambda step, loss: reporter.advance(step, f"loss {loss:.2f}"),
            valued_by(players.recipe, mixture),
        )
        recurrent.greedy = greedy
        return recurrent
    token = load_world_model(run, players.model)
    changes = {"constrained": not options.get("free", False), "temperature": 0.0 if greedy else 1.0}
    token.settings = token.settings.model_copy(update=changes)
    return ShuffledWorldModel(token, seed) if subject is Subject.SHUFFLED else token


def _draw(model: WorldModel) -> None:
    """Let a model draw what it imagines from here on."""
    inner = model.inner if isinstance(model, ShuffledWorldModel) else model
    if isinstance(inner, TokenWorldModel):
        inner.settings = inner.settings.model_copy(update={"temperature": 1.0})
    elif isinstance(inner, CountTable | RecurrentWorldModel):
        inner.greedy = False


def _consistency(
    model: WorldModel,
    policy: Policy,
    episodes: Sequence[Episode],
    held: Sequence[Episode],
    cases: Sequence[Case],
    plans: int,
    channel: ChannelSettings,
    reporter: Reporter,
) -> dict[str, float | None]:
    """Verdicts on played and on imagined plans; see `consistency.py`."""
    judged = [each for each in episodes if each.success is not None]
    if not judged:
        return {}
    first = next(iter(judged[0].trajectories))
    threshold = success_threshold(
        [each.trajectories[first].total_reward for each in judged], [bool(each.success) for each in judged]
    )
    whole = [case for case in cases if case.request.observation.step == 0]
    solved = {f"held-{number}@0": bool(each.success) for number, each in enumerate(held)}
    reporter.stage("consistency, played plans", len(whole))
    played = consistency_of(
        claims(model, whole, threshold), [solved[case.request.episode] for case in whole]
    )
    # The same instances for all; every agent takes its turn at planning.
    first_views = {case.request.episode: [] for case in whole}  # type: dict[str, list[Case]]
    for case in whole:
        first_views[case.request.episode].append(case)
    chosen = [views[number % len(views)] for number, views in enumerate(list(first_views.values())[:plans])]
    reporter.stage("consistency, imagined plans", len(chosen))
    horizon = max(len(case.outcomes) for case in whole)
    # Whoever played the instance, the partners are the policy's own team now.
    requests = [replace(case.request, partners=None) for case in chosen]
    inside = play_inside(model, policy, requests, horizon, threshold, derive_seed("inside plans"))
    reporter.stage("consistency, plans carried out", len(chosen))
    instances = [held[int(case.request.episode.removeprefix("held-").partition("@")[0])] for case in chosen]
    specs = [
        EpisodeSpec(each.task, each.params, each.seed, each.split, sample=number)
        for number, each in enumerate(instances)
    ]
    recital = Recital(
        policy,
        {spec.name: (case.request.agent, each.moves) for spec, case, each in zip(specs, chosen, inside, strict=True)},
    )
    carried = rollout(specs, recital, channel, derive_seed("inside plans"))
    free = rollout(specs, policy, channel, derive_seed("inside plans"))
    imagined = consistency_of([each.claimed for each in inside], [bool(each.success) for each in carried])
    real = sum(bool(each.success) for each in free) / len(free)
    found: dict[str, float | None] = {"success_threshold": threshold}
    for name, each in (("played", played), ("inside", imagined)):
        found |= {
            f"{name}_plans": float(each.plans), f"{name}_claimed": each.claimed, f"{name}_kept": each.kept,
            f"{name}_ratio": each.ratio, f"{name}_agreement": each.agreement, f"{name}_trusted": each.trusted,
        }  # fmt: skip
    found |= {"free_success": real, "free_ratio": real / imagined.claimed if imagined.claimed else None}
    return found


ARMS = (
    ExperimentArm("token", "token model", options={"subject": "token"}),
    ExperimentArm("token-free", "token model, without grammar", options={"subject": "token", "free": True}),
    ExperimentArm(
        "token-untold",
        "token model, not told who plays",
        {"world_model.tell_partners": False},
        options={"subject": "token", "plays_as": {"world_model.tell_partners": True}},
        tasks=("rendezvous",),
    ),
    ExperimentArm(
        "token-wordless",
        "token model, own words forgotten",
        {"world_model.own_words": False},
        options={"subject": "token", "plays_as": {"world_model.own_words": True}},
        tasks=("rendezvous", "box-push"),
    ),
    ExperimentArm(
        "token-recalling",
        "token model, three earlier moments shown",
        {"world_model.recall": 3},
        options={"subject": "token", "plays_as": {"world_model.recall": 0}},
        tasks=("rendezvous", "pursuit"),
    ),
    ExperimentArm("recurrent", "recurrent model", options={"subject": "recurrent"}),
    ExperimentArm("copy-last", "copy last", options={"subject": "copy-last"}),
    ExperimentArm("count-table", "count table", options={"subject": "count-table"}),
    ExperimentArm("shuffled", "token model, shuffled", options={"subject": "shuffled"}),
)
_LEAN: Mapping[str, Any] = {
    "gate": {"min_gap": 0.0, "episodes": 16}, "keep_episodes": False, "grpo": {"iterations": 0}, "adapters": "shared",
}  # fmt: skip
_SMOKE_WORLD: Mapping[str, Any] = {
    "random_episodes": 16, "learner_episodes": 16, "scripted_episodes": 32, "heldout_episodes": 4,
    "training": {"steps": 4, "batch": 16},
}  # fmt: skip
SMOKE = Plan(
    arms=ARMS,
    tasks=(
        ExperimentTask(
            "rendezvous",
            {
                **_LEAN,
                "task": "rendezvous",
                "params": {"size": 3, "landmarks": 2, "horizon": 5},
                "starter": {"layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "ffn": 32},
                "warm_start": {"episodes": 64, "steps": 15, "batch": 64},
                "world_model": _SMOKE_WORLD,
            },
        ),
    ),
    seeds=1,
    options={
        "greedy": True, "heldout": {"random": 2, "scripted": 3, "learner": 2},
        "starts": 2, "horizons": (1, 5), "samples": 1, "plans": 4,
        "recurrent": {"state": 16, "groups": 4, "classes": 4, "hidden": 32, "steps": 20, "batch": 16},
    },
)  # fmt: skip
_TASKS: Mapping[str, Mapping[str, Any]] = {
    "rendezvous": {"params": {"size": 9, "horizon": 32}},
    "box-push": {"params": {"size": 8, "horizon": 40, "push": 3}},
    "pursuit": {"params": {"horizon": 32}},
}
"""In sizes whose episodes last to the longest horizon."""


def _tasks(warm_start: Mapping[str, Any], world_model: Mapping[str, Any]) -> tuple[ExperimentTask, ...]:
    return tuple(
        ExperimentTask(
            name, {**_LEAN, "task": name, **given, "warm_start": dict(warm_start), "world_model": dict(world_model)}
        )
        for name, given in _TASKS.items()
    )


_WORLD: Mapping[str, Any] = {
    "random_episodes": 400, "scripted_episodes": 400, "learner_episodes": 200, "heldout_episodes": 6,
}  # fmt: skip
STANDARD = Plan(
    arms=ARMS,
    tasks=_tasks({"episodes": 800, "steps": 600}, _WORLD),
    seeds=5,
    options={
        "greedy": True, "heldout": {"random": 15, "scripted": 20, "learner": 15},
        "starts": 4, "horizons": (1, 5, 10, 20), "samples": 1, "plans": 100, "recurrent": {},
    },
)  # fmt: skip
FULL = Plan(
    arms=ARMS,
    tasks=_tasks({"episodes": 3000, "steps": 2000}, {}),
    seeds=10,
    options={
        "greedy": True, "heldout": {"random": 40, "scripted": 60, "learner": 40},
        "starts": 4, "horizons": (1, 5, 10, 20), "samples": 2, "plans": 140, "recurrent": {"steps": 6000},
    },
)  # fmt: skip

WORLD_MODEL = Experiment(
    name="world-model",
    question=(
        "How far ahead is what a world model imagines still true on layouts that it has never seen, with its "
        "teammates' actions given and without, and do plans that succeed in it succeed in the world?"
    ),
    plans={Scale.SMOKE: SMOKE, Scale.STANDARD: STANDARD, Scale.FULL: FULL},
    work="preconcert.experiments.world_model:fit_and_measure",
    report=report,
    limits=(
        "The token model is an adapter of a small starter model, and its base has been fine-tuned on the same rows; a "
        "pretrained model is not measured here.",
        "The token model is told whose play it is asked about (at random, by the script, or by the team), as an agent "
        "knows its own team; one that is not told is measured on rendezvous. The recurrent model can only gather it "
        "from what came before, the tables not at all.",
        "All models say what they find likeliest, word by word: that suits squared errors and exact matches. A planner "
        "draws instead, and a drawn guess at something that cannot be known has a larger squared error. Probabilities "
        "(negative log-likelihoods, ends, teammates' actions) do not depend on it, and where plans are carried out all "
        "models draw.",
        "The token model goes on from what the agent has before it, not from all that it saw: what a partner said two "
        "steps ago may be contradicted by what it is imagined to say now. Over 30 steps that makes imagined teamwork "
        "worse than real teamwork. One that is shown three earlier moments is measured on rendezvous and pursuit.",
        "Half of the moments that are asked about are chosen such that a horizon falls on the last step, so ends are "
        "commoner than in play, and AUROC is not the share of ends that would be found there.",
        "What an agent cannot see (a partner out of sight, the open landmark before it is named) is part of the "
        "success that played plans are judged by: even a perfect model of one agent's view cannot know it.",
        "A token model whose prompts are other ones (untold, own words forgotten, earlier moments shown) has a base of "
        "its own and has learned from that base's team; what it is asked about is the play of the others' team.",
        "The recurrent model is of about the token model's size and is trained from nothing for as long as stated; it "
        "might be better with more training.",
    ),
)
