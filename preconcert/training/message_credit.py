"""Messages that are reinforced with what they were worth to who heard them, as a world model sees it.

    A(word) = A_task + weight · (v − mean v) / s

v is the message's value (`message_value.py`): the receiver's imagined return with it minus that without it, the mean
over receivers, and 0 where nobody heard anything new. The mean is over the games of the task instance at the same agent
and turn, so that it does not depend on the word; s is the root mean square of the differences over the iteration. The
return of a game tells a sender little about one message; this is a credit of its own, on the tokens of `say` alone.

A value that the world does not bear out would teach to say what only the model believes in. So before anything is
trained, values are held against the real ablation on games of the warm start, and the run stops where they fail.

Parts: `MessageCreditSettings` (a recipe's `grpo.message_credit`), `MessageCredit` (checks and pays) and `passed`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from preconcert.agents import ChannelSettings, GenerativeTeam
from preconcert.core import Episode, SpanKind, WorldModel, derive_seed
from preconcert.training.credit import TurnKey
from preconcert.training.credit.estimator import compared
from preconcert.training.imagination import ImaginedIn
from preconcert.training.json_file import write_json
from preconcert.training.message_costs import charge, written
from preconcert.training.message_value import THRESHOLD, AblationCheck, Heard, check_values, heard, imagined_values
from preconcert.training.rollout import EpisodeSpec, rollout
from preconcert.training.rows import Row

CHECK = "message_check.json"
"""What the check found, in the run's folder."""
_EPSILON = 1e-8


class MessageCreditSettings(BaseModel):
    """How messages are valued, and what that counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(0.5, gt=0, allow_inf_nan=False)
    """Of the values, in units of advantages."""
    model: ImaginedIn = ImaginedIn.WORLD
    """What values are imagined in: `world`, the run's world model, or `oracle`, the environment itself."""
    instances: int | None = Field(None, ge=1)
    """Task instances per rollout (and process) whose messages are valued; null: all of them."""
    samples: int = Field(2, ge=1)
    """Imagined futures per message, with it and without it."""
    horizon: int = Field(3, ge=1)
    """Steps that are imagined."""
    lam: float = Field(0.5, ge=0, le=1)
    """Of the lambda-return: 1 trusts the model's value at the horizon, 0 that after the first step."""
    check_messages: int = Field(60, ge=3)
    """Messages whose values are held against the real ablation before training."""
    check_samples: int = Field(32, ge=2)
    """Real games per message, with it and without it."""
    threshold: float = Field(THRESHOLD, ge=-1, le=1)
    """Rank correlation with the real ablation that they must have."""


def passed(file: Path) -> bool:
    """Has a check been passed before?"""
    return file.is_file() and bool(json.loads(file.read_text())["passed"])


class MessageCredit:
    """Values the messages of a rollout.

    Args:
        settings: of the recipe.
        team: whose agents hear them.
        model: what they play on in.
        trainable: adapters that learn.
        seed: everything random follows from it.
        world: number of processes.
    """

    def __init__(
        self,
        settings: MessageCreditSettings,
        team: GenerativeTeam,
        model: WorldModel,
        trainable: Collection[str],
        seed: int,
        world: int = 1,
    ) -> None:
        self.settings = settings
        self.team = team
        self.model = model
        self.trainable = trainable
        self.seed = seed
        self.world = world

    def check(self, task: str, params: Mapping[str, Any], channel: ChannelSettings, file: Path | None) -> AblationCheck:
        """Hold imagined values against the real ablation, on games of training instances that no rollout plays.

        Args:
            task: to play.
            params: of the task.
            channel: that messages travel by.
            file: is written; None for nowhere.

        Raises:
            TrainingError: the values may not be trained on.
        """
        settings = self.settings
        specs = [
            EpisodeSpec(task, params, derive_seed(self.seed, "message check", number) % 2**31, "train", number)
            for number in range(settings.check_messages)
        ]
        episodes = rollout(specs, self.team, channel, derive_seed(self.seed, "message check"))
        messages = heard(episodes, settings.check_messages, derive_seed(self.seed, "checked"))
        imagine = partial(self._imagined, seed=derive_seed(self.seed, "message check", "imagine"), extra=8)
        seed = derive_seed(self.seed, "message check", "ablation")
        found = check_values(imagine, self.team, messages, settings.check_samples, seed, settings.threshold)
        if file is not None:
            told = {"correlation": found.correlation, "reliability": found.reliability, "messages": len(messages)}
            write_json(file, {**told, "threshold": found.threshold, "passed": found.passed})
        found.require()
        return found

    def paid(
        self, rows: Sequence[Row], episodes: Sequence[Episode], iteration: int
    ) -> tuple[list[Row], dict[str, float]]:
        """Rows with what their messages were worth, and figures.

        Args:
            rows: of the episodes, in their order.
            episodes: a rollout of whole groups.
            iteration: names the luck of imagined futures.
        """
        chosen = self._chosen(episodes, iteration)
        messages = heard([episodes[place] for place in chosen])
        names = {(each.group, each.sample): place for place, each in enumerate(episodes)}
        values = self._imagined(messages, derive_seed(self.seed, "message values", iteration))
        worth: dict[TurnKey, list[float]] = {}
        for each, value in zip(messages, values, strict=True):
            episode = each.moment.episode
            said = [turn.step for turn in episode.trajectories[each.message.sender].turns].index(each.message.sent_at)
            key = TurnKey(names[episode.group, episode.sample], each.message.sender, said)
            worth.setdefault(key, []).append(value)
        found = written(episodes, self.trainable)
        keys = [key for key in found if key.episode in set(chosen)]
        means = [float(np.mean(worth[key])) if key in worth else 0.0 for key in keys]
        groups: list[Hashable] = [(episodes[key.episode].group, key.agent, key.index) for key in keys]
        centred = compared(groups, means, False)
        scale = self._scale(centred)
        metrics = {"message_value/messages": float(len(messages)), "message_value/spread": scale}
        if values:
            metrics["message_value/mean"] = float(np.mean(values))
            metrics["message_value/positive"] = float(np.mean(np.array(values) > 0))
        if not scale:
            return list(rows), metrics
        shares = (-self.settings.weight * centred / (scale + _EPSILON)).tolist()
        costs = {key: self._on_words(episodes, key, share) for key, share in zip(keys, shares, strict=True) if share}
        return charge(rows, episodes, costs), metrics

    def _imagined(self, messages: Sequence[Heard], seed: int, extra: int = 1) -> list[float]:
        settings = self.settings
        oracle = settings.model is ImaginedIn.ORACLE
        return imagined_values(
            self.team, self.model, messages, extra * settings.samples, settings.horizon, seed, oracle, settings.lam
        )

    def _chosen(self, episodes: Sequence[Episode], iteration: int) -> list[int]:
        """Positions of the episodes whose messages are valued: those of so many task instances."""
        groups = list(dict.fromkeys(episode.group for episode in episodes))
        if self.settings.instances is not None:
            groups.sort(key=lambda group: derive_seed(self.seed, "valued", iteration, group))
            groups = groups[: self.settings.instances]
        return [place for place, episode in enumerate(episodes) if episode.group in set(groups)]

    def _scale(self, centred: NDArray[np.float64]) -> float:
        """Root mean square over all processes."""
        total, count = float((centred**2).sum()), len(centred)
        if self.world > 1:
            parts: list[Any] = [None] * self.world
            torch.distributed.all_gather_object(parts, (total, count))
            total, count = sum(part[0] for part in parts), sum(part[1] for part in parts)
        return float(np.sqrt(total / count)) if count else 0.0

    def _on_words(self, episodes: Sequence[Episode], key: TurnKey, cost: float) -> NDArray[np.float64]:
        """The same for every token of a message."""
        turn = episodes[key.episode].trajectories[key.agent].turns[key.index]
        found = np.zeros(len(turn.completion_ids), dtype=np.float64)
        for span in turn.spans:
            if span.kind is SpanKind.SAY:
                found[span.start : span.end] = cost
        return found
