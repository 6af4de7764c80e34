"""How advantages become steps: who is updated when, at which level the ratio is taken, and when to stop.

Parts: `UpdateSettings` and the pure tensor functions behind it. Advantages themselves are credit's business, the loss
is TRL's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from preconcert.core import derive_seed


class Order(StrEnum):
    """Who is updated when."""

    SIMULTANEOUS = "simultaneous"
    """Every agent in every step."""
    SEQUENTIAL = "sequential"
    """One agent after the other in random order; later ones see what earlier ones changed (HAPPO, 2109.11251)."""


class RatioLevel(StrEnum):
    """What one probability ratio stands for."""

    TOKEN = "token"
    """A token (PPO)."""
    TURN = "turn"
    """A turn: the geometric mean over its tokens (ReMA, 2503.09501)."""
    SEQUENCE = "sequence"
    """A training row: a turn in context `turn`, an agent's whole episode in `transcript` (GSPO, 2507.18071)."""


class UpdateSettings(BaseModel):
    """From advantages to optimiser steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    order: Order = Order.SIMULTANEOUS
    """Who is updated when. `sequential` needs `grpo.minibatches` to be a multiple of the number of agents."""
    ratio: RatioLevel = RatioLevel.TOKEN
    """What one probability ratio stands for."""
    correction: float | None = Field(None, ge=1)
    """Truncated importance weights min(trainer's probability / sampler's, this) where the two differ; None is off. The
    difference itself is logged either way as `sampler_mismatch`."""
    compound_clip: float = Field(2.0, gt=1)
    """The compounding factor of a sequential update is kept between one over this and this."""
    dual_clip: float | None = Field(None, gt=1)
    """Upper bound of the ratio where the advantage is negative; above 1 + `grpo.clip_high`."""
    kl_stop: float | None = Field(None, gt=0)
    """Once a step finds the policy this far (mean KL per token, in nats) from the one that sampled, the rest of the
    iteration is skipped (in a sequential update, the rest of the agent's slot). How many steps that were is logged as
    `skipped_steps`."""
    share_every: int = Field(10, ge=0)
    """Where agents share an adapter, every how many iterations the first minibatch's gradient is taken apart by agent
    and logged as `gradient_share/AGENT`, at the price of a further pass per agent; 0 is never. A sequential update
    knows the shares without it."""


def agent_order(agents: Sequence[str], seed: int, iteration: int) -> tuple[str, ...]:
    """The random order of one iteration."""
    rng = np.random.default_rng(derive_seed(seed, "agent order", iteration))
    return tuple(agents[i] for i in rng.permutation(len(agents)))


def policy_mask(batch: Mapping[str, Tensor]) -> Bool[Tensor, "rows tokens"]:
    """Tokens of the policy loss, in a batch as `collate` makes it."""
    return (batch["tool_mask"] * batch["completion_mask"]).bool()


def turn_level(
    logps: Float[Tensor, "rows tokens"],
    old: Float[Tensor, "rows tokens"],
    mask: Bool[Tensor, "rows tokens"],
    joint: Int[Tensor, "rows tokens"],
) -> Float[Tensor, "rows tokens"]:
    """Log-probabilities whose difference to `old` is, at every token of a turn, the turn's mean difference.

    A loss of token ratios then becomes one of turn ratios exp(mean over the turn's tokens of Δ log p): clipped once for
    the whole turn, and its gradient shared evenly among the turn's tokens.

    Args:
        logps: of the present policy.
        old: of the policy that sampled.
        mask: tokens of the policy loss.
        joint: which step of which episode a token belongs to; -1 for none.
    """
    segment = _segments(mask, joint)
    change = torch.where(mask, logps - old, torch.zeros_like(logps))
    empty = torch.zeros(int(segment.max()) + 1, dtype=change.dtype, device=change.device)
    total = empty.index_add(0, segment.flatten(), change.flatten())
    count = empty.index_add(0, segment.flatten(), mask.flatten().to(total.dtype))
    mean = (total / count.clamp(min=1))[segment]
    return torch.where(mask, old + mean, logps)


def turn_weights(
    mask: Bool[Tensor, "rows tokens"], joint: Int[Tensor, "rows tokens"]
) -> Float[Tensor, "rows tokens"]:
    """Factors that make a mean over a row's tokens one over its turns: tokens / (turns · the turn's tokens).

    1 outside the mask, and everywhere in rows of a single turn.

    Args:
        mask: tokens of the policy loss.
        joint: which step of which episode a token belongs to; -1 for none.
    """
    segment = _segments(mask, joint)
    ones = mask.flatten().float()
    empty = torch.zeros(int(segment.max()) + 1, device=mask.device)
    count = empty.index_add(0, segment.flatten(), ones).clamp(min=1)[segment]
    tokens = mask.sum(dim=1, keepdim=True).float()
    turns = torch.where(mask, 1.0 / count, 0.0).sum(dim=1, keepdim=True)
    return torch.where(mask, tokens / (turns.clamp(min=1e-9) * count), 1.0)


def compounding(
    log_factor: Float[Tensor, " steps"],
    logps: Float[Tensor, "rows tokens"],
    old: Float[Tensor, "rows tokens"],
    mask: Bool[Tensor, "rows tokens"],
    joint: Int[Tensor, "rows tokens"],
) -> Float[Tensor, " steps"]:
    """Multiply one agent's ratio into the factor of every joint step (HAPPO, equation 11): M ← M · π_new / π_old.

    Args:
        log_factor: log M by joint step.
        logps: of the updated agent.
        old: of the policy that sampled.
        mask: the agent's tokens that carry the policy loss.
        joint: which step of which episode a token belongs to.
    """
    chosen = mask & (joint >= 0)
    return log_factor.index_add(0, joint[chosen], (logps - old)[chosen].to(log_factor.dtype))


def approximate_kl(
    logps: Float[Tensor, "rows tokens"], old: Float[Tensor, "rows tokens"], mask: Bool[Tensor, "rows tokens"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The sum over tokens of ρ − 1 − log ρ with ρ = π / π_old, never negative, and the number of tokens."""
    change = torch.where(mask, logps - old, torch.zeros_like(logps))
    return (change.exp() - 1 - change).sum(), mask.sum().to(logps.dtype)


def importance_weights(
    trainer: Float[Tensor, "rows tokens"],
    sampler: Float[Tensor, "rows tokens"],
    mask: Bool[Tensor, "rows tokens"],
    cap: float,
) -> Float[Tensor, "rows tokens"]:
    """min(π_trainer / π_sampler, cap) per token, 1 outside the mask (truncated importance sampling, Ionides 2008)."""
    change = torch.where(mask, trainer - sampler, torch.zeros_like(trainer))
    return change.exp().clamp(max=cap)


def _segments(mask: Bool[Tensor, "rows tokens"], joint: Int[Tensor, "rows tokens"]) -> Int[Tensor, "rows tokens"]:
    """The number of the turn that each token belongs to, turns of different rows apart; one number for all others."""
    rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(joint)
    keys = torch.where(mask, rows * (int(joint.max()) + 2) + joint + 1, -1)
    _, segment = torch.unique(keys, return_inverse=True)
    return segment
