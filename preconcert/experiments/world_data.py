"""What world models learn from and are judged by: mixed play, held-out cases, and the world as it was.

Play is mixed from the task's random and scripted players and from a learner's warm-started team, by whole episodes. It
follows from the recipe and the numbers of episodes alone, so all models of a task and seed share it; held-out play is
the same for all seeds but for the learner's part.

Parts: `Mixture`, `mixed_play`, `imitated_with`, `valued_by`, `shared_run`, `share_run`, `shared_play`, `coverage`,
`heldout_cases`, `env_at`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from preconcert.agents import ChannelSettings, codec_of
from preconcert.core import Env, Episode, Policy, append_episodes, derive_seed, load_episodes
from preconcert.envs import make_env
from preconcert.training.imitation import scripted_episodes
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy, rollout
from preconcert.training.run import train
from preconcert.training.run_folder import RESULT
from preconcert.training.warm_cache import WarmCache
from preconcert.training.warm_start import WarmStartMethod
from preconcert.training.world_stage import world_settings
from preconcert.world_models.experience import Setting, lived_by
from preconcert.world_models.fidelity import Case, cases_of, choose_starts

IMITATED = "imitated"
_FILE = "episodes.jsonl"
_SIDE_BY_SIDE = 500
"""Episodes played at once."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Episodes by who plays them."""

    random: int
    scripted: int
    learner: int
    imitated: int = 0
    """The first of those that the warm start imitates."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.random + self.scripted + self.learner + self.imitated

    @property
    def players(self) -> list[str]:
        """Who plays each episode, in order: `random`, `scripted` or `learner`."""
        played = {**asdict(self), IMITATED: 0}
        return [name for name, count in played.items() for _ in range(count)] + ["scripted"] * self.imitated


def mixed_play(
    recipe: Recipe, learner: Policy, mixture: Mixture, split: str, seed: int, reporter: Reporter
) -> list[Episode]:
    """Play it: with the recipe's seed and as many episodes, the same that the run's own world model learned from.

    Args:
        recipe: task, parameters, script and channel.
        learner: plays its part.
        mixture: how much of each.
        split: `train` or `heldout`.
        seed: of task instances and choices.
        reporter: receives progress.
    """
    found: list[Episode] = []
    policies: Mapping[str, Policy] = {
        "random": ScriptedPolicy("random"), "scripted": ScriptedPolicy(recipe.warm_start.player), "learner": learner,
    }  # fmt: skip
    for name, count in asdict(mixture).items():
        if name == IMITATED:
            if count:
                language = make_env(recipe.task, recipe.params, 0, "train").language
                codec = codec_of(recipe.agent.codec, language, recipe.agent.spans)
                found += [_without_tokens(each) for each in scripted_episodes(recipe, codec, count, reporter)]
            continue
        reporter.stage(f"{name} play, {split}", count)
        channel = recipe.channel if name == "learner" else ChannelSettings()
        for begin in range(0, count, _SIDE_BY_SIDE):
            specs = [
                EpisodeSpec(
                    recipe.task,
                    recipe.params,
                    derive_seed(seed, "world", name, split, number) % 2**31,
                    split,
                    sample=number,
                )
                for number in range(begin, min(count, begin + _SIDE_BY_SIDE))
            ]
            some = rollout(specs, policies[name], channel, derive_seed(seed, "world", name, split))
            found += [_without_tokens(each) for each in some]
            reporter.advance(begin + len(specs))
    return found


def imitated_with(recipe: Recipe) -> int:
    """Episodes of the warm start that the team's base has been shown as a world model's rows too.

    A model that is compared with the token model may learn from as many.
    """
    section = recipe.world_model
    if section is None or not section.share or recipe.warm_start.method is not WarmStartMethod.FULL:
        return 0
    return recipe.warm_start.episodes


def valued_by(recipe: Recipe, mixture: Mixture) -> list[bool]:
    """The episodes of a mixture, in order, that teach a world model what a moment is worth: those that teach the run's
    own."""
    sources = world_settings(recipe).training.value_sources
    return [player in sources for player in mixture.players]


def shared_run(recipe: Recipe, folder: Path, warm_cache: Path, reporter: Reporter) -> Path:
    """A finished run in FOLDER/run that all cells with this recipe share: trained by whoever needs it first.

    Args:
        recipe: of the run.
        folder: of the cell.
        warm_cache: where it is kept.
        reporter: receives progress.

    Returns:
        The run folder.
    """
    out = folder / "run"
    if not (out / RESULT).is_file():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)

        def make(place: Path) -> None:
            train(recipe, place, reporter=reporter, warm_cache=warm_cache)

        WarmCache(warm_cache).copy(_run_key(recipe), out, make, reporter)
    return out


def share_run(recipe: Recipe, run: Path, warm_cache: Path, reporter: Reporter) -> None:
    """Keep a finished run where `shared_run` looks for it. Arguments as there."""

    def make(place: Path) -> None:
        shutil.copytree(run, place, dirs_exist_ok=True)

    WarmCache(warm_cache).entry(_run_key(recipe), make, reporter)


def shared_play(
    recipe: Recipe, learner: Policy, mixture: Mixture, folder: Path, warm_cache: Path, reporter: Reporter
) -> list[Episode]:
    """Play on training layouts that all models of a task and seed share: made by whoever needs it first.

    Args:
        recipe: of the learner, and so of the play.
        learner: the team that its warm start made.
        mixture: how much of each.
        folder: of the cell, for a while.
        warm_cache: where it is kept.
        reporter: receives progress.
    """
    counts = asdict(mixture) if mixture.imitated else {k: v for k, v in asdict(mixture).items() if k != IMITATED}
    key = _key("play", {"recipe": recipe.model_dump(mode="json"), "mixture": counts})
    scratch = folder / "play"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)

    def make(place: Path) -> None:
        append_episodes(place / _FILE, mixed_play(recipe, learner, mixture, "train", recipe.seed, reporter))

    WarmCache(warm_cache).copy(key, scratch, make, reporter)
    episodes = list(load_episodes(scratch / _FILE).episodes)
    shutil.rmtree(scratch)  # some ten MB, and the cache has them
    return episodes


def coverage(episodes: Sequence[Episode], cases: Sequence[Case]) -> dict[str, float]:
    """How much of what is asked has been met in training.

    Returns:
        `seen_views` and `seen_transitions`: the shares of the cases' first views, and of those with the joint action,
        that some training episode holds.
    """
    setting = Setting.of(episodes, cases[0].request.language)
    views, transitions = set(), set()
    for life in lived_by(episodes, setting.view):
        for values, action, theirs in zip(life.views[:-1], life.actions, life.theirs, strict=True):
            views.add((life.agent, values))
            transitions.add((life.agent, values, action, theirs))
    met = known = 0
    for case in cases:
        values, move = setting.view.parse(case.request.observation.text), case.moves[0]
        theirs = tuple((move.others or {})[other] for other in case.request.others)
        met += (case.request.agent, values) in views
        known += (case.request.agent, values, move.action, theirs) in transitions
    return {"seen_views": met / len(cases), "seen_transitions": known / len(cases)}


def heldout_cases(
    episodes: Sequence[Episode], horizons: Sequence[int], starts: int, mixture: Mixture | None = None
) -> list[Case]:
    """Cases of every agent of every episode.

    Args:
        episodes: held-out play.
        horizons: that are measured.
        starts: moments per episode; the first one is always among them.
        mixture: who plays the episodes, in its order, for models that want to know; None does not say.
    """
    found: list[Case] = []
    players = mixture.players if mixture is not None else []
    for number, episode in enumerate(episodes):
        language = make_env(episode.task, episode.params, episode.seed, episode.split).language
        moments = choose_starts(episode.steps, horizons, starts, derive_seed("starts", number))
        found += cases_of(
            episode, f"held-{number}", language, moments, env_at, partners=players[number] if players else None
        )
    return found


def env_at(episode: Episode, step: int) -> Env:
    """An episode's world as it stood before a step."""
    env = make_env(episode.task, episode.params, episode.seed, episode.split)
    env.reset()
    for at in range(step):
        env.step({agent: mine.turns[at].action for agent, mine in episode.trajectories.items()})
    return env


def _run_key(recipe: Recipe) -> str:
    return _key("run", {"recipe": recipe.model_dump(mode="json")})


def _key(kind: str, content: Mapping[str, Any]) -> str:
    return f"{kind}-" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def _without_tokens(episode: Episode) -> Episode:
    """What was seen, said, done and paid, without how it was written."""
    trajectories = {
        agent: replace(
            mine,
            turns=tuple(
                replace(
                    turn, prompt_ids=(), completion_ids=(), logprobs=(), sampled=(), spans=(), intentions=(), text=""
                )
                for turn in mine.turns
            ),
        )
        for agent, mine in episode.trajectories.items()
    }
    return replace(episode, trajectories=trajectories)
