"""Learning from what was only imagined: groups of imagined continuations, compared and trained on like real ones.

From real moments of an iteration (one agent's view, inbox and past turns) that agent plays on in a world model, several
times from the same moment: its own turns are sampled from its policy, with their tokens and log-probabilities, and the
world model says what they lead to, the others' actions included. A continuation is paid its imagined rewards and, where
it stops at the horizon, the model's value of what is still to come; its return is their plain sum. The continuations of
one moment are a group, as the games of one task instance are, so that credit, rows and loss take them as they are: an
`Episode` whose `split` is `IMAGINED`, in which the others are players without tokens.

An imagination in which the model writes something that is no step ends there with the lowest return that the process
imagined for the agent in the iteration, and is counted: what lies beyond the model is worth nothing to the agent.

Parts: `ImaginationSettings`, `Imaginer` (plays), `Imagined` (what it played), `damped_advantages`, and `replayed` (a
real moment's environment, for oracles). No step of an environment is taken and none is counted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from preconcert.agents import AgentSettings, Context, GenerativeTeam
from preconcert.agents.team import Memory
from preconcert.core import (
    ConfigError,
    Env,
    Episode,
    ImaginedStep,
    Message,
    Move,
    Observation,
    Rehearsing,
    StopReason,
    TrainingError,
    Trajectory,
    Turn,
    TurnRequest,
    WorldModel,
    derive_seed,
)
from preconcert.envs import make_env
from preconcert.training.credit import Ledger, Number, TurnKey
from preconcert.world_models import OracleValue, OracleWorldModel

IMAGINED = "imagined"
"""The split of episodes that never happened."""


class ImaginedIn(StrEnum):
    """What the agents play on in."""

    WORLD = "world"
    """The recipe's world model, which sees what the agent has seen."""
    ORACLE = "oracle"
    """The environment itself, with everybody's true view: a ceiling. It saves nothing, although its steps are not
    counted as real ones."""


class ImaginationSettings(BaseModel):
    """How much is imagined, and from where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ImaginedIn = ImaginedIn.WORLD
    """What the agents play on in: `world` or `oracle`."""

    ratio: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Imagined turns per real turn of a learner if none ended before the horizon. Real and imagined tokens count the
    same in the loss."""
    group: int = Field(8, ge=2)
    """Imaginations from one moment, which are compared with one another."""
    horizon: int = Field(4, ge=1)
    """Steps that are imagined from there."""
    warmup_iterations: int = Field(0, ge=0)
    """Iterations before the first imagination."""
    value: bool = True
    """Add the world model's value of what is still to come at the horizon. Without it, what is not imagined is worth
    nothing."""
    damped: bool = True
    """Weigh a group by how far its returns lie apart, beside those of real games (`damped_advantages`). A model's
    values hardly ever agree to the last digit, and estimators that divide by the standard deviation make of any
    difference a large one."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Where imaginations begin."""

    episode: Episode
    agent: str
    index: int
    """Which of the agent's turns."""

    @property
    def name(self) -> str:
        """Unique in a run."""
        one = self.episode
        return f"{one.group}:{one.iteration}:{one.sample}:{self.agent}:{self.index}"

    @property
    def said(self) -> Message | None:
        """What the agent said in the turn before."""
        return self.episode.trajectories[self.agent].turns[self.index - 1].message if self.index else None


@dataclass(frozen=True, slots=True)
class Imagined:
    """What was imagined."""

    episodes: tuple[Episode, ...]
    """Groups of continuations, each in one piece."""
    before: tuple[Message | None, ...]
    """What the agent of each had said last, when it began."""
    metrics: Mapping[str, float]
    """`imagination/...`: how many groups, steps and tokens, what they return, how they end."""


def valued_oracle(policy: Rehearsing) -> OracleWorldModel:
    """The environment in a world model's place, its values from games that a policy plays to the end.

    Raises:
        ConfigError: a team that remembers its turns, of which those that are only imagined are no part.
    """
    if isinstance(policy, GenerativeTeam):
        check_memory(policy.settings)
    return OracleWorldModel(policy, OracleValue.ROLLOUT)


def check_memory(settings: AgentSettings) -> None:
    """Can an oracle have values from games of such agents?

    Raises:
        ConfigError: they remember their turns, and those that are only imagined they do not.
    """
    if settings.remembers:
        raise ConfigError(
            "the oracle's values need agent.memory=0 and agent.context=turn: agents that play on from an imagined "
            "moment would not remember the imagined turns before it"
        )


def damped_advantages(
    advantages: Mapping[TurnKey, Number], ledger: Ledger, real: Ledger = ()
) -> dict[TurnKey, Number]:
    """Advantages times min(1, s / S): s the standard deviation of the returns in the group; S the root of its mean
    square over the agent's groups, or the standard deviation of the agent's returns in real games if that is larger.

    Groups in which as much is at stake as in a real game keep their advantages; those whose returns differ by the noise
    of the model's values lose them, also where all groups do. Whether an estimator divides by s does not matter for
    that.

    Args:
        advantages: of all turns.
        ledger: the games that they are about.
        real: the iteration's real games.
    """
    returns: dict[tuple[str, str], list[float]] = {}
    for game in ledger:
        for agent, strand in game.strands.items():
            if strand.learns:
                returns.setdefault((agent, game.group), []).append(strand.total)
    spreads = {key: float(np.std(values)) for key, values in returns.items()}
    usual: dict[str, float] = {}
    for agent in {agent for agent, _ in spreads}:
        own = np.sqrt(np.mean([spread**2 for (who, _), spread in spreads.items() if who == agent]))
        earned = [game.strands[agent].total for game in real if agent in game.strands]
        usual[agent] = max(float(own), float(np.std(earned)) if earned else 0.0)

    def weight(key: TurnKey) -> float:
        spread = spreads.get((key.agent, ledger[key.episode].group))
        return 1.0 if spread is None or not usual[key.agent] else min(1.0, spread / usual[key.agent])

    return {key: weight(key) * value for key, value in advantages.items()}


@dataclass(slots=True)
class _Line:
    """One continuation under way."""

    moment: Moment
    sample: int
    request: TurnRequest
    memory: Memory
    belief: Any
    turns: list[Turn] = field(default_factory=list)
    steps: list[ImaginedStep] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Nothing follows."""
        return bool(self.steps) and (self.steps[-1].done or self.steps[-1].malformed)


class Imaginer:
    """Lets the agents of a team play on in a world model.

    Args:
        settings: how much, and from where.
        team: whose agents; nothing that it remembers is changed.
        model: what they play in.
        learners: the adapters that learn; nobody else imagines.
        oracle: the model looks at environments and at everybody's views, and is given both as they were.
    """

    def __init__(
        self,
        settings: ImaginationSettings,
        team: GenerativeTeam,
        model: WorldModel,
        learners: Collection[str],
        oracle: bool = False,
    ) -> None:
        self.settings = settings
        self.team = team
        self.model = model
        self.learners = frozenset(learners)
        self.oracle = oracle
        self._env = replayed if oracle else _Beginnings().of

    def imagine(self, episodes: Sequence[Episode], seed: int) -> Imagined:
        """Groups of continuations of the agents' games.

        Args:
            episodes: finished ones, of whose turns some are taken, each as likely as any other.
            seed: every random choice follows from it and from the moments.

        Raises:
            TrainingError: the model has no value to give where one is needed.
        """
        settings = self.settings
        moments = [
            Moment(episode, agent, index)
            for episode in episodes
            for agent, trajectory in episode.trajectories.items()
            for index, turn in enumerate(trajectory.turns)
            if turn.completion_ids and turn.adapter in self.learners
        ]
        # Each by its name, so that a division of the rollout among processes chooses the same.
        share = settings.ratio / (settings.group * settings.horizon)
        moments = [moment for moment in moments if derive_seed(seed, "moment", moment.name) / 2.0**63 < share]
        if not moments:
            return Imagined((), (), {})
        before = self._world_tokens
        lines = self._begin(moments)
        for step in range(settings.horizon):
            self._advance([line for line in lines if not line.over], step, seed)
        for moment in moments:
            self.model.finish(moment.name)
            self.team.finish(moment.name)
        worst = self._worst(lines)
        return Imagined(
            tuple(self._episode(line, worst[line.moment.agent]) for line in lines),
            tuple(line.moment.said for line in lines),
            self._metrics(lines, len(moments), self._world_tokens - before),
        )

    @property
    def _world_tokens(self) -> int:
        """What the model has written so far; 0 for models that do not write."""
        return int(getattr(self.model, "tokens_generated", 0))

    def _begin(self, moments: Sequence[Moment]) -> list[_Line]:
        """All continuations at their first view."""
        seats = [(moment, moment.agent, self._env(moment)) for moment in moments]
        if self.oracle:
            seats += [
                (moment, other, env)
                for moment, _, env in seats
                for other in moment.episode.trajectories
                if other != moment.agent
            ]
        requests = [self._request(moment, agent, env) for moment, agent, env in seats]
        pasts = [moment.episode.trajectories[agent].turns[: moment.index] for moment, agent, _ in seats]
        memories = [self._memory(past) for past in pasts]
        if self.oracle:  # it asks the team what the others do
            for request, memory in zip(requests, memories, strict=True):
                self.team.remember(request.episode, request.agent, memory)
        beliefs = self.model.begin(requests, pasts)
        return [
            _Line(moment, sample, request, memory, belief)
            for moment, request, memory, belief in zip(moments, requests, memories, beliefs, strict=False)
            for sample in range(self.settings.group)
        ]

    def _request(self, moment: Moment, agent: str, env: Env) -> TurnRequest:
        turn = moment.episode.trajectories[agent].turns[moment.index]
        return TurnRequest(
            episode=moment.name,
            agent=agent,
            observation=turn.observation,
            inbox=turn.inbox,
            others=tuple(other for other in moment.episode.trajectories if other != agent),
            language=self.team.language,
            seed=0,
            env=env,
            player=turn.adapter,
        )

    def _memory(self, past: Sequence[Turn]) -> Memory:
        """What the team would remember of an agent that has taken these turns."""
        if not past:
            return Memory()
        actions = tuple(turn.action for turn in past)
        if self.team.settings.context is not Context.TRANSCRIPT:
            return Memory(actions)
        last = past[-1]
        ended = last.completion_ids[-1] == self.team.format.eos
        return Memory(actions, last.prompt_ids + last.completion_ids, ended)

    def _advance(self, lines: Sequence[_Line], step: int, seed: int) -> None:
        if not lines:
            return
        seeds = [derive_seed(seed, line.moment.name, line.sample, step) for line in lines]
        asked = [replace(line.request, seed=own) for line, own in zip(lines, seeds, strict=True)]
        answers = self.team.rehearse(asked, [line.memory for line in lines])
        moves = [Move(turn.action, turn.message.payload if turn.message else None) for turn, _ in answers]
        found = self.model.advance(
            [line.belief for line in lines], moves, [derive_seed(own, "world") for own in seeds]
        )
        for line, (turn, memory), result in zip(lines, answers, found, strict=True):
            line.turns.append(turn)
            line.steps.append(result)
            line.memory, line.belief = memory, result.belief
            if not line.over:
                assert result.observation is not None
                line.request = replace(line.request, observation=result.observation, inbox=result.inbox)

    def _rewards(self, line: _Line) -> list[float]:
        """What each step pays, the horizon's value included; a malformed step pays nothing yet."""
        rewards = [0.0 if step.malformed else step.reward for step in line.steps]
        if self.settings.value and not line.over:
            value = line.steps[-1].value
            if value is None:
                raise TrainingError(
                    f"{type(self.model).__name__} gives no value at the horizon; set grpo.imagination.value=false, or "
                    "imagine to the end"
                )
            rewards[-1] += value
        return rewards

    def _worst(self, lines: Sequence[_Line]) -> dict[str, float]:
        """By agent the lowest return of an imagination that is one; 0 where there is none."""
        worst = dict.fromkeys((line.moment.agent for line in lines), float("inf"))
        for line in lines:
            if not line.steps[-1].malformed:
                worst[line.moment.agent] = min(worst[line.moment.agent], sum(self._rewards(line)))
        return {agent: value if np.isfinite(value) else 0.0 for agent, value in worst.items()}

    def _episode(self, line: _Line, worst: float) -> Episode:
        rewards = self._rewards(line)
        stop = StopReason.TERMINATED if line.steps[-1].done else StopReason.TRUNCATED
        if line.steps[-1].malformed:
            rewards[-1] = min(0.0, worst - sum(rewards))
            stop = StopReason.CUT
        real, agent = line.moment.episode, line.moment.agent
        views = [turn.observation for turn in line.turns]
        final = line.steps[-1].observation or views[-1]
        version = real.trajectories[agent].policy_version
        trajectories = {
            other: Trajectory(other, self._others(other, line, rewards), -1, stop, _unseen(other, final, self.team))
            for other in real.trajectories
        }
        own = tuple(replace(turn, reward=paid) for turn, paid in zip(line.turns, rewards, strict=True))
        trajectories[agent] = Trajectory(agent, own, version, stop, final)
        return replace(
            real,
            split=IMAGINED,
            group=f"{line.moment.name}:{IMAGINED}",
            sample=line.sample,
            trajectories=trajectories,
            success=None,
            states=tuple(view.text for view in (*views, final)),
        )

    def _others(self, other: str, line: _Line, rewards: Sequence[float]) -> tuple[Turn, ...]:
        """What another agent does in it. It is paid the same, so that a mean over the team is the agent's own."""
        return tuple(
            Turn(
                agent=other,
                step=turn.step,
                observation=_unseen(other, turn.observation, self.team),
                inbox=(),
                prompt_ids=(),
                completion_ids=(),
                logprobs=(),
                sampled=(),
                spans=(),
                intentions=(),
                forecast=None,
                message=None,
                action=step.others.get(other, ""),
                malformed=False,
                reward=paid,
            )
            for turn, step, paid in zip(line.turns, line.steps, rewards, strict=True)
        )

    def _metrics(self, lines: Sequence[_Line], groups: int, world_tokens: int) -> dict[str, float]:
        whole = [line for line in lines if not line.steps[-1].malformed]
        metrics = {
            "imagination/groups": float(groups),
            "imagination/steps": float(sum(len(line.steps) for line in lines)),
            "imagination/policy_tokens": float(sum(len(turn.completion_ids) for line in lines for turn in line.turns)),
            "imagination/world_tokens": float(world_tokens),
            "imagination/malformed": 1.0 - len(whole) / len(lines),
            "imagination/ended": sum(line.steps[-1].done for line in whole) / len(lines),
        }
        if whole:
            metrics["imagination/return"] = float(np.mean([sum(self._rewards(line)) for line in whole]))
        return metrics


def replayed(moment: Moment) -> Env:
    """The environment as it was at a moment, by carrying out the recorded actions again.

    Raises:
        TrainingError: it does not show what it showed then.
    """
    one = moment.episode
    env = make_env(one.task, one.params, one.seed, one.split)
    seen = env.reset()
    for index in range(moment.index):
        seen = env.step({agent: each.turns[index].action for agent, each in one.trajectories.items()}).observations
    was = one.trajectories[moment.agent].turns[moment.index].observation.text
    if seen[moment.agent].text != was:
        raise TrainingError(f"{moment.name}: the environment shows {seen[moment.agent].text!r} and not {was!r}")
    return env


class _Beginnings:
    """An environment for requests that must have one: each task's, not begun and never to be."""

    def __init__(self) -> None:
        self._held: dict[str, Env] = {}

    def of(self, moment: Moment) -> Env:
        """The same for all moments of a task."""
        one = moment.episode
        if one.task not in self._held:
            self._held[one.task] = make_env(one.task, one.params, one.seed, one.split)
        return self._held[one.task]


def _unseen(agent: str, view: Observation, team: GenerativeTeam) -> Observation:
    """What an agent sees is not imagined for it."""
    return Observation(agent, "", team.language.actions, view.step)
