"""What messages cost in a rollout, and which tokens pay for it.

Parts: `message_costs` reads the costs off finished episodes, `charge` brings them onto training rows, `Messages` says
how much was said, and `MessageLedger` does all of it from iteration to iteration.

A word's cost is known when it is chosen and owed to nothing but that choice and those after it in the same message. So
it does not go into the return, where it would reach every token of a game, would be divided by whatever the returns
happen to vary by, and in a group in which nothing else varies would alone decide. Each token of the sender's `say` span
gets the costs of its own word and of the rest of the message, less their mean over the games of the task instance at
the same agent, turn and word:

    A(word p) = A_task − (C_p − mean C_p),    C_p = Σ_{q ≥ p} (price · bits_q + redundancy · 1{repeats_q})

The mean does not depend on the word, so the gradient is that of the expected cost; a message that is stopped gains what
the words left out would have cost. Tokens of other spans, and the number that the loss is divided by, stay the same to
the bit, and where all messages of a group cost the same, nothing is added at all.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.distributed
from numpy.typing import NDArray

from preconcert.core import Episode, Message, SpanKind, TrainingError
from preconcert.training.credit import TurnKey
from preconcert.training.credit.estimator import compared
from preconcert.training.message_meter import Meter, Written
from preconcert.training.message_price import MessagePriceSettings, Per, PriceControl
from preconcert.training.rows import Row

Lengths = Mapping[TurnKey, tuple[float, ...]]
"""Bits of each written word by turn, the end included where it was a choice."""


@dataclass(frozen=True, slots=True)
class Messages:
    """How much was said. Numbers of several processes can be added up."""

    episodes: int = 0
    messages: int = 0
    words: int = 0
    silent: int = 0
    """Messages without a word."""
    repeated: int = 0
    """Words that repeat the one in the same place of the message before."""
    bits: float = 0.0

    def __add__(self, other: Messages) -> Messages:
        return Messages(
            self.episodes + other.episodes,
            self.messages + other.messages,
            self.words + other.words,
            self.silent + other.silent,
            self.repeated + other.repeated,
            self.bits + other.bits,
        )

    def metrics(self) -> dict[str, float]:
        """Figures for the log; those without a case are left out."""
        if not self.messages:
            return {}
        found = {
            "message/bits_per_message": self.bits / self.messages,
            "message/bits_per_episode": self.bits / self.episodes,
            "message/words": self.words / self.messages,
            "message/silent": self.silent / self.messages,
        }
        return {**found, "message/repeated": self.repeated / self.words} if self.words else found


def repeats(each: Written) -> tuple[bool, ...]:
    """Per word: does it repeat the one in the same place of the sender's message before?"""
    old = each.before.payload.split() if each.before is not None else []
    return tuple(place < len(old) and old[place] == word for place, word in enumerate(each.message.payload.split()))


def written(
    episodes: Sequence[Episode], trainable: Collection[str], before: Sequence[Message | None] | None = None
) -> dict[TurnKey, Written]:
    """Every message that a learner wrote word by word.

    Args:
        episodes: finished ones.
        trainable: adapters that learn.
        before: what the learner of each episode had said when it began, for episodes that have one learner and begin in
            the midst of another; None where they begin at the beginning.
    """
    found: dict[TurnKey, Written] = {}
    for position, episode in enumerate(episodes):
        for agent, trajectory in episode.trajectories.items():
            last = None if before is None else before[position]
            for index, turn in enumerate(trajectory.turns):
                message = turn.message
                wrote = turn.adapter in trainable and any(span.kind is SpanKind.SAY for span in turn.spans)
                if message is not None and wrote:
                    found[TurnKey(position, agent, index)] = Written(message, last)
                last = message
    return found


def counted(episodes: Sequence[Episode], found: Mapping[TurnKey, Written], lengths: Lengths) -> Messages:
    """How much was said.

    Args:
        episodes: a rollout.
        found: from `written`.
        lengths: of the same messages.
    """
    everything = Messages(episodes=len(episodes))
    for key, each in found.items():
        words, repeated = len(each.message.payload.split()), sum(repeats(each))
        everything += Messages(0, 1, words, int(not words), repeated, sum(lengths[key]))
    return everything


def message_costs(
    episodes: Sequence[Episode],
    found: Mapping[TurnKey, Written],
    lengths: Lengths,
    price: float,
    redundancy: float,
) -> dict[TurnKey, NDArray[np.float64]]:
    """What every completion token is charged, centred: 0 outside of `say` spans.

    Args:
        episodes: a rollout of whole groups.
        found: from `written`.
        lengths: of the same messages.
        price: of one bit.
        redundancy: price of a repeated word.

    Raises:
        TrainingError: a message has another number of lengths than of words and ends.
    """
    places: list[tuple[TurnKey, int, int]] = []
    keys: list[Hashable] = []
    values: list[float] = []
    for key, each in found.items():
        turn = episodes[key.episode].trajectories[key.agent].turns[key.index]
        spans = [span for span in turn.spans if span.kind is SpanKind.SAY]
        bits = np.array(lengths[key], dtype=np.float64)
        if len(bits) != len(spans):
            raise TrainingError(
                f"turn {key.index} of {key.agent!r}: {len(bits)} lengths for {len(spans)} words and ends of a message"
            )
        again = np.zeros(len(spans))
        repeated = repeats(each)
        again[: len(repeated)] = repeated
        costs = price * bits + redundancy * again
        to_go = np.cumsum(costs[::-1])[::-1]
        for place, (span, cost) in enumerate(zip(spans, to_go.tolist(), strict=True)):
            places.append((key, span.start, span.end))
            keys.append((episodes[key.episode].group, key.agent, key.index, place))
            values.append(cost)
    charged: dict[TurnKey, NDArray[np.float64]] = {}
    for (key, start, end), cost in zip(places, compared(keys, values, False).tolist(), strict=True):
        if key not in charged:
            turn = episodes[key.episode].trajectories[key.agent].turns[key.index]
            charged[key] = np.zeros(len(turn.completion_ids), dtype=np.float64)
        charged[key][start:end] = cost
    return charged


def charge(
    rows: Sequence[Row],
    episodes: Sequence[Episode],
    costs: Mapping[TurnKey, NDArray[np.float64]],
    own: Sequence[NDArray[np.bool_]] | None = None,
) -> list[Row]:
    """Rows whose advantages are less by what their tokens are charged, where these carry the task's loss.

    Args:
        rows: of the episodes, in their order.
        episodes: the rollout.
        costs: from `message_costs`.
        own: by row, which tokens carry the task's loss, where others do whose advantage is a pay for predictions; None
            for all that carry a loss.
    """
    starts = np.cumsum([0, *(episode.steps for episode in episodes)])
    charged: list[Row] = []
    for row, mine in zip(rows, [row.policy for row in rows] if own is None else own, strict=True):
        advantages = row.advantages.copy()
        for joint in np.unique(row.joint[row.joint >= 0]).tolist():
            position = int(np.searchsorted(starts, joint, side="right")) - 1
            cost = costs.get(TurnKey(position, row.agent, joint - int(starts[position])))
            if cost is not None and cost.any():
                places = np.flatnonzero(row.joint == joint)
                advantages[places] -= np.where(mine[places], cost, 0.0).astype(np.float32)
        charged.append(replace(row, advantages=advantages))
    return charged


class MessageLedger:
    """Charges for messages from iteration to iteration.

    Args:
        settings: of the recipe.
        meter: counts bits.
        iterations: length of the run.
        trainable: adapters that learn.
        world: number of processes.
    """

    def __init__(
        self,
        settings: MessagePriceSettings,
        meter: Meter,
        iterations: int,
        trainable: Collection[str],
        world: int = 1,
    ) -> None:
        self.settings = settings
        self.meter = meter
        self.control = PriceControl(settings, iterations)
        self.trainable = trainable
        self.world = world

    def state_dict(self) -> dict[str, Any]:
        """What the next iteration needs, as JSON takes it."""
        return {"control": self.control.state_dict(), "meter": self.meter.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.control.load_state_dict(state["control"])
        self.meter.load_state_dict(state["meter"])

    def charged(
        self,
        rows: Sequence[Row],
        episodes: Sequence[Episode],
        own: Sequence[NDArray[np.bool_]] | None = None,
        before: Sequence[Message | None] | None = None,
    ) -> list[Row]:
        """Rows with what their messages cost at the present price; `own` as for `charge`, `before` as for `written`."""
        found = written(episodes, self.trainable, before)
        price, redundancy = self.control.price, self.settings.redundancy
        if not (price or redundancy):
            return list(rows)
        return charge(rows, episodes, message_costs(episodes, found, self._lengths(found), price, redundancy), own)

    def observe(self, iteration: int, episodes: Sequence[Episode]) -> dict[str, float]:
        """Count what was said and set the next iteration's price.

        Returns:
            Figures for the log; the price is the one of this iteration.
        """
        found = written(episodes, self.trainable)
        everything = counted(episodes, found, self._lengths(found))
        heard = list(found.values())
        if self.world > 1:
            parts: list[Any] = [None] * self.world
            torch.distributed.all_gather_object(parts, (everything, heard))
            everything = sum((part[0] for part in parts), Messages())
            heard = [each for part in parts for each in part[1]]
        metrics = {"message/price": self.control.price, **everything.metrics()}
        saturated = float(self.control.saturated)
        if everything.messages:
            per = 1.0 if self.settings.per is Per.MESSAGE else everything.messages / everything.episodes
            self.control.observe(iteration, everything.bits / everything.messages * per, per)
        goal = self.control.goal(iteration)
        self.meter.learn(heard)
        return metrics if goal is None else {**metrics, "message/goal": goal, "message/saturated": saturated}

    def _lengths(self, found: Mapping[TurnKey, Written]) -> Lengths:
        return dict(zip(found, self.meter.lengths(list(found.values())), strict=True))
