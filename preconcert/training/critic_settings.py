"""What a critic reads, where its weights are, and how it is fitted: the section `critic` of a recipe."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


class CriticContext(StrEnum):
    """What the critic reads."""

    CENTRAL = "central"
    """The global state and every message that somebody holds."""
    AGENT_CENTRAL = "agent-central"
    """The same, and after it the agent's own prompt: MAPPO's agent-specific global state (arXiv 2103.01955). One
    sequence per turn instead of one per step."""
    OWN = "own"
    """The agent's own prompt."""


class CriticModel(StrEnum):
    """Where the critic's weights are."""

    SHARED = "shared"
    """An adapter and a head on the policy's base."""
    SEPARATE = "separate"
    """A full copy of the base, every weight trained."""


class CriticSettings(BaseModel):
    """The critic and how it learns."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    context: CriticContext = CriticContext.CENTRAL
    """What it reads."""
    model: CriticModel = CriticModel.SHARED
    """Where its weights are."""
    lr: float = Field(3e-3, gt=0)
    """AdamW's learning rate."""
    epochs: int = Field(3, ge=1)
    """Passes over each rollout."""
    minibatches: int = Field(8, ge=1)
    """Optimiser steps per pass."""
    clip: float | None = Field(0.2, gt=0)
    """How far a value may move from the one at the rollout before it stops counting, in normalised units."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip of the gradient's norm."""
    normalise: bool = True
    """Keep each agent's returns at mean 0 and deviation 1 for the head (PopArt)."""
    memory: float = Field(0.9, ge=0, lt=1)
    """Weight of the past in the normaliser's moving moments, per rollout."""
    warmup_iterations: int = Field(2, ge=0)
    """First iterations in which the critic learns and the policy has no advantage yet."""
