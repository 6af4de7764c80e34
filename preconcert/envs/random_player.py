"""A player that does anything legal and says anything sayable; the floor that every policy is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from preconcert.core import Decision, Env, Message, Observation


class RandomPlayer:
    """Uniform over legal actions and over the words of each message slot."""

    def decide(
        self, env: Env, observation: Observation, inbox: Sequence[Message], rng: np.random.Generator
    ) -> Decision:
        """Ignores everything but what is legal."""
        action = str(rng.choice(observation.legal_actions))
        words = [str(rng.choice(slot.choices)) for slot in env.language.message]
        return Decision(action, " ".join(words) if words else None)
