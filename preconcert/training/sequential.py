"""One agent after the other: a rollout cut into minibatches by agent, and what later agents are told of earlier ones.

Parts: `Cut`, `Schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from preconcert.core import derive_seed
from preconcert.training.update import agent_order, compounding, policy_mask


@dataclass(frozen=True, slots=True)
class Cut:
    """How an iteration is cut."""

    agents: tuple[str, ...]
    adapters: tuple[str, ...]
    """All of the model's, in the order that rows number them."""
    seed: int
    iteration: int
    parts: int
    """Minibatches of each agent."""
    repeats: int
    """Passes over them."""


@dataclass(slots=True)
class Schedule:
    """Which minibatch each forward pass of an iteration takes, and whose it is."""

    slots: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Agent and minibatch, by forward pass."""
    owned: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The adapters of each agent's rows."""
    log_factor: Float[Tensor, " steps"] = field(default_factory=lambda: torch.zeros(0))
    """By joint step, the log of the ratios of all agents that have been updated, multiplied."""

    @classmethod
    def of(cls, batch: dict[str, Any], cut: Cut, accelerator: Accelerator) -> Schedule:
        """Cut a rollout into the minibatches of one agent after the other, in this iteration's random order.

        Args:
            batch: all rows, as `collate` makes them, with `agent`.
            cut: how.
            accelerator: of all processes.
        """
        names = range(len(cut.agents))
        everyone = [batch["agent"] == number for number in names]
        tokens = torch.stack([policy_mask(batch)[rows].sum() for rows in everyone])
        targets = torch.stack([(batch["target_ids"][rows] >= 0).sum() for rows in everyone])
        # The loss is divided by all tokens of an iteration, spread over its minibatches. An agent's own minibatches
        # are to be divided by its own tokens.
        items = accelerator.reduce(torch.stack([tokens, targets]), reduction="sum") * len(cut.agents)
        # TRL gathers one figure per row from all processes, so that theirs must be as many.
        counts = accelerator.gather(torch.stack([rows.sum() for rows in everyone])).view(-1, len(cut.agents))
        most = counts.amax(dim=0).clamp(min=cut.parts).tolist()
        used = torch.stack([batch["adapter"][rows].bincount(minlength=len(cut.adapters)) for rows in everyone])
        used = accelerator.reduce(used, reduction="sum")
        owned = {
            agent: [name for name, count in zip(cut.adapters, counts, strict=True) if count]
            for agent, counts in zip(cut.agents, used.tolist(), strict=True)
        }
        slots: list[tuple[str, dict[str, Any]]] = []
        for agent in agent_order(cut.agents, cut.seed, cut.iteration):
            number = cut.agents.index(agent)
            batch["num_items_in_batch"], batch["hindsight_items"] = items[0, number], items[1, number]
            mine = everyone[number].nonzero()[:, 0]
            generator = torch.Generator().manual_seed(derive_seed(cut.seed, agent, cut.iteration) % 2**63)
            mine = mine[torch.randperm(len(mine), generator=generator).to(mine.device)]
            silent = (mine if len(mine) else mine.new_zeros(1)).repeat(most[number])
            places = torch.cat([mine, silent[: most[number] - len(mine)]])
            heard = torch.arange(len(places), device=places.device) < len(mine)
            pieces = [
                _piece(batch, chosen, on)
                for chosen, on in zip(places.tensor_split(cut.parts), heard.tensor_split(cut.parts), strict=True)
            ]
            slots += [(agent, piece) for _ in range(cut.repeats) for piece in pieces]
        steps = max(int(batch["joint"].max()) + 1, 1)
        return cls(slots, owned, torch.zeros(steps, dtype=torch.float64, device=batch["joint"].device))

    def agent(self, place: int) -> str:
        """Whose the forward pass is."""
        return self.slots[place][0]

    def begins(self, place: int) -> bool:
        """Does another agent's turn begin with this forward pass? That of the first follows on the last."""
        return bool(self.slots) and self.slots[place][0] != self.slots[place - 1][0]

    def pieces(self, agent: str) -> list[dict[str, Any]]:
        """The minibatches of an agent, each once."""
        return list({id(piece): piece for name, piece in self.slots if name == agent}.values())

    def compound(self, piece: Mapping[str, Tensor], logps: Float[Tensor, "rows tokens"]) -> None:
        """Multiply the ratios of an updated agent's minibatch in (HAPPO, equation 11).

        Args:
            piece: one of its minibatches.
            logps: under the weights that it has now.
        """
        old, joint = piece["old_per_token_logps"], piece["joint"]
        self.log_factor = compounding(self.log_factor, logps, old, policy_mask(piece), joint)

    def hand_over(self, agent: str, clip: float) -> float:
        """Multiply the next agent's advantages by the ratios of those before it, held to [1/clip, clip].

        Returns:
            The mean factor over joint steps.
        """
        limit = math.log(clip)
        factor = self.log_factor.clamp(-limit, limit).exp().float()
        for piece in self.pieces(agent):
            joint = piece["joint"]
            piece["advantages"] = piece["advantages"] * torch.where(joint >= 0, factor[joint.clamp(min=0)], 1.0)
        return float(factor.mean())


def _piece(batch: Mapping[str, Tensor], places: Tensor, heard: Tensor) -> dict[str, Any]:
    """Some rows of a batch; those that are not to be heard carry no loss."""
    piece = {name: value[places] if value.ndim else value for name, value in batch.items()}
    piece["tool_mask"] = piece["tool_mask"] * heard[:, None]
    piece["target_ids"] = torch.where(heard[:, None], piece["target_ids"], -1)
    if "said_at" in piece:
        piece["said_at"] = torch.where(heard, piece["said_at"], -1)
    return piece
