"""GAE chained over the agents of a step, then over steps: MARFT (arXiv 2504.16129).

Agents act in the environment's order, and V(step, agent) leads to V(step, next agent), the last agent's to V(step +
1, first agent): the recursion of `gae.py` along that one chain, with the team's reward, the mean of the agents', due
after the last agent of a step. At γ = λ = 1 an advantage is the team's return from the step on, less the value. An
agent's value may know what the agents before it chose; whether it does is the critic's affair.

`level: token` goes through the completion tokens of each agent in the same order, with the same γ inside the
utterance. Agents without tokens are part of the world and no link of the chain. MARFT normalises over all agents
together and takes exact zeros for missing entries; here each agent's advantages are normalised apart, and zeros
count.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Literal

from preconcert.training.credit.estimator import Credit
from preconcert.training.credit.gae import Critic, Link, Normalise, along
from preconcert.training.credit.ledger import Game, Ledger, TurnKey
from preconcert.training.credit.rewards import mean_reward


class ChainedGAECredit(Critic):
    """GAE over agents in order, then steps (MARFT)."""

    type: Literal["chained-gae"] = "chained-gae"
    level: Literal["action", "token"] = "action"
    """One link per `action`, or one per completion `token`."""

    def group_of(self, game: Game, agent: str, index: int) -> Hashable | None:
        """The whole rollout; per token, the mean is over tokens and not over turns."""
        if self.level == "token" or self.normalise is Normalise.NONE:
            return None
        return agent if self.normalise is Normalise.AGENT else ""

    def estimate(self, ledger: Ledger, state: Mapping[str, float] | None = None) -> Credit:
        """One advantage per turn or per token."""
        chains: list[list[Link]] = []
        for position, game in enumerate(ledger):
            team = mean_reward({agent: strand.rewards for agent, strand in game.strands.items()}, game.group)
            links = [(agent, strand) for agent, strand in game.strands.items() if strand.learns]
            chains.append(
                [
                    Link(TurnKey(position, agent, step), strand, float(reward) if strand is links[-1][1] else 0.0)
                    for step, reward in enumerate(team)
                    for agent, strand in links
                ]
            )
        return along(ledger, chains, self, self.level == "token")
