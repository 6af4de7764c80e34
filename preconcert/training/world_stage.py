"""The world model's part in a run: rows for the base, an adapter of its own, its report, and how it is loaded again.

In the run folder:

    world/adapter/          the adapter, peft format
    world/refreshed/N/      the adapter after the refresh in iteration N, where reinforcement learning goes on with it
    world/report.json       losses, coverage, what it is worth on held-out layouts; written when the stage is over

Parts: `mix_world_rows` (for the warm start's fine-tuning), `train_stage`, `load_world_model`, `WorldRefresh`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from preconcert.agents import ChannelSettings, GenerativeTeam
from preconcert.core import ConfigError, Env, Episode, derive_seed
from preconcert.envs import make_env
from preconcert.models import LanguageModel, TransformersModel
from preconcert.prompts import OWN_TEAM, TurnFormat, WorldFormat
from preconcert.training.json_file import write_json
from preconcert.training.progress import LossProgress
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter
from preconcert.training.rollout import EpisodeSpec, Policies, ScriptedPolicy, rollout
from preconcert.training.run_folder import base_of, load_recipe_of
from preconcert.training.warm_cache import WarmCache, world_key
from preconcert.training.warm_start import WarmStartMethod, WarmStartSettings
from preconcert.training.world_data import check_length, coverage
from preconcert.training.world_model import heldout_report, refine, train_world_model
from preconcert.training.world_rows import LOSSES, Loss, value_range_of, world_row, world_steps
from preconcert.training.world_settings import WorldModelSettings
from preconcert.world_models import LegalActions, TokenWorldModel, TokenWorldSettings

ADAPTER = "world"
"""The adapter's name."""
FOLDER, REPORT = "world", "report.json"
_FORMED = 7
"""One in so many of the base's world rows teaches the tokens that the grammar forces. Odd, so that it is now a row with
given actions and now one without."""


def world_settings(recipe: Recipe) -> WorldModelSettings:
    """The recipe's section.

    Raises:
        ConfigError: it has none.
    """
    if recipe.world_model is None:
        raise ConfigError("the recipe has no world model; give it a section `world_model`")
    return recipe.world_model


def value_range(scripted: Sequence[Episode], rewards: Sequence[str]) -> tuple[float, float]:
    """The value's scale: sums of rewards as scripted play has them, and single rewards, whichever are further out."""
    low, high = value_range_of(scripted)
    single = [float(word) for word in rewards]
    return min([low, *single]), max([high, *single])


def mix_world_rows(
    recipe: Recipe,
    scripted: Sequence[Episode],
    turns: list[dict[str, list[int]]],
    turn_format: TurnFormat,
    reporter: Reporter,
) -> tuple[list[dict[str, list[int]]], WarmStartSettings]:
    """Turns and world rows for the warm start's fine-tuning, and settings under which the turns stay as many per step.

    Args:
        recipe: whose warm start it is; without a world model, or where the base is not trained, nothing changes.
        scripted: the episodes that are imitated.
        turns: the examples made from them.
        turn_format: that the team writes with.
        reporter: receives progress.

    Raises:
        ConfigError: a row is longer than what the tokenizer's model takes.
    """
    settings = recipe.warm_start
    if recipe.world_model is None or not recipe.world_model.share or settings.method is not WarmStartMethod.FULL:
        return turns, settings
    share = recipe.world_model.share
    random = _play(recipe, "random", recipe.world_model.random_episodes, "train", reporter)
    scale = value_range(scripted, turn_format.language.rewards)
    spelling = _spelling(recipe.world_model, turn_format, scale)
    steps = {
        name: [
            step
            for episode in episodes
            for chain in world_steps(episode, turn_format.memory, name, recipe.world_model.recall)
            for step in chain
        ]
        for name, episodes in (("scripted", scripted), ("random", random))
    }
    rng = np.random.default_rng(derive_seed(recipe.seed, "world rows"))
    wanted = int(len(turns) * share / (1 - share))
    rows: list[dict[str, list[int]]] = []
    names = [name for name in steps if steps[name]]
    for name in names:
        count = wanted // len(names)
        order = [int(i) for _ in range(1 + count // len(steps[name])) for i in rng.permutation(len(steps[name]))]
        for number, index in enumerate(order[:count]):
            step = steps[name][index]
            others = step.belief.others
            asked = [others[int(place)] for place in rng.permutation(len(others))]
            dice = float(rng.random()) if name == "scripted" else None
            belief = step.belief
            if name == "scripted" and rng.random() < 0.5:
                # The team will play as the script does, as far as anybody knows yet.
                belief = replace(belief, partners=OWN_TEAM)
            row = world_row(spelling, step, bool(number % 2), asked, dice, belief)
            # The base learns the form from a few rows, enough to write without a grammar.
            formed = number % _FORMED == 0
            counted = [kind > 0 and (formed or LOSSES[kind - 1] is not Loss.FORM) for kind in row.kinds]
            labels = [token if loss else -100 for token, loss in zip(row.ids, counted, strict=True)]
            rows.append({"input_ids": list(row.ids), "labels": labels})
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    check_length(longest, recipe.world_model.recall, turn_format.tokenizer.model_max_length)
    batch = round(settings.batch / (1 - share))
    return turns + rows, settings.model_copy(update={"batch": batch})


def train_stage(
    recipe: Recipe,
    out: Path,
    env: Env,
    assignment: Mapping[str, str],
    reporter: Reporter,
    cache: WarmCache | None = None,
) -> dict[str, Any]:
    """Train the adapter on the warm-started base, or read what was found if that is done.

    Args:
        recipe: with a section `world_model`.
        out: the run folder, after the warm start.
        env: of the task.
        assignment: adapter by agent, of the team that plays as a source.
        reporter: receives progress.
        cache: in which runs share the adapter, as they share warm starts.
    """
    folder = out / FOLDER
    marker = folder / REPORT
    if not marker.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        if cache is None:
            _teach(recipe, out, folder, env, assignment, reporter)
        else:
            key = world_key(recipe, assignment)
            cache.copy(key, out, lambda made: _teach(recipe, out, made / FOLDER, env, assignment, reporter), reporter)
    return json.loads(marker.read_text())


def _teach(
    recipe: Recipe, out: Path, folder: Path, env: Env, assignment: Mapping[str, str], reporter: Reporter
) -> None:
    """Train the adapter of a run and write the folder `world`, wherever that is to be."""
    settings = world_settings(recipe)
    folder.mkdir(parents=True)
    started = time.perf_counter()
    model = _warm_model(recipe, out, assignment)
    team = GenerativeTeam(model, env.language, recipe.agent, assignment)
    players: dict[str, Policies] = {
        "random": ScriptedPolicy("random"), "scripted": ScriptedPolicy(recipe.warm_start.player), "learner": team
    }  # fmt: skip
    counts = {
        "random": settings.random_episodes,
        "scripted": settings.scripted_episodes,
        "learner": settings.learner_episodes,
    }
    wanted = {name for name, share in settings.training.shares.items() if share > 0}
    for name in wanted - set(players):
        raise ConfigError(f"world_model.training.shares: {name!r} is not one of {', '.join(players)}")
    names = [name for name in players if name in wanted]
    sources: dict[str, list[Episode]] = {}
    heldout: dict[str, list[Episode]] = {}
    for name in names:
        sources[name] = _play(recipe, name, counts[name], "train", reporter, players[name])
        heldout[name] = _play(recipe, name, settings.heldout_episodes, "heldout", reporter, players[name])
    scripted = sources.get("scripted") or _play(recipe, "scripted", counts["scripted"], "train", reporter)
    scale = value_range(scripted, env.language.rewards)
    model.add_adapter(ADAPTER, derive_seed(recipe.seed, "adapter", ADAPTER))
    legal = LegalActions.of((episode for each in sources.values() for episode in each), env.language.actions)
    world = _model_on(recipe, model, env, scale, legal)
    reporter.stage("world model", settings.training.steps)
    scratch = folder / "scratch"
    seed = derive_seed(recipe.seed, "world model")
    progress = LossProgress(reporter, "loss_view", "view")
    log = train_world_model(model, world, sources, settings.training, seed, scratch, [progress])
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_adapter(ADAPTER, folder / "adapter")
    greedy = _model_on(recipe, model, env, scale, legal, TokenWorldSettings(temperature=0.0))
    free = _model_on(recipe, model, env, scale, legal, TokenWorldSettings(constrained=False))
    found = {
        "value_range": list(scale),
        "tell_partners": settings.tell_partners,
        "own_words": settings.own_words,
        "recall": settings.recall,
        "legal": legal.to_json(),
        "log": log,
        "coverage": coverage(sources, heldout),
        "heldout": {
            name: {
                "sampled": heldout_report(world, episodes, derive_seed(seed, "heldout", name), partners=name),
                "greedy": heldout_report(greedy, episodes, 0, partners=name),
                "free": heldout_report(free, episodes[:10], derive_seed(seed, "free", name), partners=name),
            }
            for name, episodes in heldout.items()
        },
        "wall_s": time.perf_counter() - started,
    }
    write_json(folder / REPORT, found)


def load_world_model(
    run: Path, model: LanguageModel | None = None, settings: TokenWorldSettings | None = None
) -> TokenWorldModel:
    """The world model of a run.

    Args:
        run: the run folder.
        model: the run's base, to which the adapter is added; None loads it.
        settings: how answers are sampled.

    Raises:
        ConfigError: it is no run folder, or the run has no finished world model.
    """
    recipe = load_recipe_of(run)
    world_settings(recipe)
    marker = run / FOLDER / REPORT
    if not marker.is_file():
        raise ConfigError(f"the world model of the run {str(run)!r} is not finished")
    if model is None:
        model = TransformersModel.load(base_of(recipe, run), recipe.lora, recipe.dtype)
    refreshed = _refreshed(run)
    model.load_adapter(ADAPTER, refreshed[-1][1] if refreshed else run / FOLDER / "adapter")
    env = make_env(recipe.task, recipe.params, 0, "train")
    made = json.loads(marker.read_text())
    low, high = made["value_range"]
    told = world_settings(recipe).model_copy(
        update={
            "tell_partners": bool(made.get("tell_partners")),
            "own_words": bool(made.get("own_words")),
            "recall": int(made.get("recall", 0)),
        }
    )
    held = made.get("legal")
    legal = None if held is None else LegalActions.from_json(held)
    return _model_on(recipe, model, env, (low, high), legal, settings, told)


class WorldRefresh:
    """Goes on training the adapter on the rollouts of reinforcement learning: an `on_rollout` of the rollout source.

    Args:
        recipe: with a section `world_model`.
        out: the run folder; what refreshes after `begin` wrote there is removed.
        model: holds the team's adapters; the world model's is loaded into it.
        begin: the first iteration that is still to come.
    """

    def __init__(self, recipe: Recipe, out: Path, model: TransformersModel, begin: int) -> None:
        self.settings = world_settings(recipe)
        self.seed = derive_seed(recipe.seed, "world refresh")
        self.out = out
        self.model = model
        for iteration, folder in _refreshed(out):
            if iteration >= begin:
                shutil.rmtree(folder)
        self.world = load_world_model(out, model)

    def __call__(self, iteration: int, episodes: list[Episode], metrics: dict[str, float]) -> None:
        """Train on one rollout, where it is the turn; the mean losses go into the metrics as `world_loss_PART`."""
        if (iteration + 1) % self.settings.refresh_every:
            return
        own = {"shares": {"rollout": 1.0}, "value_sources": ("rollout",), "steps": self.settings.refresh_steps}
        training = self.settings.training.model_copy(update=own)
        losses = refine(self.model, self.world, {"rollout": episodes}, training, derive_seed(self.seed, iteration))
        metrics |= {f"world_loss_{name}": loss for name, loss in losses.items()}
        self.model.save_adapter(ADAPTER, self.out / FOLDER / "refreshed" / str(iteration))


def _refreshed(out: Path) -> list[tuple[int, Path]]:
    """The refreshed adapters of a run by iteration, oldest first."""
    folder = out / FOLDER / "refreshed"
    if not folder.is_dir():
        return []
    return sorted((int(path.name), path) for path in folder.iterdir() if path.name.isdigit())


def _model_on(
    recipe: Recipe,
    model: LanguageModel,
    env: Env,
    scale: tuple[float, float],
    legal: LegalActions | None,
    settings: TokenWorldSettings | None = None,
    told: WorldModelSettings | None = None,
) -> TokenWorldModel:
    told = told or world_settings(recipe)
    turns = TurnFormat(model.tokenizer, env.language, recipe.agent.spans, recipe.agent.memory)
    return TokenWorldModel(model, _spelling(told, turns, scale), ADAPTER, settings=settings, legal=legal)


def _spelling(told: WorldModelSettings, turns: TurnFormat, scale: tuple[float, float]) -> WorldFormat:
    return WorldFormat(turns, scale, told.tell_partners, told.own_words, told.recall)


def _warm_model(recipe: Recipe, out: Path, assignment: Mapping[str, str]) -> TransformersModel:
    model = TransformersModel.load(base_of(recipe, out), recipe.lora, recipe.dtype)
    for name in dict.fromkeys(assignment.values()):
        model.load_adapter(name, out / "warm" / name)
    return model


def _play(
    recipe: Recipe, name: str, count: int, split: str, reporter: Reporter, player: Policies | None = None
) -> list[Episode]:
    """Episodes of one source; which, follows from the recipe's seed, the source and the split."""
    reporter.stage(f"{name} play, {split}", count)
    if player is None:
        player = ScriptedPolicy(recipe.warm_start.player if name == "scripted" else name)
    episodes: list[Episode] = []
    while len(episodes) < count:
        specs = [
            EpisodeSpec(
                recipe.task,
                recipe.params,
                derive_seed(recipe.seed, "world", name, split, number) % 2**31,
                split,
                sample=number,
            )
            for number in range(len(episodes), min(count, len(episodes) + 500))
        ]
        # The warm start imitates what is heard through a clear channel; the world model is to know the real one.
        channel = recipe.channel if name == "learner" else ChannelSettings()
        episodes += rollout(specs, player, channel, derive_seed(recipe.seed, "world", name, split))
        reporter.advance(len(episodes))
    return episodes
