"""Rollouts: many episodes played in lockstep, every live (episode, agent) request of a step in one policy call.

Parts: `EpisodeSpec`, `rollout`, and `ScriptedPolicy`, which lets the tasks' own players take the place of a model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from preconcert.agents import ChannelSettings, TextChannel
from preconcert.core import (
    ConfigError,
    Decision,
    Env,
    EnvError,
    Episode,
    Message,
    Observation,
    Policy,
    StopReason,
    Trajectory,
    Turn,
    TurnRequest,
    UnknownNameError,
    derive_seed,
)
from preconcert.envs import make_env


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """One episode to be played."""

    task: str
    params: Mapping[str, Any]
    seed: int
    split: str = "train"
    sample: int = 0
    """Index within the group of episodes on the same seed."""
    iteration: int = -1
    cast: Mapping[str, str] = field(default_factory=dict)
    """Who plays an agent instead of what the policy has for it: an adapter, or `script:NAME` for one of the task's own
    players."""

    @property
    def group(self) -> str:
        """Episodes of one group are samples of the same task instance, played by the same cast."""
        cast = "".join(f":{agent}={player}" for agent, player in self.cast.items())
        return f"{self.task}:{self.split}:{self.seed}{cast}"

    @property
    def name(self) -> str:
        """Unique among the episodes of a run."""
        return f"{self.group}:{self.iteration}:{self.sample}"


SCRIPT = "script:"
"""Goes before the name of one of the task's own players in a cast."""


class ScriptedPolicy:
    """The task's own players as a policy.

    Args:
        kind: `expert`, `scripted`, `random`, or one of the task's opponents.

    Raises:
        ConfigError: when deciding, if the task has no players.
    """

    version = -1

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def decide(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        """One turn without tokens per request."""
        return [self._decide(request) for request in requests]

    def finish(self, episode: str) -> None:
        """Nothing is held."""

    def _decide(self, request: TurnRequest) -> Turn:
        make_player = getattr(request.env, "player", None)
        if make_player is None:
            if self.kind != "random":
                raise ConfigError(
                    f"{type(request.env).__name__} has no {self.kind!r} player; give it a `player(kind)` method, "
                    "or set warm_start.player=random"
                )
            player = _RandomPlayer()
        else:
            player = make_player(self.kind)
        decision = player.decide(request.env, request.observation, request.inbox, np.random.default_rng(request.seed))
        message = None
        if decision.message is not None and request.others:
            message = Message(
                sender=request.agent,
                recipients=request.others,
                payload=decision.message,
                bits=0.0,
                tokens=len(decision.message.split()),
                sent_at=request.observation.step,
            )
        return Turn(
            agent=request.agent,
            step=request.observation.step,
            observation=request.observation,
            inbox=request.inbox,
            prompt_ids=(),
            completion_ids=(),
            logprobs=(),
            sampled=(),
            spans=(),
            intentions=(),
            forecast=None,
            message=message,
            action=decision.action,
            malformed=False,
            reward=0.0,
        )


class _RandomPlayer:
    """Uniform over legal actions and message words, for environments without players of their own."""

    def decide(
        self, env: Env, observation: Observation, inbox: Sequence[Message], rng: np.random.Generator
    ) -> Decision:
        slots = env.language.message
        words = " ".join(slot.choices[int(rng.integers(len(slot.choices)))] for slot in slots)
        action = observation.legal_actions[int(rng.integers(len(observation.legal_actions)))]
        return Decision(action, words or None)


@dataclass(slots=True)
class _Live:
    spec: EpisodeSpec
    env: Env
    observations: Mapping[str, Observation]
    turns: dict[str, list[Turn]] = field(default_factory=lambda: defaultdict(list))
    states: list[str] = field(default_factory=list)


def rollout(
    specs: Sequence[EpisodeSpec],
    policies: Policy | Mapping[str, Policy],
    channel: ChannelSettings,
    seed: int,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Episode]:
    """Play all episodes to their ends.

    Args:
        specs: what to play; all run side by side.
        policies: one policy for everyone, or one by agent name.
        channel: how messages travel.
        seed: every random choice of the agents and of the channel follows from it and from the specs.
        on_step: called after each step with (step, number of episodes still running).

    Returns:
        One episode per spec, in order.

    Raises:
        EnvError: an environment broke its protocol.
    """
    live = {spec.name: _start(spec) for spec in specs}
    if len(live) != len(specs):
        raise ConfigError(f"{len(specs)} episodes were asked for, {len(live)} of them different")
    groups = {name: state.spec.group for name, state in live.items()}
    talk = TextChannel(channel, derive_seed(seed, "rollout"))
    finished: dict[str, Episode] = {}
    step = 0
    while live:
        requests = _requests(live, talk, seed)
        turns = _decide(requests, policies)
        sent: dict[str, list[Message]] = {}
        for name in list(live):
            state, mine = live[name], turns[name]
            sent[name] = [turn.message for turn in mine.values() if turn.message is not None]
            episode = _advance(state, mine, policies)
            if episode is not None:
                finished[name] = episode
                del live[name], sent[name]
                talk.close(name)
                for policy in _distinct(policies):
                    policy.finish(name)
        talk.transmit(sent, groups, step)
        step += 1
        if on_step is not None:
            on_step(step, len(live))
    return [finished[spec.name] for spec in specs]


def _version(policies: Policy | Mapping[str, Policy], agent: str, player: str | None) -> int:
    """Updates behind whoever plays an agent."""
    policy = _policy_of(policies, agent)
    if player is None:
        return policy.version
    if player.startswith(SCRIPT):
        return ScriptedPolicy.version
    version_of = getattr(policy, "version_of", None)
    return policy.version if version_of is None else int(version_of(player))


def _start(spec: EpisodeSpec) -> _Live:
    env = make_env(spec.task, spec.params, spec.seed, spec.split)
    for agent in spec.cast:
        if agent not in env.agents:
            raise UnknownNameError("agent", agent, env.agents)
    observations = env.reset()
    state = _Live(spec, env, observations)
    state.states.append(env.state())
    return state


def _requests(live: Mapping[str, _Live], talk: TextChannel, seed: int) -> list[TurnRequest]:
    requests: list[TurnRequest] = []
    for name, state in live.items():
        for agent in state.env.agents:
            if agent not in state.observations:
                raise EnvError(f"{state.spec.task}: no observation for agent {agent!r}")
            observation = state.observations[agent]
            requests.append(
                TurnRequest(
                    episode=name,
                    agent=agent,
                    observation=observation,
                    inbox=talk.inbox(name, agent),
                    others=tuple(other for other in state.env.agents if other != agent),
                    language=state.env.language,
                    seed=derive_seed(seed, name, agent, observation.step),
                    env=state.env,
                    player=state.spec.cast.get(agent),
                )
            )
    return requests


def _decide(
    requests: Sequence[TurnRequest], policies: Policy | Mapping[str, Policy]
) -> dict[str, dict[str, Turn]]:
    decided: dict[tuple[str, str], Turn] = {}
    by_policy: dict[int | str, tuple[Policy, list[TurnRequest]]] = {}
    for request in requests:
        if request.player is not None and request.player.startswith(SCRIPT):
            if request.player not in by_policy:
                by_policy[request.player] = (ScriptedPolicy(request.player.removeprefix(SCRIPT)), [])
            by_policy[request.player][1].append(request)
        else:
            policy = _policy_of(policies, request.agent)
            by_policy.setdefault(id(policy), (policy, []))[1].append(request)
    for key, (policy, asked) in by_policy.items():
        for request, turn in zip(asked, policy.decide(asked), strict=True):
            by_script = isinstance(key, str)
            decided[request.episode, request.agent] = replace(turn, adapter=request.player) if by_script else turn
    turns: dict[str, dict[str, Turn]] = defaultdict(dict)
    for request in requests:  # in the order of the agents, whoever decided first
        turns[request.episode][request.agent] = decided[request.episode, request.agent]
    return turns


def _policy_of(policies: Policy | Mapping[str, Policy], agent: str) -> Policy:
    if isinstance(policies, Mapping):
        if agent not in policies:
            raise UnknownNameError("agent", agent, policies)
        return policies[agent]
    return policies


def _distinct(policies: Policy | Mapping[str, Policy]) -> list[Policy]:
    if not isinstance(policies, Mapping):
        return [policies]
    return list({id(policy): policy for policy in policies.values()}.values())


def _advance(state: _Live, turns: Mapping[str, Turn], policies: Policy | Mapping[str, Policy]) -> Episode | None:
    """Carry out one joint action; the finished episode, if it ended."""
    result = state.env.step({agent: turn.action for agent, turn in turns.items()})
    for agent, turn in turns.items():
        if agent not in result.rewards:
            raise EnvError(f"{state.spec.task}: no reward for agent {agent!r}")
        state.turns[agent].append(replace(turn, reward=float(result.rewards[agent])))
    state.states.append(state.env.state())
    state.observations = result.observations
    if not result.done:
        if len(state.states) > state.env.horizon:
            raise EnvError(f"{state.spec.task}: still running after its horizon of {state.env.horizon} steps")
        return None
    stop = StopReason.TRUNCATED if result.truncated else StopReason.TERMINATED
    return Episode(
        task=state.spec.task,
        params=dict(state.spec.params),
        seed=state.spec.seed,
        split=state.spec.split,
        group=state.spec.group,
        sample=state.spec.sample,
        iteration=state.spec.iteration,
        trajectories={
            agent: Trajectory(
                agent,
                tuple(state.turns[agent]),
                _version(policies, agent, state.spec.cast.get(agent)),
                stop,
                result.observations[agent],
            )
            for agent in state.env.agents
        },
        success=result.success,
        states=tuple(state.states),
    )
