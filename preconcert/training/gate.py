"""The gate: does the warm start use its messages at all?

Reinforcement learning sharpens conditionals that the imitator has; it does not invent them. Success with messages minus
success with shuffled messages, on the same task seeds, says whether there is anything to sharpen.
"""

from __future__ import annotations

from dataclasses import dataclass

from preconcert.agents import ChannelMode
from preconcert.core import GateError, Policy, derive_seed
from preconcert.training.recipe import Recipe
from preconcert.training.rollout import EpisodeSpec, rollout


@dataclass(frozen=True, slots=True)
class GateResult:
    """What the gate saw."""

    success: float | None
    """With messages. None where episodes have no success."""
    shuffled: float | None
    """With messages exchanged between episodes."""
    min_gap: float
    episodes: int

    @property
    def gap(self) -> float | None:
        """How much the messages are worth."""
        return None if self.success is None or self.shuffled is None else self.success - self.shuffled

    @property
    def passed(self) -> bool:
        """Is there enough to learn from? Without a minimum, or a success to judge by, there always is, also where
        chance made the gap negative."""
        return not self.min_gap or self.gap is None or self.gap >= self.min_gap


def run_gate(recipe: Recipe, team: Policy) -> GateResult:
    """Play both arms with sampled decisions on the same training-layout seeds."""
    rates: list[float | None] = []
    specs = [
        EpisodeSpec(recipe.task, recipe.params, derive_seed(recipe.seed, "gate", number) % 2**31)
        for number in range(recipe.gate.episodes)
    ]
    for mode in (ChannelMode.ON, ChannelMode.SHUFFLED):
        channel = recipe.channel.model_copy(update={"mode": mode})
        episodes = rollout(specs, team, channel, derive_seed(recipe.seed, "gate"))
        judged = [episode.success for episode in episodes if episode.success is not None]
        rates.append(sum(judged) / len(judged) if judged else None)
    return GateResult(rates[0], rates[1], recipe.gate.min_gap, recipe.gate.episodes)


def check_gate(result: GateResult) -> None:
    """Stop a run that could not learn.

    Raises:
        GateError: the gap is below the recipe's `gate.min_gap`.
    """
    if not result.passed:
        raise GateError(
            f"warm start: success {result.success:.2f} with messages, {result.shuffled:.2f} with shuffled ones; the "
            f"gap {result.gap:.2f} is below gate.min_gap={result.min_gap}: there is no use of messages to sharpen. "
            "Train the warm start longer (warm_start.steps, warm_start.episodes) or set gate.min_gap=0"
        )
