"""The league: who a learning adapter plays against, and the frozen adapters that make up its past.

Parts: `LeagueSettings` (what a recipe says), `Member` and `Population` (who there is, and how the learners fare against
them; pure, and what a checkpoint holds), `League` (casts for a rollout, snapshots in the model and on disk). How
opponents are drawn is in `matchmaking.py`.

A league has one main adapter, which may sit on any side. In mode `crossplay` a second one, `counter`, learns to beat
the main adapter's past and becomes part of the main one's opponents: fictitious cross-play (FXP, arXiv 2310.03354).
"""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from preconcert.agents import GenerativeTeam
from preconcert.core import ConfigError, Env, Episode, TrainingError, UnknownNameError, derive_seed
from preconcert.models import TransformersModel
from preconcert.training.matchmaking import EVEN, Sampler, chances, score, updated
from preconcert.training.rollout import SCRIPT

FOLDER = "league"
"""Where a run keeps its snapshots."""
COUNTER = "counter"
"""The adapter that learns to beat the main one's past."""
MAIN = "team"
"""The main adapter, where all agents share one."""


class LeagueMode(StrEnum):
    """Whom the main adapter meets."""

    SELFPLAY = "selfplay"
    """Its present self alone."""
    PAST = "past"
    """Its present self and its past ones: fictitious self-play."""
    CROSSPLAY = "crossplay"
    """Those and counters, which learn to beat its past: fictitious cross-play."""


class LeagueSettings(BaseModel):
    """Self-play and what goes beyond it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: LeagueMode = LeagueMode.PAST
    """`selfplay`, `past` or `crossplay`."""
    sides: tuple[tuple[str, ...], ...] = ()
    """Agents that play together, as lists of names; empty: each for itself. One member of the population plays a whole
    side."""
    selfplay: float = Field(0.5, ge=0, le=1)
    """Share of the main adapter's task instances in which it plays all sides."""
    counters: float = Field(0.5, gt=0, lt=1)
    """Share of all task instances in which the counter learns (`crossplay`)."""
    restart: bool = True
    """The counter begins again from the warm start after each of its snapshots (`crossplay`)."""
    every: int = Field(5, ge=1)
    """Iterations between snapshots."""
    size: int = Field(12, ge=1)
    """Snapshots kept of each adapter. Those that go leave the others spread over the whole run."""
    scripts: tuple[str, ...] = ()
    """Players of the task that are opponents too."""
    sampler: Sampler = Sampler.UNIFORM
    """`uniform`, or `rating`: those more often that the learner does not beat."""
    sharpness: float = Field(2.0, ge=0)
    """How much more often, for `rating`: the exponent of one minus the share of games won."""
    floor: float = Field(0.2, ge=0, le=1)
    """Share of the games that `rating` spreads evenly."""
    decay: float = Field(0.99, ge=0, lt=1)
    """Weight that a rating keeps over one game."""

    @model_validator(mode="after")
    def _parts_fit(self) -> LeagueSettings:
        named = [agent for side in self.sides for agent in side]
        if len(set(named)) != len(named):
            raise ValueError("an agent is on two sides")
        if self.sides and (len(self.sides) < 2 or not all(self.sides)):
            raise ValueError("sides must be at least two, none of them empty")
        if self.mode is LeagueMode.SELFPLAY and self.scripts:
            raise ValueError("mode=selfplay meets nobody else, and scripts are given")
        return self

    def sides_of(self, agents: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """The sides of a task's agents.

        Raises:
            UnknownNameError: a side names an agent that there is not.
            ConfigError: an agent is on no side.
        """
        if not self.sides:
            return tuple((agent,) for agent in agents)
        named = [agent for side in self.sides for agent in side]
        for agent in named:
            if agent not in agents:
                raise UnknownNameError("agent", agent, agents)
        for agent in agents:
            if agent not in named:
                raise ConfigError(f"league.sides: agent {agent!r} is on no side")
        return self.sides


@dataclass(frozen=True, slots=True)
class Member:
    """A frozen adapter."""

    source: str
    """The learning adapter that it was."""
    iteration: int
    """How many iterations that had learned."""

    @property
    def name(self) -> str:
        """Its adapter name."""
        return f"{self.source}@{self.iteration}"

    @classmethod
    def parse(cls, name: str) -> Member:
        """The member of a name.

        Raises:
            ConfigError: it is no such name.
        """
        found = re.fullmatch(r"(.+)@(\d+)", name)
        if found is None:
            raise ConfigError(f"{name!r} is not the name of a snapshot, NAME@ITERATION")
        return cls(found[1], int(found[2]))


def evicted(iterations: Sequence[int]) -> int:
    """The place of the snapshot to drop: of those between the first and the last, the one that leaves the smallest gap
    behind; the earliest of equals.

    Args:
        iterations: of the snapshots of one adapter, ascending.
    """
    if len(iterations) < 3:
        return 0
    gaps = [after - before for before, after in zip(iterations, iterations[2:], strict=False)]
    return 1 + int(np.argmin(gaps))


@dataclass(slots=True)
class Population:
    """Who may be met, and what their games with the learners say."""

    settings: LeagueSettings
    members: list[Member] = field(default_factory=list)
    """In the order in which they came."""
    ratings: dict[str, dict[str, float]] = field(default_factory=dict)
    """By learner and opponent: the share of the games that the learner won."""
    iteration: int = -1
    """Of the last rollout that was prepared."""

    def opponents(self, learner: str) -> list[str]:
        """Everyone a learner may meet besides its present self: adapters, then scripts."""
        if self.settings.mode is LeagueMode.SELFPLAY:
            return []
        mains = learner == COUNTER and self.settings.mode is LeagueMode.CROSSPLAY
        names = [member.name for member in self.members if not (mains and member.source == COUNTER)]
        return names if mains else names + [SCRIPT + script for script in self.settings.scripts]

    def chances(self, learner: str) -> dict[str, float]:
        """How likely each opponent is to be met."""
        names = self.opponents(learner)
        if not names:
            return {}
        held = self.ratings.get(learner, {})
        settings = self.settings
        found = chances([held.get(name, EVEN) for name in names], settings.sampler, settings.sharpness, settings.floor)
        return dict(zip(names, found.tolist(), strict=True))

    def add(self, member: Member) -> list[Member]:
        """Take in a snapshot; those that have to make room for it."""
        self.members.append(member)
        gone: list[Member] = []
        while len(mine := [each for each in self.members if each.source == member.source]) > self.settings.size:
            leaves = mine[evicted([each.iteration for each in mine])]
            self.members.remove(leaves)
            gone.append(leaves)
            for held in self.ratings.values():
                held.pop(leaves.name, None)
        return gone

    def record(self, results: Mapping[tuple[str, str], Sequence[float]]) -> None:
        """Take in scores by (learner, opponent)."""
        for (learner, opponent), scores in sorted(results.items()):
            held = self.ratings.setdefault(learner, {})
            held[opponent] = updated(held.get(opponent, EVEN), scores, self.settings.decay)

    def state_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "members": [member.name for member in self.members],
            "ratings": {learner: dict(held) for learner, held in self.ratings.items()},
            "iteration": self.iteration,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.members = [Member.parse(name) for name in state["members"]]
        self.ratings = {learner: dict(held) for learner, held in state["ratings"].items()}
        self.iteration = int(state["iteration"])


class Exchange(Protocol):
    """Brings together what all processes found."""

    def __call__(self, results: dict[tuple[str, str], list[float]]) -> dict[tuple[str, str], list[float]]:
        """The scores of all processes."""
        ...


class League:
    """The population of a run, in the model and in the run folder.

    Args:
        settings: of the recipe.
        env: of the task.
        model: holds the learners; snapshots are added to it and never learn.
        team: is told how old snapshots are.
        main: the main adapter.
        out: the run folder.
        seed: of the draws.
        rank: this process; the first one writes.
        exchange: brings together the scores of several processes.

    Raises:
        UnknownNameError: a side names an unknown agent.
        ConfigError: an agent is on no side.
    """

    def __init__(
        self,
        settings: LeagueSettings,
        env: Env,
        model: TransformersModel,
        team: GenerativeTeam,
        main: str,
        out: Path,
        seed: int,
        rank: int = 0,
        exchange: Exchange | None = None,
    ) -> None:
        self.settings = settings
        self.sides = settings.sides_of(env.agents)
        self.model = model
        self.team = team
        self.main = main
        self.out = out
        self.seed = seed
        self.rank = rank
        self.exchange = exchange
        self.population = Population(settings)

    @property
    def learners(self) -> tuple[str, ...]:
        """The adapters that learn."""
        return learners_of(self.settings, self.main)

    def prepare(self, iteration: int) -> tuple[str, ...]:
        """Take snapshots if it is time; call it once before each rollout.

        Returns:
            The learners that begin again from the warm start.
        """
        self.population.iteration = iteration
        if iteration % self.settings.every:
            return ()
        restarted: list[str] = []
        for learner in self.learners:
            if learner == COUNTER and not iteration:
                continue  # it has learned nothing: the main adapter's first snapshot is the same
            self._snapshot(Member(learner, iteration))
            if learner == COUNTER and self.settings.restart:
                self._load(learner, self.out / "warm" / learner, learns=True)
                self.population.ratings.pop(learner, None)  # they were another's
                restarted.append(learner)
        self._prune()
        return tuple(restarted)

    def cast(self, iteration: int, number: int) -> dict[str, str]:
        """Who plays the task instance of this number; nobody is named where the main adapter plays all sides."""
        settings = self.settings
        rng = np.random.default_rng(derive_seed(self.seed, "league", iteration, number))
        learner = self.main
        if settings.mode is LeagueMode.CROSSPLAY and rng.random() < settings.counters:
            learner = COUNTER
        odds = self.population.chances(learner)
        if not odds or (learner == self.main and rng.random() < settings.selfplay):
            return {}
        seat = int(rng.integers(len(self.sides)))
        names = list(odds)
        cast: dict[str, str] = {}
        for index, side in enumerate(self.sides):
            player = learner if index == seat else names[int(rng.choice(len(names), p=list(odds.values())))]
            cast.update(dict.fromkeys(side, player))
        return {agent: cast[agent] for agent in self.team.assignment}

    def record(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """Learn from a rollout who beats whom.

        Returns:
            Figures for the log: per learner, the mean score of this rollout against the population and the lowest
            rating against any of it.
        """
        results: dict[tuple[str, str], list[float]] = defaultdict(list)
        for episode in episodes:
            for key, found in self._scores(episode):
                results[key].append(found)
        everyone = self.exchange(dict(results)) if self.exchange is not None else dict(results)
        self.population.record(everyone)
        figures: dict[str, float] = {"league_size": float(len(self.population.members))}
        for learner in self.learners:
            scores = [each for (who, _), found in sorted(everyone.items()) if who == learner for each in found]
            held = self.population.ratings.get(learner, {})
            if scores:
                figures[f"score/{learner}"] = float(np.mean(np.sort(scores)))
                figures[f"lowest_rating/{learner}"] = min(held.values())
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The population; the snapshots themselves are in the run folder."""
        return self.population.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`: snapshots are read again, later ones are removed.

        Raises:
            TrainingError: a snapshot is missing.
        """
        for member in self.population.members:
            self.model.delete_adapter(member.name)
        self.population.load_state_dict(state)
        for member in self.population.members:
            folder = self.folder / member.name
            if not folder.is_dir():
                raise TrainingError(f"the checkpoint's league has {member.name!r}, and there is no {str(folder)!r}")
            self._load(member.name, folder, learns=False)
            self.team.versions[member.name] = member.iteration
        if self.rank == 0 and self.folder.is_dir():
            for folder in self.folder.iterdir():
                half_written = folder.name.startswith(".")
                if half_written or Member.parse(folder.name).iteration > self.population.iteration:
                    shutil.rmtree(folder)

    def clear(self) -> None:
        """Remove what a run left behind that begins anew."""
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def folder(self) -> Path:
        """Where the snapshots are."""
        return self.out / FOLDER

    def _scores(self, episode: Episode) -> list[tuple[tuple[str, str], float]]:
        """Results between the learner's side and each other one."""
        players = [who_played(episode, side[0]) for side in self.sides]
        returns = [
            float(np.mean([episode.trajectories[agent].total_reward for agent in side])) for side in self.sides
        ]
        found: list[tuple[tuple[str, str], float]] = []
        for mine, learner in enumerate(players):
            if learner not in self.learners:
                continue
            for other, opponent in enumerate(players):
                if opponent is not None and opponent not in self.learners:
                    found.append(((learner, opponent), score(returns[mine], returns[other])))
        return found

    def _snapshot(self, member: Member) -> None:
        self.model.add_adapter(member.name, 0, member.source)
        _freeze(self.model, member.name)
        self.team.versions[member.name] = member.iteration
        if self.rank == 0:
            self.model.save_adapter(member.name, self.folder / member.name)
        for gone in self.population.add(member):
            self.model.delete_adapter(gone.name)
            self.team.versions.pop(gone.name, None)

    def _load(self, name: str, folder: Path, learns: bool) -> None:
        self.model.load_adapter(name, folder)
        if not learns:
            _freeze(self.model, name)

    def _prune(self) -> None:
        """Remove the folders that neither the population nor a checkpoint refers to."""
        if self.rank or not self.folder.is_dir():
            return
        needed = {member.name for member in self.population.members}
        for file in (self.out / "checkpoints").glob("checkpoint-*/source.json"):
            needed.update(re.findall(r'"([^"@]+@\d+)"', file.read_text()))
        for folder in self.folder.iterdir():
            if folder.name not in needed:
                shutil.rmtree(folder)


def learners_of(settings: LeagueSettings, main: str) -> tuple[str, ...]:
    """The adapters that learn in a league.

    Raises:
        ConfigError: the main one has the counter's name.
    """
    if main == COUNTER:
        raise ConfigError(f"league: the adapter {COUNTER!r} is the counter's; give the main one another name")
    return (main, COUNTER) if settings.mode is LeagueMode.CROSSPLAY else (main,)


def who_played(episode: Episode, agent: str) -> str | None:
    """The adapter or script behind an agent; None for the base model and scripts outside of casts."""
    return episode.trajectories[agent].turns[0].adapter


def check_scripts(env: Env, scripts: Collection[str]) -> None:
    """Try the names of a task's players.

    Raises:
        UnknownNameError: a player that the task does not have.
        ConfigError: the task has none at all.
    """
    make_player = getattr(env, "player", None)
    if scripts and make_player is None:
        raise ConfigError(f"{type(env).__name__} has no players, and league.scripts names {', '.join(scripts)}")
    for script in scripts:
        assert make_player is not None
        make_player(script)


def _freeze(model: TransformersModel, name: str) -> None:
    for parameter in model.adapter_parameters(name).values():
        parameter.requires_grad_(False)


def gather(results: dict[tuple[str, str], list[float]]) -> dict[tuple[str, str], list[float]]:
    """An `Exchange` over torch's processes, which must have been joined."""
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, results)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for part in parts:
        for key, scores in part.items():
            found[key] += scores
    return dict(found)
