"""Evaluation: a run's team, its warm start, the task's own players and the message controls on the same held-out seeds.

Parts: `Arm` (who plays, against whom, and over which channel), `heldout_specs`, `Players` (a run's policies from one
load of its model), `evaluate` and the `Evaluation` it returns.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from preconcert.agents import ChannelMode, ChannelSettings, FallbackTeam, GenerativeTeam
from preconcert.agents.planners import PlanningTeam
from preconcert.core import Env, Episode, Policy, UnknownNameError, derive_seed
from preconcert.envs import make_env, task_class, without_rounds
from preconcert.experiments.exact_games import ExactGame, GameValue, Strategy, exact_game
from preconcert.experiments.provenance import commit, machine, versions
from preconcert.training.json_file import write_json
from preconcert.training.league import FOLDER as LEAGUE
from preconcert.training.league import Member
from preconcert.training.measures import Measures, measure
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter, Silent
from preconcert.training.rollout import SCRIPT, EpisodeSpec, ScriptedPolicy, rollout
from preconcert.training.run_folder import assign, load_players, load_recipe_of

FOLDER = "eval"
"""Where a run keeps its evaluations."""
_WARM = "warm-start-"
"""Goes before an adapter's name where it is loaded as it was before reinforcement learning."""
_NAMED_APART = ("mode", "drop")
"""Settings of the channel that have words of their own in the names of arms."""
_SIDE_BY_SIDE = 256
"""Episodes played at once."""


class Who(StrEnum):
    """Who plays."""

    RANDOM = "random"
    """Uniform over legal actions and words."""
    SCRIPTED = "scripted"
    """The imperfect script that the warm start imitates."""
    WARM = "warm"
    """The team before reinforcement learning."""
    TRAINED = "trained"
    """The team after it."""
    POPULATION = "population"
    """The main adapter and its past selves, drawn anew for each side of each game."""
    PLANNED = "planned"
    """The team after it, with a planner."""
    FALLBACK = "fallback"
    """The team after it, with a silent one for as long as nothing is heard."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of playing the same task seeds."""

    name: str
    who: Who
    channel: ChannelSettings
    greedy: bool = False
    opponent: str | None = None
    """One of the task's opponents, on all sides but one; the sides take turns. The figures are those of the one."""

    @property
    def title(self) -> str:
        """For people."""
        if self.opponent is not None:
            return f"{self.who.value} against {self.opponent}"
        if self.who is Who.PLANNED:
            return "trained, planned"
        if self.who is Who.POPULATION:
            return "trained and past selves"
        if self.who is Who.RANDOM:
            title = "random"
        elif self.who is Who.SCRIPTED:
            title = "imperfect script"
        else:
            who = {Who.WARM: "warm start", Who.FALLBACK: "trained with fallback"}.get(self.who, "trained")
            title = f"{who}, {'greedy' if self.greedy else 'sampled'}"
        if self.channel.mode is not ChannelMode.ON:
            title += f", messages {self.channel.mode.value}"
        title += f", {self.channel.drop:.0%} lost" if self.channel.drop else ""
        told = {key: value for key, value in _flat(self.channel.told()).items() if key not in _NAMED_APART}
        return title + "".join(f", {key} {value}" for key, value in told.items())


@dataclass(frozen=True, slots=True)
class ArmResult:
    """What an arm did."""

    arm: Arm
    measures: Measures
    wall_s: float
    worth: GameValue | None = None
    """Of the strategy, exactly, where the game is small enough."""
    tokens_per_decision: float | None = None
    """Written by team and world model, where the arm plans."""
    fallen_back: float | None = None
    """Share of the turns in which an agent acted as the silent team would, where there is one to fall back on."""

    def figures(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "title": self.arm.title,
            "who": self.arm.who.value,
            "greedy": self.arm.greedy,
            "channel": self.arm.channel.model_dump(mode="json"),
            **asdict(self.measures),
            **({} if self.worth is None else _worth(self.worth)),
            **({} if self.tokens_per_decision is None else {"tokens_per_decision": self.tokens_per_decision}),
            **({} if self.fallen_back is None else {"fallen_back": self.fallen_back}),
            "wall_s": self.wall_s,
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Every arm's figures, one of them in front."""

    run: str
    task: str
    params: Mapping[str, Any]
    seed: int
    main: str
    """Name of the arm that was asked for."""
    arms: tuple[ArmResult, ...]
    no_message_ceiling: float | None
    """The success that no team without messages can exceed; None where it is not known."""
    overrides: Mapping[str, Any]
    """What differs from the run's recipe, by dotted key."""
    made: Mapping[str, Any]
    """Versions, commit, machine and time."""

    def __getitem__(self, name: str) -> ArmResult:
        for result in self.arms:
            if result.arm.name == name:
                return result
        raise UnknownNameError("arm", name, [result.arm.name for result in self.arms])

    def to_json(self) -> dict[str, Any]:
        """The main arm's figures at the top, all arms below."""
        figures = self[self.main].figures()
        return {
            "run": self.run,
            "task": self.task,
            "params": dict(self.params),
            "split": "heldout",
            "seed": self.seed,
            "arm": self.main,
            **{key: figures[key] for key in figures if key != "title"},
            "no_message_ceiling": self.no_message_ceiling,
            "overrides": dict(self.overrides),
            "arms": {result.arm.name: result.figures() for result in self.arms},
            **self.made,
        }


class SpecialPlay(Protocol):
    """A run's trained team with something around it: a planner, or another team to fall back on."""

    @property
    def who(self) -> Who:
        """What its arm is called."""
        ...

    @property
    def overrides(self) -> Mapping[str, Any]:
        """Its settings by dotted key, as an evaluation records them."""
        ...

    def team(self, players: Players, run: Path, greedy: bool = False) -> PlanningTeam | FallbackTeam:
        """Who plays."""
        ...


class Players:
    """The policies of a finished run.

    Args:
        run: the run folder.
        recipe: its recipe, perhaps played otherwise.
        adapters: `adapters`, or `warm` for a run that has not been through reinforcement learning.

    Raises:
        ConfigError: the run is not finished.
        ModelError: its model or one of its adapters cannot be loaded.
    """

    def __init__(self, run: Path, recipe: Recipe, adapters: str = "adapters") -> None:
        self.recipe = recipe
        self.env: Env = make_env(recipe.task, recipe.params, 0, "heldout")
        self.assignment = assign(recipe, self.env)
        self.model = load_players(recipe, run, run / adapters)
        self._warm = run / "warm"
        self._league = run / LEAGUE
        self.sides = sides_of(recipe, self.env)

    def load_league(self) -> list[Member]:
        """Load the snapshots of a league into the model; none where the run had no league."""
        if not self._league.is_dir():
            return []
        members = sorted(
            (Member.parse(path.name) for path in self._league.iterdir()), key=lambda each: (each.source, each.iteration)
        )
        for member in members:
            if member.name not in self.model.adapters:
                self.model.load_adapter(member.name, self._league / member.name)
        return members

    def population(self) -> list[str]:
        """The main adapter's snapshots and, last, itself; itself alone without a league."""
        main = next(iter(self.assignment.values()))
        return [*(member.name for member in self.load_league() if member.source == main), main]

    def cast(self, arm: Arm, specs: Sequence[EpisodeSpec]) -> tuple[list[EpisodeSpec], list[tuple[str, ...]] | None]:
        """An arm's episodes, and which agents count; None for all."""
        if arm.who is Who.POPULATION:
            names = self.population()
            found: list[EpisodeSpec] = []
            for spec in specs:
                rng = np.random.default_rng(derive_seed(spec.seed, "population"))
                drawn = [names[int(rng.integers(len(names)))] for _ in self.sides]
                cast = {a: player for side, player in zip(self.sides, drawn, strict=True) for a in side}
                found.append(replace(spec, cast=cast))
            return found, None
        if arm.opponent is None:
            return list(specs), None
        watched = [self.sides[number % len(self.sides)] for number in range(len(specs))]
        script = SCRIPT + arm.opponent
        return [
            replace(spec, cast={agent: script for agent in self.env.agents if agent not in mine})
            for spec, mine in zip(specs, watched, strict=True)
        ], watched

    def worth(self, arm: Arm, game: ExactGame | None) -> GameValue | None:
        """What an arm's strategy is worth, where that can be said."""
        if game is None or arm.opponent is not None or arm.who in (Who.PLANNED, Who.FALLBACK):
            return None
        strategy: Strategy | None
        if arm.who in (Who.RANDOM, Who.SCRIPTED):
            strategy = game.script(arm.who.value)
        elif arm.who is Who.POPULATION:
            team = self.team()
            strategy = game.average([game.ask(team, name) for name in self.population()])
        else:
            strategy = game.ask(self.team(arm.greedy, arm.who is Who.WARM))
        return None if strategy is None else game.worth(strategy)

    def team(self, greedy: bool = False, warm: bool = False) -> GenerativeTeam:
        """The trained team, or the warm start."""
        assignment: dict[str, str | None] = dict(self.assignment)
        if warm:
            for name in dict.fromkeys(self.assignment.values()):
                if _WARM + name not in self.model.adapters:
                    self.model.load_adapter(_WARM + name, self._warm / name)
            assignment = {agent: _WARM + name for agent, name in self.assignment.items()}
        temperature = 0.0 if greedy else 1.0
        return GenerativeTeam(self.model, self.env.language, self.recipe.agent, assignment, temperature)

    def policy(self, arm: Arm) -> Policy:
        """Who plays an arm."""
        if arm.who in (Who.RANDOM, Who.SCRIPTED):
            return ScriptedPolicy(arm.who.value)
        return self.team(arm.greedy, arm.who is Who.WARM)


def heldout_specs(recipe: Recipe, episodes: int, seed: int) -> list[EpisodeSpec]:
    """The first `episodes` held-out instances; the same for everyone who plays the task with this seed."""
    seeds: dict[int, None] = {}
    number = 0
    while len(seeds) < episodes:
        seeds[derive_seed(seed, "eval", number) % 2**31] = None
        number += 1
    return [EpisodeSpec(recipe.task, recipe.params, each, "heldout") for each in seeds]


def play(
    specs: Sequence[EpisodeSpec],
    policy: Policy,
    channel: ChannelSettings,
    seed: int,
    reporter: Reporter | None = None,
) -> list[Episode]:
    """Play instances in parts of at most 256 side by side, equally large, since shuffling needs company."""
    parts = max(1, math.ceil(len(specs) / _SIDE_BY_SIDE))
    episodes: list[Episode] = []
    for part in range(parts):
        some = specs[len(specs) * part // parts : len(specs) * (part + 1) // parts]
        episodes += rollout(some, policy, channel, derive_seed(seed, "eval"))
        if reporter is not None:
            reporter.advance(len(episodes))
    return episodes


def standard_arms(recipe: Recipe, env: Env) -> list[Arm]:
    """Baselines, the warm start and the trained team, sampled and greedy, and the shuffled control."""
    channel = recipe.channel
    arms = [Arm("random", Who.RANDOM, channel)]
    if hasattr(env, "player"):
        arms.append(Arm("scripted", Who.SCRIPTED, channel))
    for who in (Who.WARM, Who.TRAINED):
        arms += [Arm(who.value, who, channel), Arm(f"{who.value}-greedy", who, channel, greedy=True)]
    if recipe.agent.spans.say and env.language.message and channel.mode is ChannelMode.ON:
        shuffled = channel.model_copy(update={"mode": ChannelMode.SHUFFLED})
        arms.append(Arm("trained-shuffled", Who.TRAINED, shuffled))
    if recipe.league is not None:
        arms.append(Arm(Who.POPULATION.value, Who.POPULATION, channel))
    for name in getattr(env, "opponents", {}):
        arms.append(Arm(f"trained-{name}", Who.TRAINED, channel, opponent=name))
    return arms


def sides_of(recipe: Recipe, env: Env) -> tuple[tuple[str, ...], ...]:
    """Who plays together, where agents are opponents: as the league says, or each for itself."""
    if recipe.league is None:
        return tuple((agent,) for agent in env.agents)
    return recipe.league.sides_of(env.agents)


def override_arms(held: ChannelSettings, asked: ChannelSettings) -> list[Arm]:
    """The trained team over a channel that is not the run's own."""
    if asked == held:
        return []
    parts = [asked.mode.value] if asked.mode != held.mode else []
    parts += [f"drop{asked.drop:g}"] if asked.drop != held.drop else []
    before = _flat(held.model_dump(mode="json"))
    for key, value in _flat(asked.model_dump(mode="json")).items():
        if key not in _NAMED_APART and before.get(key, _flat) != value:
            parts.append(f"{key}={value}")
    name = "-".join([Who.TRAINED.value, *parts])
    return [Arm(name, Who.TRAINED, asked), Arm(f"{name}-greedy", Who.TRAINED, asked, greedy=True)]


def evaluate(
    run: Path,
    changed: Recipe | None = None,
    episodes: int | None = None,
    seed: int = 0,
    greedy: bool = False,
    reporter: Reporter | None = None,
    special: SpecialPlay | None = None,
) -> Evaluation:
    """Play every arm on the same held-out seeds, measure, and keep the figures under RUN/eval/.

    Args:
        run: a finished run's folder.
        changed: its recipe with other `params`, `agent` or `channel`. Task and agents change for all arms; another
            channel adds arms of its own, and those then stand in front.
        episodes: per arm; by default as many as the recipe says.
        seed: of the task instances and of every choice.
        greedy: put the greedy arm in front.
        reporter: receives progress.
        special: adds an arm in which the trained team plans, or has another to fall back on, and puts it in front.

    Raises:
        ConfigError: the run is not finished, or lacks what `special` needs.
        ModelError: its model or one of its adapters cannot be loaded.
    """
    reporter = reporter or Silent()
    held = load_recipe_of(run)
    recipe = changed or held
    count = episodes or held.evaluation.episodes
    players = Players(run, recipe)
    # Rounds of talk are a part of the task, which changes for all arms.
    channel = held.channel.model_copy(update={"rounds": recipe.channel.rounds})
    arms = standard_arms(recipe.model_copy(update={"channel": channel}), players.env)
    extra = override_arms(channel, recipe.channel)
    known = {(arm.who, arm.channel, arm.greedy): arm.name for arm in arms if arm.opponent is None}
    arms += [arm for arm in extra if (arm.who, arm.channel, arm.greedy) not in known]
    wanted = (Who.TRAINED, recipe.channel, greedy)
    main = next(arm.name for arm in arms if arm.opponent is None and (arm.who, arm.channel, arm.greedy) == wanted)
    # Made before anything is played: what is wrong with it is said at once.
    thinker = None if special is None else special.team(players, run, greedy)
    if special is not None:
        main = special.who.value
        arms.append(Arm(main, special.who, recipe.channel, greedy))
    specs = heldout_specs(recipe, count, seed)
    results: list[ArmResult] = []
    game = exact_game(recipe, players.sides)
    role = getattr(players.env, "role", None)
    for arm in arms:
        reporter.stage(arm.title, count)
        started = time.perf_counter()
        cast, watched = players.cast(arm, specs)
        policy = thinker if special is not None and arm.who is special.who else players.policy(arm)
        assert policy is not None
        played = play(cast, policy, arm.channel, seed, reporter)
        tokens = fallen = None
        if isinstance(policy, PlanningTeam):
            tokens = policy.tokens_generated / max(1, policy.decisions)
        if isinstance(policy, FallbackTeam):
            fallen = policy.fallen_back / max(1, policy.decisions)
        wall = time.perf_counter() - started
        measures = measure(played, players.env.language, recipe.agent.spans, role, watched)
        results.append(ArmResult(arm, measures, wall, players.worth(arm, game), tokens, fallen))
    found = Evaluation(
        run=str(run),
        task=recipe.task,
        params=recipe.params,
        seed=seed,
        main=main,
        arms=tuple(results),
        no_message_ceiling=no_message_ceiling(recipe),
        overrides={**differences(held, recipe), **({} if special is None else special.overrides)},
        made={
            "versions": versions(),
            "commit": commit(),
            "machine": machine(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    default = held.evaluation.episodes
    write_json(folder / _file_name(found, count if count != default else None, greedy), found.to_json())
    return found


def no_message_ceiling(recipe: Recipe) -> float | None:
    """The best success without messages, where the task knows it."""
    found = task_class(recipe.task)
    ceiling, params = getattr(found, "no_message_ceiling", None), getattr(found, "Params", None)
    if ceiling is None or params is None:
        return None
    return ceiling(params.model_validate(without_rounds(recipe.params)))


def differences(held: Recipe, changed: Recipe) -> dict[str, Any]:
    """The changed values by dotted key."""
    before, after = _flat(held.model_dump(mode="json")), _flat(changed.model_dump(mode="json"))
    return {key: value for key, value in after.items() if before.get(key, _flat) != value}


def saved_evaluation(run: Path) -> dict[str, Any] | None:
    """The evaluation of a run as it was trained that has the most episodes, the newest of equals; None where there is
    none."""
    found: list[tuple[str, dict[str, Any]]] = []
    for file in (run / FOLDER).glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not content["overrides"]:
            found.append((content["at"], content))
    return max(found, key=lambda each: (each[1]["episodes"], each[0]))[1] if found else None


def _worth(found: GameValue) -> dict[str, Any]:
    """The figures of an exact game; `first_seat_value` where there are seats."""
    first = found.values.get("first")
    return {
        "exploitability": found.exploitability,
        **({} if first is None else {"first_seat_value": first}),
        "worth": asdict(found),
    }


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _file_name(found: Evaluation, episodes: int | None, greedy: bool) -> str:
    """Says what is not as usual; `plain.json` where everything is."""
    parts = [f"{key}={value}" for key, value in sorted(found.overrides.items())]
    parts += [f"episodes={episodes}"] if episodes else []
    parts += [f"seed={found.seed}"] if found.seed else []
    parts += ["greedy"] if greedy else []
    name = re.sub(r"[^\w.=-]+", "_", "-".join(parts)) or "plain"
    if len(name) > 120:
        name = f"{name[:100]}-{derive_seed(name):x}"
    return name + ".json"


__all__ = [
    "Arm", "ArmResult", "Evaluation", "Players", "SpecialPlay", "Who", "differences", "evaluate", "heldout_specs",
    "no_message_ceiling", "override_arms", "play", "saved_evaluation", "sides_of", "standard_arms",
]
