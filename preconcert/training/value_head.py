"""A value per agent in units of that agent's returns (PopArt)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class ValueHead(nn.Module):
    """A linear value per agent in units of that agent's returns (PopArt, arXiv 1602.07714, equations 4 to 9).

    Args:
        width: of the hidden state.
        agents: number of columns.
    """

    mean: Tensor
    deviation: Tensor
    first: Tensor
    second: Tensor
    weight_seen: Tensor

    def __init__(self, width: int, agents: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, agents)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        for name, start in (("mean", 0.0), ("deviation", 1.0), ("first", 0.0), ("second", 0.0), ("weight_seen", 0.0)):
            self.register_buffer(name, torch.full((agents,), start, dtype=torch.float64))

    def forward(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows agents"]:
        """Normalised values."""
        return self.linear(hidden.to(self.linear.weight.dtype))

    def raw(self, normalised: Float[Tensor, " n"], column: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """In units of the returns."""
        return (normalised.double() * self.deviation[column] + self.mean[column]).to(normalised.dtype)

    def normalised(self, raw: Float[Tensor, " n"], column: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """In units of the head."""
        return ((raw.double() - self.mean[column]) / self.deviation[column]).to(raw.dtype)

    @torch.no_grad()
    def follow(
        self,
        count: Float[Tensor, " agents"],
        total: Float[Tensor, " agents"],
        squares: Float[Tensor, " agents"],
        memory: float,
    ) -> None:
        """Move the moments towards a rollout's returns; the head is rescaled so that no raw value changes.

        Args:
            count: returns per agent; an agent without any keeps its moments.
            total: their sum.
            squares: the sum of their squares.
            memory: weight of the past.
        """
        seen = count > 0
        n = count.clamp(min=1)
        step = seen.to(self.first.dtype) * (1.0 - memory)
        self.first += step * (total / n - self.first)
        self.second += step * (squares / n - self.second)
        self.weight_seen += step * (1.0 - self.weight_seen)
        known = self.weight_seen.clamp(min=1e-12)
        mean = torch.where(self.weight_seen > 0, self.first / known, self.mean)
        variance = (self.second / known - mean**2).clamp(min=1e-4)
        deviation = torch.where(self.weight_seen > 0, variance.sqrt(), self.deviation)
        kind = self.linear.weight.dtype
        self.linear.weight.mul_((self.deviation / deviation).to(kind)[:, None])
        self.linear.bias.copy_(((self.deviation * self.linear.bias.double() + self.mean - mean) / deviation).to(kind))
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)
