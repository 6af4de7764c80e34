"""Rounds of talk before each step: the agents exchange words while the world stands still.

Parts: `TalkRounds` (an environment around another one), `LISTEN` (the only action of a round of talk), and the
parameter `TALK_ROUNDS` through which `make_env` puts one around any task that has messages, so that an episode's own
record says how to play it again.

A step of the world becomes `rounds` steps here: rounds of talk, in which everybody may only listen, nothing moves and
nothing is paid, and last the round in which everybody acts. What is said in one round is read in the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from preconcert.core import (
    MOST_ROUNDS,
    ConfigError,
    Decision,
    Env,
    EnvError,
    Message,
    Observation,
    Player,
    StepResult,
    TaskLanguage,
    Truth,
    View,
    ViewField,
    nearest,
)

LISTEN = "listen"
"""The one legal action of a round of talk."""
TALK = "talk"
"""Goes before the number of rounds of talk that are left in every observation, and names that field."""
TALK_ROUNDS = "talk_rounds"
"""The parameter of every task that asks for rounds; a recipe's `channel.rounds` sets it."""


def rounds_of(params: Mapping[str, Any]) -> int:
    """How many rounds each step of the world has, by a task's parameters.

    Raises:
        ConfigError: it is no whole number from 1 to `MOST_ROUNDS`.
    """
    rounds = params.get(TALK_ROUNDS, 1)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= MOST_ROUNDS:
        raise ConfigError(f"parameter {TALK_ROUNDS!r} = {rounds!r}: expected a whole number from 1 to {MOST_ROUNDS}")
    return rounds


def without_rounds(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that the task itself knows."""
    return {key: value for key, value in params.items() if key != TALK_ROUNDS}


def with_rounds(params: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """The same parameters with another number of rounds."""
    return {**without_rounds(params), **({TALK_ROUNDS: rounds} if rounds > 1 else {})}


def talking(observation: Observation) -> bool:
    """Is this a view of a round of talk?"""
    return observation.legal_actions == (LISTEN,)


@dataclass(frozen=True, slots=True)
class _Snapshot:
    step: int
    left: int
    done: bool
    views: Mapping[str, Observation]
    inner: Any


class TalkRounds:
    """An environment whose every step is preceded by rounds of talk.

    Whatever else the inner environment offers (`board`, `positions`, `role`, ...) is there as well; its players say
    what they would say, and listen where that is all one can do.

    Args:
        inner: a fresh instance.
        rounds: steps here per step there, at least 2.

    Raises:
        ConfigError: the task has no messages, or has words of its own for what is added here.
    """

    def __init__(self, inner: Env, rounds: int) -> None:
        if rounds < 2:
            raise ConfigError(f"{rounds} round per step is the task as it is; rounds of talk need 2 or more")
        self.inner = inner
        self.rounds = rounds
        self.agents = inner.agents
        self.horizon = inner.horizon * rounds
        self.language = _language(inner.language, rounds, type(inner).__name__)
        self._step, self._left, self._done = 0, rounds - 1, False
        self._views: Mapping[str, Observation] = {}

    def reset(self) -> Mapping[str, Observation]:
        """The first view of every agent: a round of talk."""
        self._views = self.inner.reset()
        return self._shown()

    def step(self, actions: Mapping[str, str]) -> StepResult:
        """Let everybody listen, or carry out the inner step when the rounds of talk are over."""
        name = type(self.inner).__name__
        if not self._views or self._done:
            raise EnvError(f"{name}: step {f'after the end at step {self._step}' if self._done else 'before reset'}")
        if self._left:
            self._check(actions, name)
            self._step, self._left = self._step + 1, self._left - 1
            return StepResult(self._shown(), dict.fromkeys(self.agents, 0.0), False)
        result = self.inner.step(actions)
        self._views, self._done = result.observations, result.done
        self._step, self._left = self._step + 1, self.rounds - 1
        return replace(result, observations=self._shown())

    def state(self) -> str:
        """The inner state, after the number of rounds of talk that are left."""
        return f"{TALK} {self._left} {self.inner.state()}"

    def snapshot(self) -> Any:
        """A picklable value from which `restore` continues exactly."""
        return _Snapshot(self._step, self._left, self._done, dict(self._views), self.inner.snapshot())

    def restore(self, snapshot: Any) -> None:
        """Go back to a snapshot of an instance with the same seed and parameters."""
        if not isinstance(snapshot, _Snapshot):
            raise EnvError(f"rounds of talk: cannot restore from a {type(snapshot).__name__}")
        self.inner.restore(snapshot.inner)
        self._step, self._left, self._done = snapshot.step, snapshot.left, snapshot.done
        self._views = dict(snapshot.views)

    def legal_actions(self, agent: str) -> tuple[str, ...]:
        """`listen` in a round of talk, what the task allows otherwise."""
        legal = self.inner.legal_actions(agent)  # refuses unknown agents
        return (LISTEN,) if self._left else legal

    def inner_view(self, agent: str) -> Observation:
        """What the inner environment showed an agent last."""
        return self._views[agent]

    def __getattr__(self, name: str) -> Any:
        """Optional members are there where the inner environment has them."""
        if name.startswith("_") or name == "inner":
            raise AttributeError(name)
        found = getattr(self.inner, name)
        return _ADAPTED[name](found, self.rounds) if name in _ADAPTED else found

    def _shown(self) -> dict[str, Observation]:
        return {
            agent: replace(
                view,
                text=f"{TALK} {self._left} {view.text}",
                legal_actions=(LISTEN,) if self._left else view.legal_actions,
                step=self._step,
                fields={**view.fields, TALK: str(self._left)},
            )
            for agent, view in self._views.items()
        }

    def _check(self, actions: Mapping[str, str], name: str) -> None:
        for agent, action in actions.items():
            if agent not in self.agents:
                raise EnvError(f"{name}: action for unknown agent {agent!r}; {nearest(agent, self.agents)}")
            if action != LISTEN:
                raise EnvError(f"{name}: illegal action {action!r} of {agent!r} in a round of talk; known: {LISTEN}")
        for agent in self.agents:
            if agent not in actions:
                raise EnvError(f"{name}: no action for {agent!r} at step {self._step}")


class _TalkingPlayer:
    """One of the task's own players in rounds of talk."""

    def __init__(self, inner: Player) -> None:
        self.inner = inner

    def decide(
        self, env: Env, observation: Observation, inbox: Sequence[Message], rng: np.random.Generator
    ) -> Decision:
        """What it would say and do without rounds. In a round of talk, what it would do comes next: so it announces
        that."""
        assert isinstance(env, TalkRounds)  # whoever asked it for a player plays in it
        decision = self.inner.decide(env.inner, env.inner_view(observation.agent), inbox, rng)
        if not talking(observation):
            return decision
        said = (decision.message or "").split()
        slots = env.language.message
        if len(said) == len(slots):
            announced = [slot.truth is Truth.OWN_NEXT_ACTION for slot in slots]
            said = [decision.action if own else word for own, word in zip(announced, said, strict=True)]
        return Decision(LISTEN, " ".join(said) or None)


def _language(inner: TaskLanguage, rounds: int, name: str) -> TaskLanguage:
    """The task's words and those of the rounds."""
    if not inner.message:
        raise ConfigError(f"{name} has no messages, so there is nothing to say in {rounds} rounds per step")
    views = [view for view in (inner.view, *(view for _, view in inner.views)) if view is not None]
    taken = [LISTEN] if LISTEN in inner.actions else []
    taken += [TALK] if any(slot.name == TALK for slot in inner.forecast) else []
    taken += [TALK] if any(field.name == TALK for view in views for field in view.fields) else []
    if taken:
        raise ConfigError(f"{name} has {taken[0]!r} among its own words, which rounds of talk need")
    left = ViewField(TALK, tuple(map(str, range(rounds))), TALK, number=True, determined=True)
    view = None if inner.view is None else View((left, *inner.view.fields))
    each = tuple((agent, View((left, *view.fields))) for agent, view in inner.views)
    rewards = inner.rewards
    if rewards and inner.reward_word(0.0) is None:
        rewards = ("0", *rewards)
    words = _more_words(inner.words, rounds) if inner.words else ()
    return replace(inner, actions=(*inner.actions, LISTEN), rewards=rewards, view=view, words=words, views=each)


def _inner_role(role: Callable[[Observation], str], rounds: int) -> Callable[[Observation], str]:
    """The task reads its own view, without the rounds."""
    return lambda observation: role(replace(observation, text=observation.text.split(" ", 2)[2]))


def _talking_players(player: Callable[[str], Player], rounds: int) -> Callable[[str], Player]:
    return lambda kind: _TalkingPlayer(player(kind))


def _more_words(words: Sequence[str], rounds: int) -> tuple[str, ...]:
    return tuple(sorted({*words, TALK, *map(str, range(rounds))}))


_ADAPTED: Mapping[str, Callable[[Any, int], Any]] = {
    "player": _talking_players,
    "role": _inner_role,
    "words": _more_words,
}
"""Optional members that are not simply the inner environment's."""
