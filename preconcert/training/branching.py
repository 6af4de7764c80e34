"""Branching rollouts: several candidate turns from every moment of a game, for credit per agent and turn (AT-GRPO).

A line is a game under way. At each of its steps every agent samples K turns; each joint candidate is carried out in a
copy of the world, a fresh instance with the same seed put to the line's snapshot, with copies of the inboxes and of
what the agents remember. Each branch is scored for every agent, by its step's own reward or by one sampled continuation
to the end; when all branches of all lines have their scores, each line goes on with one of its branches, and nothing is
played twice. All live branches of all lines share one policy call per step.

The world's own randomness is part of the snapshot: branches differ by what the agents do. With continuations, a game of
H steps costs K · H (H + 1) / 2 environment steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from preconcert.agents import Channel, ChannelSettings
from preconcert.core import Episode, StopReason
from preconcert.envs import make_env
from preconcert.training.credit import Follow, RewardSettings, Score, ledger_of
from preconcert.training.rollout import (
    EpisodeSpec,
    Policies,
    Running,
    begin,
    carry_out,
    channel_of,
    delivered,
    fork,
    joint_turns,
    play_out,
    record,
    release,
)


@dataclass(frozen=True, slots=True)
class Branched:
    """What a branching rollout played."""

    branches: tuple[Episode, ...]
    """By line, step and candidate: the candidate turn and its continuation. Branches of one moment share a group named
    for the line's own group, the line and the step; `sample` is the candidate's number."""
    lines: tuple[Episode, ...]
    """The games that were followed, one per spec."""

    @property
    def environment_steps(self) -> int:
        """Steps taken in any world; lines take none of their own."""
        return sum(branch.steps for branch in self.branches)

    @property
    def from_the_start(self) -> tuple[Episode, ...]:
        """The branches of the first moments."""
        return tuple(branch for branch in self.branches if next(iter(branch.trajectories.values())).turns[0].step == 0)


@dataclass(slots=True)
class _Line:
    played: Running
    """All that was followed so far."""
    holder: str
    """The episode under whose name inboxes and memory are held."""


def branch(
    specs: Sequence[EpisodeSpec],
    policies: Policies,
    channel: ChannelSettings,
    seed: int,
    candidates: int,
    score: Score = Score.ROLLOUT,
    follow: Follow = Follow.BEST,
    rewards: RewardSettings | None = None,
) -> Branched:
    """Play every line to its end, branching at each step.

    Args:
        specs: one per line.
        policies: one policy for everyone, or one by agent name; each needs `fork(episode, name)`.
        channel: how messages travel.
        seed: every random choice of the agents and of the channel follows from it and from the specs.
        candidates: branches per moment.
        score: what a branch is judged by.
        follow: which branch a line goes on with.
        rewards: how rewards are put together for the scores; None takes them as they are.

    Raises:
        EnvError: an environment broke its protocol.
        ConfigError: a policy cannot fork.
    """
    lines = {name: _Line(state, name) for name, state in begin(specs, channel).items()}
    talk = channel_of(specs, channel, seed)
    records: dict[str, list[Episode]] = {name: [] for name in lines}
    finished: dict[str, Episode] = {}
    step = 0
    while lines:
        here = {name: [f"{name}/{step}/{k}" for k in range(candidates)] for name in lines}
        live: dict[str, Running] = {}
        for name, line in lines.items():
            for branched in here[name]:
                live[branched] = _copy(line.played, fresh=True)
                fork(line.holder, branched, talk, policies)
        groups = {name: state.spec.instance for name, state in live.items()}
        ended = carry_out(live, joint_turns(live, talk, policies, seed), talk, policies, groups, step)
        ends = dict(ended)
        if score is Score.ROLLOUT:
            ends |= _continued({n: s for n, s in live.items() if n not in ended}, policies, talk, seed, step + 1)
        else:
            cut = {n: record(s, policies, StopReason.CUT, None) for n, s in live.items() if n not in ended}
            ends |= {n: replace(e, deliveries=delivered(e.trajectories, talk, n)) for n, e in cut.items()}
        scores = scored([ends[name] for names in here.values() for name in names], rewards)
        by_name = dict(zip((name for names in here.values() for name in names), scores, strict=True))
        for name, line in list(lines.items()):
            records[name] += [
                _renamed(ends[branched], line.played.spec, step, k) for k, branched in enumerate(here[name])
            ]
            chosen = here[name][select([by_name[branched] for branched in here[name]], follow)]
            _follow(line.played, live[chosen])
            if chosen in ended:
                end = next(iter(ended[chosen].trajectories.values())).stop_reason
                whole = record(line.played, policies, end, ended[chosen].success)
                finished[name] = replace(whole, deliveries=delivered(whole.trajectories, talk, chosen))
            for other in (line.holder, *here[name]):
                if other != chosen or chosen in ended:
                    release(other, talk, policies)
            line.holder = chosen
            if chosen in ended:
                del lines[name]
        step += 1
    return Branched(
        tuple(episode for spec in specs for episode in records[spec.name]),
        tuple(finished[spec.name] for spec in specs),
    )


def scored(branches: Sequence[Episode], rewards: RewardSettings | None = None) -> list[dict[str, float]]:
    """Each branch's return from its first turn on, for every agent."""
    return [
        {agent: strand.total for agent, strand in game.strands.items()} for game in ledger_of(branches, rewards)
    ]


def select(scores: Sequence[Mapping[str, float]], follow: Follow) -> int:
    """Which of the branches of one moment is gone on with.

    Args:
        scores: of every branch, for every agent.
        follow: `best` by the mean over agents, the first of equals; or the `first`.
    """
    if follow is Follow.FIRST:
        return 0
    return int(np.argmax([np.mean(list(mine.values())) for mine in scores]))


def _copy(state: Running, fresh: bool = False) -> Running:
    """The same moment in a world of its own; `fresh` begins a record of its own there too."""
    spec = state.spec
    env = make_env(spec.task, spec.params, spec.seed, spec.split)
    env.reset()
    env.restore(state.env.snapshot())
    copy = Running(spec, env, state.observations)
    copy.states = state.states[-1:] if fresh else list(state.states)
    if not fresh:
        copy.turns.update({agent: list(turns) for agent, turns in state.turns.items()})
    return copy


def _continued(
    branches: Mapping[str, Running], policies: Policies, talk: Channel, seed: int, step: int
) -> dict[str, Episode]:
    """How each branch ends, played in copies: the branches themselves stay where they are."""
    ahead: dict[str, Running] = {}
    for name, state in branches.items():
        ahead[f"{name}/on"] = _copy(state)
        fork(name, f"{name}/on", talk, policies)
    ends = play_out(ahead, policies, talk, seed, step)
    return {name: ends[f"{name}/on"] for name in branches}


def _follow(played: Running, chosen: Running) -> None:
    """Add the chosen branch's first step to what was played."""
    played.env, played.observations = chosen.env, chosen.observations
    played.states.append(chosen.states[1])
    for agent, turns in chosen.turns.items():
        played.turns[agent].append(turns[0])


def _renamed(episode: Episode, spec: EpisodeSpec, step: int, candidate: int) -> Episode:
    return replace(episode, group=f"{spec.group}/{spec.sample}/{step}", sample=candidate)
