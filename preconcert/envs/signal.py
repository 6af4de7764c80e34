"""Signal: a speaker describes the target with one word, listeners pick it one step later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from pydantic import Field

from preconcert.core import Decision, Env, Message, Observation, Player, Slot, TaskLanguage, View, ViewField
from preconcert.envs.registry import register
from preconcert.envs.task import Outcome, Task, TaskParams

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "pink", "brown")
SHAPES = ("circle", "square", "star", "cross", "moon", "heart", "ring", "arrow")

Thing = tuple[str, str]
"""(colour, shape)."""
NOTHING: Thing = ("none", "none")
_FIXED = ("role", "speaker", "listener", "last", "right", "wrong", "none", "target", "list")
"""Words of observations besides colours, shapes and picks."""


class SignalParams(TaskParams):
    """Parameters of `signal`."""

    agents: int = Field(2, ge=2, le=8)
    """Team size: one speaker, the others listen."""
    rounds: int = Field(2, ge=1, le=16)
    """Targets per episode; it lasts one step longer."""
    candidates: int = Field(4, ge=2, le=8)
    """Things to choose between in each round."""
    colours: int = Field(4, ge=2, le=len(COLOURS))
    """Colours in use."""
    shapes: int = Field(4, ge=2, le=len(SHAPES))
    """Shapes in use."""


@dataclass(frozen=True, slots=True)
class _Round:
    things: tuple[Thing, ...]
    """In the speaker's order."""
    target: Thing
    orders: tuple[tuple[Thing, ...], ...]
    """The same things in each listener's order."""


@dataclass(frozen=True, slots=True)
class _State:
    last: str = "none"
    """Was everyone right in the step before? `none` where nobody had to pick."""
    wins: int = 0


@register
class Signal(Task[SignalParams, _State]):
    """The speaker sees round t's target at step t; listeners pick among round t's candidates at step t + 1.

    A message is one word, less than the two that describe a thing, and every candidate has a word that no other
    candidate of its round shares; at least half have exactly one, so which of the two is said matters.

    Without messages nothing a listener sees depends on the coming target, which is uniform over the candidates:
    whatever it picks is right with probability 1/candidates. Several listeners may agree on a convention, but all
    being right is no likelier than one of them being right. Rounds are independent, so (1/candidates)^rounds is
    the ceiling, and always picking by one convention reaches it.
    """

    name = "signal"
    Params = SignalParams

    def _setup(self, rng: np.random.Generator) -> _State:
        params = self.params
        self.agents = tuple(f"agent_{index}" for index in range(params.agents))
        self.horizon = params.rounds + 1
        self.colours, self.shapes = COLOURS[: params.colours], SHAPES[: params.shapes]
        self.picks = tuple(f"pick{number}" for number in range(1, params.candidates + 1))
        reward = f"{1 / params.rounds:g}"
        self.language = TaskLanguage(
            actions=(*self.picks, "wait"),
            message=(Slot("word", (*self.colours, *self.shapes, "none"), null="none"),),
            forecast=(Slot("last", ("none", "right", "wrong")),),
            rewards=("0", reward),
            default_action="wait",
            words=(*_FIXED, *self.colours, *self.shapes, *self.picks),
            views=tuple((agent, self._view(agent)) for agent in self.agents),
        )
        numbers = (str(number) for number in range(self.horizon + 1))
        self.words = tuple(sorted({*self.agents, *self.colours, *self.shapes, *self.picks, *numbers, *_FIXED, "round"}))
        pairs = [(colour, shape) for colour in self.colours for shape in self.shapes]
        self.rounds = tuple(self._draw_round(rng, pairs) for _ in range(params.rounds))
        return _State()

    def _view(self, agent: str) -> View:
        speaks = agent == self.agents[0]
        labels = ["target", "list", *[""] * (len(self.picks) - 1)] if speaks else self.picks
        fields = [
            ViewField("role", ("speaker" if speaks else "listener",), "role"),
            ViewField("last", ("none", "right", "wrong"), "last"),
        ]
        for number, label in enumerate(labels):
            name = label or f"list{number}"
            fields.append(ViewField(f"{name}_colour", (*self.colours, "none"), label))
            fields.append(ViewField(f"{name}_shape", (*self.shapes, "none")))
        return View(tuple(fields))

    def _draw_round(self, rng: np.random.Generator, pairs: Sequence[Thing]) -> _Round:
        """The candidate set decides about the split, so no set of a held-out round was seen in training."""
        count = self.params.candidates

        def draw() -> tuple[Thing, ...] | None:
            if count > len(pairs):
                return None
            things = tuple(pairs[index] for index in rng.choice(len(pairs), size=count, replace=False))
            unique = [len(unique_words(thing, things)) for thing in things]
            return things if min(unique) >= 1 and 2 * unique.count(1) >= count else None

        things = self._search(draw, _key)
        orders = tuple(tuple(things[index] for index in rng.permutation(count)) for _ in self.agents[1:])
        return _Round(things, things[int(rng.integers(count))], orders)

    def _observe(self, agent: str) -> Observation:
        things: Sequence[Thing] = (NOTHING,) * len(self.picks)
        if agent == self.agents[0]:
            target = NOTHING
            if self._step < len(self.rounds):
                things, target = self.rounds[self._step].things, self.rounds[self._step].target
            shown = " ".join(" ".join(thing) for thing in things)
            text = f"role speaker last {self._state.last} target {' '.join(target)} list {shown}"
        else:
            if 1 <= self._step < self.horizon:
                things = self.rounds[self._step - 1].orders[self.agents.index(agent) - 1]
            shown = " ".join(f"{pick} {' '.join(thing)}" for pick, thing in zip(self.picks, things, strict=True))
            text = f"role listener last {self._state.last} {shown}"
        return Observation(agent, text, self._legal(agent), self._step, {"last": self._state.last})

    def _legal(self, agent: str) -> tuple[str, ...]:
        picking = agent != self.agents[0] and 1 <= self._step < self.horizon
        return self.picks if picking else ("wait",)

    def _advance(self, actions: Mapping[str, str]) -> Outcome[_State]:
        done = self._step + 1 == self.horizon
        if self._step == 0:
            return Outcome(_State(), dict.fromkeys(self.agents, 0.0))
        this = self.rounds[self._step - 1]
        right = all(
            order[self.picks.index(actions[agent])] == this.target
            for agent, order in zip(self.agents[1:], this.orders, strict=True)
        )
        state = replace(self._state, last="right" if right else "wrong", wins=self._state.wins + right)
        rewards = dict.fromkeys(self.agents, right / len(self.rounds))
        return Outcome(state, rewards, done, state.wins == len(self.rounds) if done else None)

    def state(self) -> str:
        """The round, the last result and every target still to be picked."""
        targets = " ".join(f"target {' '.join(this.target)}" for this in self.rounds[max(self._step - 1, 0) :])
        return f"round {self._step} last {self._state.last} {targets}".rstrip()

    def board(self) -> list[str]:
        """One row per round: its candidates, the target in capitals; an arrow marks what is picked now."""
        rows = []
        for number, this in enumerate(self.rounds):
            names = ["-".join(thing).upper() if thing == this.target else "-".join(thing) for thing in this.things]
            arrow = ">" if number == self._step - 1 else " "
            rows.append(f"{arrow} {' '.join(name.ljust(13) for name in names)}".rstrip())
        return rows

    def layout_key(self) -> str:
        """The candidates of every round; each round's own set is of the instance's split."""
        return " then ".join(_key(this.things) for this in self.rounds)

    @classmethod
    def no_message_ceiling(cls, params: SignalParams) -> float:
        """(1/candidates)^rounds; see the class."""
        return float((1.0 / params.candidates) ** params.rounds)

    @classmethod
    def _player(cls, kind: str) -> Player:
        return SignalScript(slip=0.0, misname=0.0, care=1.0) if kind == "expert" else SignalScript()


def _key(things: Sequence[Thing]) -> str:
    """The set of candidates, whatever their order."""
    return " ".join(" ".join(thing) for thing in sorted(things))


def unique_words(thing: Thing, things: Sequence[Thing]) -> list[str]:
    """The words of a thing that no other one shares."""
    counts = Counter(word for other in things for word in other)
    return [word for word in thing if counts[word] == 1]


class SignalScript:
    """Describes the target with one of its words; picks a candidate that fits the word heard.

    The imperfect teacher looks at the other candidates half of the time and otherwise says either word, as often the
    ambiguous one; the expert always says a unique one.
    """

    SLIP: ClassVar[float] = 0.1
    """Probability of a random pick."""
    MISNAME: ClassVar[float] = 0.25
    """Probability of a random word."""
    CARE: ClassVar[float] = 0.5
    """Probability of choosing among the words that only the target has."""

    def __init__(self, slip: float = SLIP, misname: float = MISNAME, care: float = CARE) -> None:
        """
        Args:
            slip: probability of a random pick.
            misname: probability of a random word.
            care: probability of choosing among the words that only the target has.
        """
        self.slip, self.misname, self.care = slip, misname, care

    def decide(
        self, env: Env, observation: Observation, inbox: Sequence[Message], rng: np.random.Generator
    ) -> Decision:
        """Reads the observation and the inbox only."""
        words = observation.text.split()
        if "speaker" in words:
            return Decision("wait", self._describe(words, env.language.message[0].choices, rng))
        picks = {words[at]: words[at + 1 : at + 3] for at in range(4, len(words), 3)}
        heard = {word for message in inbox for word in message.payload.split()} - {"none"}
        fitting = [pick for pick, thing in picks.items() if heard & set(thing) and pick in observation.legal_actions]
        choices = fitting if fitting and rng.random() >= self.slip else observation.legal_actions
        return Decision(str(rng.choice(choices)), "none")

    def _describe(self, words: Sequence[str], choices: Sequence[str], rng: np.random.Generator) -> str:
        """One word for the target, `none` when there is none."""
        at, start = words.index("target"), words.index("list") + 1
        target = (words[at + 1], words[at + 2])
        if target == NOTHING:
            return "none"
        if rng.random() < self.misname:
            return str(rng.choice([word for word in choices if word != "none"]))
        things = [(words[index], words[index + 1]) for index in range(start, len(words), 2)]
        return str(rng.choice(unique_words(target, things) if rng.random() < self.care else target))
