"""The world itself as a world model: the ceiling that learned models are held against.

A belief is a snapshot of the running episode with everybody's true view and inbox; the other agents are played by the
real policy. Each episode has one private copy of its environment, which is put to a snapshot for every imagined step:
on the built-in tasks that takes 2 to 25 microseconds, a fresh deep copy 70 to 400.

What the world draws by chance is part of a snapshot, so the oracle knows it too. Messages travel as over a channel that
loses nothing: they arrive one step later, and an inbox holds the last one of each sender.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from preconcert.core import (
    ConfigError,
    Env,
    ImaginedStep,
    Judgement,
    Message,
    Move,
    Observation,
    Outcome,
    Rehearsing,
    StepResult,
    TaskLanguage,
    Turn,
    TurnRequest,
    derive_seed,
)


class OracleValue(StrEnum):
    """Where the oracle takes values from."""

    NONE = "none"
    """It has none."""
    ROLLOUT = "rollout"
    """From one game of the policy, played from there to the end by all agents."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Where an episode stands, as the oracle knows it."""

    episode: str
    agent: str
    """Whose imagination it is."""
    env: Env
    """The episode's private copy; it stands wherever it was last put."""
    snapshot: Any
    observations: Mapping[str, Observation]
    """The true views; of agents whose view was never given, none."""
    inboxes: Mapping[str, tuple[Message, ...]]
    memories: Mapping[str, Any]
    """What the policy remembers of each agent."""
    players: Mapping[str, str | None]
    """Who decides, where the episode's cast says so."""
    language: TaskLanguage


@dataclass(frozen=True, slots=True)
class _Asked:
    """A turn that one agent is to take at one of the moments."""

    place: int
    request: TurnRequest
    memory: Any


class OracleWorldModel:
    """Steps copies of the running environments.

    Args:
        policy: plays the other agents, and everybody in rollouts for values.
        value: where values come from.
        floor: the probability that `judge` gives to what does not happen.
        draws: turns per agent by which `judge` estimates what the others do.
    """

    def __init__(
        self, policy: Rehearsing, value: OracleValue = OracleValue.NONE, floor: float = 1e-6, draws: int = 16
    ) -> None:
        self.policy = policy
        self.value = OracleValue(value)
        self.floor = floor
        self.draws = draws
        self._copies: dict[str, tuple[Env, Env]] = {}

    def begin(self, requests: Sequence[TurnRequest], pasts: Sequence[Sequence[Turn]]) -> list[Moment]:
        """The present moments; the requests of the same episode tell the other agents' views and inboxes."""
        by_episode: dict[str, dict[str, TurnRequest]] = {}
        for request in requests:
            by_episode.setdefault(request.episode, {})[request.agent] = request
        shared = {episode: self._present(given) for episode, given in by_episode.items()}
        return [replace(shared[request.episode], agent=request.agent) for request in requests]

    def advance(self, beliefs: Sequence[Moment], moves: Sequence[Move], seeds: Sequence[int]) -> list[ImaginedStep]:
        """One real step of a copied world each, all other agents decided by one call of the policy.

        Raises:
            ConfigError: another agent's action is neither given nor can be decided, since its view is not known.
            EnvError: an action is not legal.
        """
        turns = self._turns(beliefs, seeds, everybody=False)
        results: list[StepResult] = []
        after: list[Moment] = []
        for belief, move, theirs in zip(beliefs, moves, turns, strict=True):
            actions = self._joint(belief, move, {agent: turn.action for agent, (turn, _) in theirs.items()})
            said = {agent: turn.message for agent, (turn, _) in theirs.items() if turn.message is not None}
            if move.message is not None:
                said[belief.agent] = _message(belief, move.message)
            memories = {agent: memory for agent, (_, memory) in theirs.items()}
            result, moment = _stepped(belief, actions, said, memories)
            results.append(result)
            after.append(moment)
        values = self._values(after, results, seeds)
        return [
            ImaginedStep(
                observation=result.observations[moment.agent],
                inbox=moment.inboxes.get(moment.agent, ()),
                others=self._others(before, move, theirs),
                reward=float(result.rewards[moment.agent]),
                done=result.done,
                value=value,
                belief=moment,
            )
            for before, move, theirs, moment, result, value in zip(
                beliefs, moves, turns, after, results, values, strict=True
            )
        ]

    def judge(
        self, beliefs: Sequence[Moment], moves: Sequence[Move], outcomes: Sequence[Outcome]
    ) -> list[Judgement | None]:
        """1 for what happens and `floor` for everything else; the others' actions by their shares of `draws` turns."""
        drawn: list[dict[str, Counter[str]]] = [{} for _ in beliefs]
        for number in range(self.draws):
            seeds = [derive_seed("judge", belief.episode, _step_of(belief), number) for belief in beliefs]
            for counts, theirs in zip(drawn, self._turns(beliefs, seeds, everybody=False), strict=True):
                for agent, (turn, _) in theirs.items():
                    counts.setdefault(agent, Counter())[turn.action] += 1
        found: list[Judgement | None] = []
        for belief, move, outcome, counts in zip(beliefs, moves, outcomes, drawn, strict=True):
            actions = self._joint(belief, replace(move, others=outcome.others), {})
            result, _ = _stepped(belief, actions, {}, {})
            seen = result.observations[belief.agent].text == outcome.observation.text
            found.append(
                Judgement(
                    view_nll=0.0 if seen else -math.log(self.floor),
                    reward_probability=1.0 if float(result.rewards[belief.agent]) == outcome.reward else self.floor,
                    done_probability=1.0 if result.done else self.floor,
                    others={agent: self._shares(belief, agent, count) for agent, count in counts.items()},
                )
            )
        return found

    def finish(self, episode: str) -> None:
        """Let go of the episode's copy."""
        self._copies.pop(episode, None)

    def _present(self, given: Mapping[str, TurnRequest]) -> Moment:
        first = next(iter(given.values()))
        held = self._copies.get(first.episode)
        if held is None or held[0] is not first.env:
            held = self._copies[first.episode] = (first.env, copy.deepcopy(first.env))
        return Moment(
            episode=first.episode,
            agent=first.agent,
            env=held[1],
            snapshot=first.env.snapshot(),
            observations={agent: request.observation for agent, request in given.items()},
            inboxes={agent: request.inbox for agent, request in given.items()},
            memories={agent: self.policy.recall(first.episode, agent) for agent in held[1].agents},
            players={agent: request.player for agent, request in given.items()},
            language=first.language,
        )

    def _turns(
        self, beliefs: Sequence[Moment], seeds: Sequence[int], everybody: bool
    ) -> list[dict[str, tuple[Turn, Any]]]:
        """What the policy does for all agents whose view is known, the imagining one's own only if asked."""
        asked = [
            _Asked(place, _request(belief, agent, derive_seed(seed, agent)), belief.memories[agent])
            for place, (belief, seed) in enumerate(zip(beliefs, seeds, strict=True))
            for agent in belief.env.agents
            if agent in belief.observations and (everybody or agent != belief.agent)
        ]
        found: list[dict[str, tuple[Turn, Any]]] = [{} for _ in beliefs]
        for some in self._calls(asked):
            if self.policy.version < 0:
                some[0].request.env.restore(beliefs[some[0].place].snapshot)
            answers = self.policy.rehearse([each.request for each in some], [each.memory for each in some])
            for each, answer in zip(some, answers, strict=True):
                found[each.place][each.request.agent] = answer
        return found

    def _calls(self, asked: Sequence[_Asked]) -> list[Sequence[_Asked]]:
        """One call for all; a program may look into the world, which must then stand where it decides."""
        if self.policy.version < 0:
            return [[each] for each in asked]
        return [asked] if asked else []

    def _joint(self, belief: Moment, move: Move, decided: Mapping[str, str]) -> dict[str, str]:
        actions = {belief.agent: move.action, **decided, **(move.others or {})}
        for agent in belief.env.agents:
            if agent not in actions:
                raise ConfigError(
                    f"{belief.episode}: the oracle does not know what {agent!r} sees; ask for all agents of an episode "
                    "in one call, or give the others' actions"
                )
        return {agent: actions[agent] for agent in belief.env.agents}

    def _others(self, belief: Moment, move: Move, theirs: Mapping[str, tuple[Turn, Any]]) -> dict[str, str]:
        joint = self._joint(belief, move, {agent: turn.action for agent, (turn, _) in theirs.items()})
        return {agent: action for agent, action in joint.items() if agent != belief.agent}

    def _values(
        self, moments: Sequence[Moment], results: Sequence[StepResult], seeds: Sequence[int]
    ) -> list[float | None]:
        if self.value is OracleValue.NONE:
            return [0.0 if result.done else None for result in results]
        returns = [0.0] * len(moments)
        live = {place: moment for place, moment in enumerate(moments) if not results[place].done}
        step = 0
        while live:
            step += 1
            places = list(live)
            drawn = [derive_seed(seeds[place], "value", step) for place in places]
            turns = self._turns([live[place] for place in places], drawn, everybody=True)
            for place, acted in zip(places, turns, strict=True):
                moment = live.pop(place)
                said = {agent: turn.message for agent, (turn, _) in acted.items() if turn.message is not None}
                memories = {agent: memory for agent, (_, memory) in acted.items()}
                actions = {agent: acted[agent][0].action for agent in moment.env.agents}
                result, after = _stepped(moment, actions, said, memories)
                returns[place] += float(result.rewards[moment.agent])
                if not result.done:
                    live[place] = after
        return list(returns)

    def _shares(self, belief: Moment, agent: str, counts: Counter[str]) -> dict[str, float]:
        actions = belief.observations[agent].legal_actions
        total, left = sum(counts.values()), 1.0 - self.floor * len(actions)
        return {action: self.floor + left * counts[action] / total for action in actions}


def _stepped(
    belief: Moment, actions: Mapping[str, str], said: Mapping[str, Message], memories: Mapping[str, Any]
) -> tuple[StepResult, Moment]:
    env = belief.env
    env.restore(belief.snapshot)
    result = env.step(actions)
    inboxes = {
        agent: _delivered(belief.inboxes.get(agent, ()), [m for m in said.values() if agent in m.recipients])
        for agent in env.agents
    }
    after = replace(
        belief,
        snapshot=env.snapshot(),
        observations=dict(result.observations),
        inboxes=inboxes,
        memories={**belief.memories, **memories},
    )
    return result, after


def _delivered(held: Sequence[Message], new: Sequence[Message]) -> tuple[Message, ...]:
    mails = {message.sender: message for message in (*held, *new)}
    return tuple(sorted(mails.values(), key=lambda mail: (mail.sent_at, mail.sender)))


def _message(belief: Moment, words: str) -> Message:
    others = tuple(agent for agent in belief.env.agents if agent != belief.agent)
    return Message(belief.agent, others, words, 0.0, len(words.split()), _step_of(belief))


def _step_of(belief: Moment) -> int:
    return belief.observations[belief.agent].step


def _request(belief: Moment, agent: str, seed: int) -> TurnRequest:
    return TurnRequest(
        episode=belief.episode,
        agent=agent,
        observation=belief.observations[agent],
        inbox=belief.inboxes.get(agent, ()),
        others=tuple(other for other in belief.env.agents if other != agent),
        language=belief.language,
        seed=seed,
        env=belief.env,
        player=belief.players.get(agent),
    )
