"""What the planners are held against: a reactive team that may write as many tokens as they do.

Of N full turns it takes one without imagining anything: the one that it gave the highest probability itself (best of N
by its own log-probability), or the one that it wrote most often (self-consistency, Wang et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

from preconcert.agents.planners.paths import distinct
from preconcert.core import ConfigError, Rehearsing, Slot, Turn, TurnRequest, derive_seed


def samples_for(tokens_per_decision: float, tokens_per_turn: float) -> int:
    """How many turns cost as many tokens as one planned decision, at least one.

    Raises:
        ConfigError: turns without tokens.
    """
    if tokens_per_turn <= 0:
        raise ConfigError(f"tokens_per_turn = {tokens_per_turn}: a policy that writes nothing has no budget to match")
    return max(1, round(tokens_per_decision / tokens_per_turn))


class Choice(StrEnum):
    """Which of the sampled turns is taken."""

    LIKELIEST = "likeliest"
    """The one with the highest log-probability under the policy, a sum over its tokens."""
    COMMONEST = "commonest"
    """The most frequent pair of action and message, the earliest of equals: self-consistency."""


class SameTokensTeam:
    """A `Policy`: reactive best of N.

    Args:
        policy: what samples; usually a `GenerativeTeam`.
        samples: turns per decision, e.g. from `samples_for`.
        choice: which of them is taken.
    """

    def __init__(self, policy: Rehearsing, samples: int, choice: Choice = Choice.LIKELIEST) -> None:
        if samples < 1:
            raise ConfigError(f"samples = {samples}: expected at least 1")
        self.policy = policy
        self.samples = samples
        self.choice = choice
        self.decisions = 0
        """Turns decided so far."""
        self.tokens_generated = 0
        """Tokens written for them, forced ones included."""

    @property
    def version(self) -> int:
        """That of the policy."""
        return self.policy.version

    @version.setter
    def version(self, value: int) -> None:
        self.policy.version = value

    def version_of(self, adapter: str) -> int:
        """Number of updates behind an adapter."""
        asked = getattr(self.policy, "version_of", None)
        return self.policy.version if asked is None else int(asked(adapter))

    def message_slots(self, others: Sequence[str]) -> tuple[Slot, ...] | None:
        """Those of the policy; None where it has none of its own."""
        asked = getattr(self.policy, "message_slots", None)
        return None if asked is None else tuple(asked(others))

    def decide(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        """One turn per request, of those sampled; a malformed one only if there is no other."""
        if not requests:
            return []
        drawn: list[TurnRequest] = []
        memories: list[Any] = []
        for request in requests:
            memory = self.policy.recall(request.episode, request.agent)
            for draw in range(self.samples):
                seed = request.seed if draw == 0 else derive_seed(request.seed, "candidate", draw)
                drawn.append(replace(request, seed=seed))
                memories.append(memory)
        answers = self.policy.rehearse(drawn, memories)
        self.decisions += len(requests)
        self.tokens_generated += sum(len(turn.completion_ids) for turn, _ in answers)
        turns: list[Turn] = []
        for number, request in enumerate(requests):
            own = answers[number * self.samples : (number + 1) * self.samples]
            turn, memory = self._chosen(own)
            self.policy.remember(request.episode, request.agent, memory)
            turns.append(turn)
        return turns

    def finish(self, episode: str) -> None:
        """Let go of what is held for an episode."""
        self.policy.finish(episode)

    def _chosen(self, drawn: Sequence[tuple[Turn, Any]]) -> tuple[Turn, Any]:
        if self.choice is Choice.LIKELIEST:
            return max(drawn, key=lambda each: (not each[0].malformed, sum(each[0].logprobs)))
        commonest = max(distinct(drawn), key=lambda proposal: proposal.count)
        return commonest.turn, commonest.memory
