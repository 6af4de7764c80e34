"""What a critic reads for which turn, as tokens: the whole truth, the agent's own prompt, or both."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from preconcert.core import Episode, TrainingError
from preconcert.training.credit import TurnKey
from preconcert.training.critic_settings import CriticContext


@dataclass(frozen=True, slots=True)
class Reading:
    """One sequence and the values that are read off it."""

    ids: tuple[int, ...]
    places: tuple[tuple[int, int, TurnKey, int], ...]
    """(token whose hidden state is read, column of the head, turn, token of that turn's completion)."""
    name: str
    """Episode, step and agent: the same in every process and for any division of the work."""


class CriticReader:
    """Which tokens the critic sees for each turn.

    Args:
        tokenizer: the model's tokenizer.
        agents: in the episode's order.
        context: whole truth or own prompt.
        acted: also read what earlier agents of the same step have done (values chained over agents).
        per_token: one value before each token of a completion, instead of one before the turn.
        learners: the adapters whose turns need values; None for all.
    """

    def __init__(
        self,
        tokenizer: Any,
        agents: Sequence[str],
        context: CriticContext,
        acted: bool = False,
        per_token: bool = False,
        learners: Collection[str] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.agents = tuple(agents)
        self.context = context
        self.acted = acted
        self.per_token = per_token
        self.learners = learners
        self._ids: dict[str, tuple[int, ...]] = {}

    def read(self, episodes: Sequence[Episode]) -> list[Reading]:
        """One sequence per step where all agents can share it, else one per turn."""
        together = self.context is CriticContext.CENTRAL and not self.acted and not self.per_token
        readings: list[Reading] = []
        for position, episode in enumerate(episodes):
            if tuple(episode.trajectories) != self.agents:
                raise TrainingError(
                    f"the critic knows the agents {', '.join(self.agents)}, an episode has "
                    f"{', '.join(episode.trajectories)}"
                )
            # Scripted players and frozen adapters are part of the world: their turns need no value.
            writers = [column for column, agent in enumerate(self.agents) if self._learns(episode, agent)]
            if not writers:
                continue
            for index in range(episode.steps):
                if together:
                    ids = self._truth(episode, index)
                    places = tuple(
                        (len(ids) - 1, column, TurnKey(position, self.agents[column], index), 0) for column in writers
                    )
                    readings.append(Reading(ids, places, _name(episode, index)))
                else:
                    readings += [self._alone(episode, position, index, column) for column in writers]
        return readings

    def _learns(self, episode: Episode, agent: str) -> bool:
        return any(
            turn.completion_ids and (self.learners is None or turn.adapter in self.learners)
            for turn in episode.trajectories[agent].turns
        )

    def _alone(self, episode: Episode, position: int, index: int, column: int) -> Reading:
        agent = self.agents[column]
        turn = episode.trajectories[agent].turns[index]
        ids: tuple[int, ...] = () if self.context is CriticContext.OWN else self._truth(episode, index)
        if self.acted:
            done = (f"{a} {episode.trajectories[a].turns[index].action}" for a in self.agents[:column])
            ids += self._tokens(" ".join(done))
        if self.context is not CriticContext.CENTRAL or self.per_token:
            ids += turn.prompt_ids
        key, name = TurnKey(position, agent, index), f"{_name(episode, index)}:{agent}"
        if not self.per_token:
            return Reading(ids, ((len(ids) - 1, column, key, 0),), name)
        places = tuple((len(ids) - 1 + token, column, key, token) for token in range(len(turn.completion_ids)))
        return Reading(ids + turn.completion_ids[:-1], places, name)

    def _truth(self, episode: Episode, index: int) -> tuple[int, ...]:
        held = {
            (message.sender, message.sent_at, message.written or message.payload): message
            for trajectory in episode.trajectories.values()
            for message in trajectory.turns[index].inbox
        }
        said = " ".join(f"{sender} {payload}" for sender, _, payload in sorted(held))
        ids = self._tokens(episode.states[index]) + self._tokens(said)
        if not ids:
            raise TrainingError(f"{episode.task}: the global state at step {index} is empty: there is nothing to read")
        return ids

    def _tokens(self, text: str) -> tuple[int, ...]:
        if text not in self._ids:
            if len(self._ids) > 100_000:
                self._ids.clear()
            self._ids[text] = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._ids[text]


def _name(episode: Episode, index: int) -> str:
    return f"{episode.group}:{episode.iteration}:{episode.sample}:{index}"
