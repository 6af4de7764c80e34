"""The work of a cell of experiment `planning`: a warm-started team with its world model, played by one arm.

Everything before the play is the same for all arms of a task and seed and comes out of the shared cache.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from preconcert.agents import GenerativeTeam
from preconcert.agents.planners import Choice, PlannerSettings, PlanningTeam, SameTokensTeam, samples_for
from preconcert.core import Episode, Policy, WorldModel
from preconcert.experiments.cell import CellFound
from preconcert.experiments.evaluation import Players, heldout_specs, play
from preconcert.experiments.world_data import Mixture, imitated_with, shared_play, shared_run, valued_by
from preconcert.training.measures import measure
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter
from preconcert.training.rollout import EpisodeSpec
from preconcert.training.world_stage import load_world_model
from preconcert.world_models import OracleWorldModel, ShuffledWorldModel
from preconcert.world_models.recurrent import RecurrentSettings
from preconcert.world_models.recurrent_training import train_recurrent

_CALIBRATION = 8
"""Instances on which the planner's tokens are counted for the reactive team that may use as many."""


class Imagines(StrEnum):
    """What an arm plans with."""

    NOTHING = "nothing"
    """It reacts."""
    SAME_TOKENS = "same-tokens"
    """It reacts, with as many tokens as the planner of the options writes: the likeliest of its turns."""
    SELF_CONSISTENCY = "self-consistency"
    """The same with the commonest of its turns."""
    TOKEN = "token"
    RECURRENT = "recurrent"
    ORACLE = "oracle"
    SHUFFLED = "shuffled"


def plan_and_judge(
    recipe: Recipe, folder: Path, options: Mapping[str, Any], warm_cache: Path, reporter: Reporter
) -> CellFound:
    """Make the team and its world model in FOLDER/run, and play held-out instances.

    Args:
        recipe: of the run.
        folder: of the cell.
        options: `episodes`; `imagines`, what the arm plans with; `planner`, the settings of its search; for the
            recurrent model `mixture`, the episodes that it learns from, by who plays them (those of the warm start that
            the token model's base learned from come on top), and `recurrent`, its steps.
        warm_cache: shared warm starts.
        reporter: receives progress.
    """
    run = shared_run(recipe, folder, warm_cache, reporter)
    players = Players(run, recipe)
    specs = heldout_specs(recipe, int(options["episodes"]), 0)
    imagines = Imagines(options["imagines"])
    settings: PlannerSettings = TypeAdapter(PlannerSettings).validate_python(options["planner"])
    found: dict[str, float | None] = {}
    policy: Policy
    if imagines is Imagines.NOTHING:
        policy = players.team()
        reporter.stage("held-out play, greedy", len(specs))
        greedy = play(specs, players.team(greedy=True), recipe.channel, 0, reporter)
        found["success_greedy"] = _success(greedy, players)
    elif imagines in (Imagines.SAME_TOKENS, Imagines.SELF_CONSISTENCY):
        choice = Choice.LIKELIEST if imagines is Imagines.SAME_TOKENS else Choice.COMMONEST
        policy = _same_tokens(players, run, settings, choice, specs[:_CALIBRATION], found)
    else:
        team = players.team()
        world = _world(imagines, players, team, run, folder, options, warm_cache, reporter)
        policy = PlanningTeam(team, world, settings)
    reporter.stage("held-out play", len(specs))
    started = time.perf_counter()
    played = play(specs, policy, recipe.channel, 0, reporter)
    seconds = time.perf_counter() - started
    measures = measure(played, players.env.language, recipe.agent.spans)
    decisions = sum(len(mine.turns) for episode in played for mine in episode.trajectories.values())
    tokens = getattr(policy, "tokens_generated", 0)
    found |= {
        "success": measures.success_rate,
        "return": measures.return_mean,
        "malformed": measures.malformed_rate,
        "decisions": float(decisions),
        "tokens_per_decision": tokens / decisions,
        "seconds_per_decision": seconds / decisions,
        **foresight(played),
    }
    return CellFound(found, {})


def foresight(episodes: Sequence[Episode]) -> dict[str, float | None]:
    """How planned decisions were weighed: candidates per decision, and how often the policy's own turn was replaced."""
    turns = [turn for episode in episodes for mine in episode.trajectories.values() for turn in mine.turns]
    planned = [turn for turn in turns if turn.candidates]
    if not planned:
        return {}
    spread = [max(c.mean for c in turn.candidates) - min(c.mean for c in turn.candidates) for turn in planned]
    malformed = [c.path[-1] == "malformed" for turn in planned for c in turn.candidates if c.path]
    return {
        "candidates": sum(len(turn.candidates) for turn in planned) / len(planned),
        "advantage": sum(spread) / len(spread),
        "malformed_imaginations": sum(malformed) / len(malformed) if malformed else None,
    }


def _same_tokens(
    players: Players,
    run: Path,
    settings: PlannerSettings,
    choice: Choice,
    specs: Sequence[EpisodeSpec],
    found: dict[str, float | None],
) -> SameTokensTeam:
    planner = PlanningTeam(players.team(), load_world_model(run, players.model), settings)
    played = play(specs, planner, players.recipe.channel, 0)
    turns = [turn for episode in played for mine in episode.trajectories.values() for turn in mine.turns]
    own = sum(len(turn.completion_ids) for turn in turns) / len(turns)
    samples = samples_for(planner.tokens_generated / planner.decisions, own)
    found["samples"] = float(samples)
    return SameTokensTeam(players.team(), samples, choice)


def _world(
    imagines: Imagines,
    players: Players,
    team: GenerativeTeam,
    run: Path,
    folder: Path,
    options: Mapping[str, Any],
    warm_cache: Path,
    reporter: Reporter,
) -> WorldModel:
    recipe = players.recipe
    if imagines is Imagines.ORACLE:
        return OracleWorldModel(team)
    if imagines is Imagines.RECURRENT:
        mixture = replace(Mixture(**options["mixture"]), imitated=imitated_with(recipe))
        episodes = shared_play(recipe, players.team(warm=True), mixture, folder, warm_cache, reporter)
        recurrent = RecurrentSettings(**options["recurrent"])
        reporter.stage("recurrent world model", recurrent.steps)
        return train_recurrent(
            episodes,
            players.env.language,
            recurrent,
            recipe.seed,
            lambda step, loss: reporter.advance(step),
            valued_by(recipe, mixture),
        )
    own: WorldModel = load_world_model(run, players.model)
    return ShuffledWorldModel(own, recipe.seed) if imagines is Imagines.SHUFFLED else own


def _success(episodes: Sequence[Episode], players: Players) -> float | None:
    return measure(episodes, players.env.language, players.recipe.agent.spans).success_rate
