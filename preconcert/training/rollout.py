"""Rollouts: many episodes played in lockstep, every live (episode, agent) request of a step in one policy call.

Parts: `EpisodeSpec`, `rollout`, and `ScriptedPolicy`, which lets the tasks' own players take the place of a model.
What `rollout` is made of (`Running`, `begin`, `turn_requests`, `joint_turns`, `carry_out`, `play_out`) also serves
`branching.py`, where games branch off a running one, and the HTTP service, where they are played turn by turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from preconcert.agents import Channel, ChannelSettings
from preconcert.agents.channel import Scene, check_topology, positions_of, slot_bits
from preconcert.core import (
    ConfigError,
    Decision,
    Delivery,
    Env,
    EnvError,
    Episode,
    Message,
    Observation,
    Policy,
    Slot,
    StopReason,
    Trajectory,
    Turn,
    TurnRequest,
    UnknownNameError,
    derive_seed,
)
from preconcert.envs import make_env, rounds_of, with_rounds


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
    channel: ChannelSettings | None = None
    """How messages travel in this episode; None: as in the rollout. It is one for all of a group, whose members are
    compared with one another."""

    @property
    def group(self) -> str:
        """Episodes of one group are samples of the same task instance, played by the same cast."""
        cast = "".join(f":{agent}={player}" for agent, player in self.cast.items())
        return f"{self.instance}{cast}"

    @property
    def instance(self) -> str:
        """The task instance, whoever plays it: what a message is about."""
        return f"{self.task}:{self.split}:{self.seed}"

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

    def fork(self, episode: str, name: str) -> None:
        """Nothing is held."""

    def recall(self, episode: str, agent: str) -> None:
        """Nothing is remembered."""

    def rehearse(self, requests: Sequence[TurnRequest], memories: Sequence[None]) -> list[tuple[Turn, None]]:
        """As `decide`."""
        return [(turn, None) for turn in self.decide(requests)]

    def remember(self, episode: str, agent: str, memory: None) -> None:
        """Nothing is remembered."""

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
                word_bits=slot_bits(decision.message.split(), request.language.message) or (),
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


Policies = Policy | Mapping[str, Policy]
"""One policy for everyone, or one by agent name."""


@dataclass(slots=True)
class Running:
    """An episode under way."""

    spec: EpisodeSpec
    env: Env
    observations: Mapping[str, Observation]
    turns: dict[str, list[Turn]] = field(default_factory=lambda: defaultdict(list))
    states: list[str] = field(default_factory=list)


def rollout(
    specs: Sequence[EpisodeSpec],
    policies: Policies,
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
    live = begin(specs, channel)
    talk = channel_of(specs, channel, seed)
    finished = play_out(live, policies, talk, seed, on_step=on_step)
    return [finished[spec.name] for spec in specs]


def begin(specs: Sequence[EpisodeSpec], channel: ChannelSettings) -> dict[str, Running]:
    """Episodes at their first view, by name.

    Args:
        specs: what to play. Where the channel has rounds of talk and a spec says nothing about them, it gets them.
        channel: how messages travel.

    Raises:
        ConfigError: two are the same, or the channel does not fit a task.
    """
    live = {spec.name: _start(spec, channel) for spec in specs}
    if len(live) != len(specs):
        raise ConfigError(f"{len(specs)} episodes were asked for, {len(live)} of them different")
    return live


def channel_of(specs: Sequence[EpisodeSpec], channel: ChannelSettings, seed: int) -> Channel:
    """The channel of a rollout, with episodes' own settings where they have them."""
    others = {spec.name: spec.channel for spec in specs if spec.channel is not None}
    return Channel(channel, derive_seed(seed, "rollout"), others)


def play_out(
    live: dict[str, Running],
    policies: Policies,
    talk: Channel,
    seed: int,
    step: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Episode]:
    """Play running episodes to their ends.

    Args:
        live: by name; emptied.
        policies: one policy for everyone, or one by agent name.
        talk: holds the inboxes.
        seed: of the agents' choices.
        step: the environment step that they are all at.
        on_step: called after each step with (step, number of episodes still running).

    Returns:
        The episodes by name.
    """
    groups = {name: state.spec.instance for name, state in live.items()}
    finished: dict[str, Episode] = {}
    while live:
        turns = joint_turns(live, talk, policies, seed)
        ended = carry_out(live, turns, talk, policies, groups, step)
        for name, episode in ended.items():
            finished[name] = episode
            del live[name]
            release(name, talk, policies)
        step += 1
        if on_step is not None:
            on_step(step, len(live))
    return finished


def joint_turns(
    live: Mapping[str, Running], talk: Channel, policies: Policies, seed: int
) -> dict[str, dict[str, Turn]]:
    """One turn of every agent of every running episode, by episode and agent, from one call per policy."""
    return _decide(turn_requests(live, talk, seed), policies)


def turn_requests(live: Mapping[str, Running], talk: Channel, seed: int) -> list[TurnRequest]:
    """What every agent of every running episode is asked now, in the order of the episodes and of their agents.

    Args:
        live: by name, from which the choices' seeds follow.
        talk: holds the inboxes.
        seed: of the agents' choices.

    Raises:
        EnvError: an agent has no observation.
    """
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


def carry_out(
    live: Mapping[str, Running],
    turns: Mapping[str, Mapping[str, Turn]],
    talk: Channel,
    policies: Policies,
    groups: Mapping[str, str],
    step: int,
) -> dict[str, Episode]:
    """Step every world and deliver what was said.

    Args:
        live: by name.
        turns: by episode and agent.
        talk: receives the messages of those that go on.
        policies: whose versions are put on record.
        groups: each episode's task instance.
        step: the environment step that they are all at.

    Returns:
        The episodes that ended.
    """
    ended: dict[str, Episode] = {}
    sent: dict[str, list[Message]] = {}
    last: dict[str, list[Message]] = {}
    for name, state in live.items():
        episode = _advance(state, turns[name], policies)
        said = [turn.message for turn in turns[name].values() if turn.message is not None]
        if episode is not None:
            ended[name] = episode
            last[name] = said
        else:
            sent[name] = said
    scenes = {name: _scene(state, policies) for name, state in live.items()} if talk.looks else None
    talk.transmit(sent, groups, step, scenes)
    talk.too_late(last, step, scenes)
    return {name: replace(e, deliveries=delivered(e.trajectories, talk, name)) for name, e in ended.items()}


def delivered(trajectories: Mapping[str, Trajectory], talk: Channel, name: str) -> tuple[Delivery, ...]:
    """What has become of the messages of these turns, which may be the last ones of an episode only."""
    first = min((each.turns[0].step for each in trajectories.values() if each.turns), default=0)
    return tuple(each for each in talk.deliveries(name) if each.sent_at >= first)


def release(name: str, talk: Channel, policies: Policies) -> None:
    """Let go of what is held for an episode."""
    talk.close(name)
    for policy in _distinct(policies):
        policy.finish(name)


def fork(name: str, other: str, talk: Channel, policies: Policies) -> None:
    """Give another episode the inboxes and the memory of a running one.

    Raises:
        ConfigError: a policy that cannot.
    """
    talk.fork(name, other)
    for policy in _distinct(policies):
        copy = getattr(policy, "fork", None)
        if copy is None:
            raise ConfigError(
                f"{type(policy).__name__} cannot go on twice from one moment; give it a `fork(episode, name)` method"
            )
        copy(name, other)


def record(state: Running, policies: Policies, stop: StopReason, success: bool | None) -> Episode:
    """What was played, closed; without what became of its messages, which the channel knows.

    Args:
        state: an episode at its end.
        policies: whose versions are put on record.
        stop: why it is over.
        success: was the task solved?
    """
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
                state.observations[agent],
            )
            for agent in state.env.agents
        },
        success=success,
        states=tuple(state.states),
    )


def _version(policies: Policies, agent: str, player: str | None) -> int:
    """Updates behind whoever plays an agent."""
    policy = _policy_of(policies, agent)
    if player is None:
        return policy.version
    if player.startswith(SCRIPT):
        return ScriptedPolicy.version
    version_of = getattr(policy, "version_of", None)
    return policy.version if version_of is None else int(version_of(player))


def _start(spec: EpisodeSpec, channel: ChannelSettings) -> Running:
    rounds = rounds_of(spec.params)
    if channel.rounds > 1 and channel.rounds != rounds:
        if rounds > 1:
            raise ConfigError(f"channel.rounds = {channel.rounds}, and episodes that have {rounds} rounds per step")
        spec = replace(spec, params=with_rounds(spec.params, channel.rounds))
    env = make_env(spec.task, spec.params, spec.seed, spec.split)
    check_topology(channel.topology, env, spec.task)
    for agent in spec.cast:
        if agent not in env.agents:
            raise UnknownNameError("agent", agent, env.agents)
    observations = env.reset()
    state = Running(spec, env, observations)
    state.states.append(env.state())
    return state


def _scene(state: Running, policies: Policies) -> Scene:
    """What the channel may know of a running episode."""
    slots: dict[str, tuple[Slot, ...]] = {}
    for agent in state.env.agents:
        player = state.spec.cast.get(agent)
        by_script = player is not None and player.startswith(SCRIPT)
        # A policy whose messages may have another form than the task's own says which.
        asked = None if by_script else getattr(_policy_of(policies, agent), "message_slots", None)
        own = None if asked is None else asked([other for other in state.env.agents if other != agent])
        slots[agent] = state.env.language.message if own is None else own
    return Scene(slots, positions_of(state.env))


def _decide(requests: Sequence[TurnRequest], policies: Policies) -> dict[str, dict[str, Turn]]:
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


def _policy_of(policies: Policies, agent: str) -> Policy:
    if isinstance(policies, Mapping):
        if agent not in policies:
            raise UnknownNameError("agent", agent, policies)
        return policies[agent]
    return policies


def _distinct(policies: Policies) -> list[Policy]:
    if not isinstance(policies, Mapping):
        return [policies]
    return list({id(policy): policy for policy in policies.values()}.values())


def _advance(state: Running, turns: Mapping[str, Turn], policies: Policies) -> Episode | None:
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
    return record(state, policies, stop, result.success)
