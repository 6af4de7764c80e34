"""How a token world model is trained: the section `world_model` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, model_validator


class WorldWeights(BaseModel):
    """The weight of each part's cross-entropy; each is a mean over its own tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    others: float = Field(0.5, ge=0)
    """What the other agents do."""
    view: float = Field(1.0, ge=0)
    """The next view."""
    reward: float = Field(0.3, ge=0)
    done: float = Field(0.3, ge=0)
    """Is the episode over?"""
    hear: float = Field(0.2, ge=0)
    """What is heard next."""
    value: float = Field(0.2, ge=0)
    """The bin of the sum of the rewards to come."""
    form: float = Field(0.01, ge=0)
    """Tokens that the grammar forces; only answers written without it need them."""


class WorldTraining(BaseModel):
    """The training of a world model's adapter on episodes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(100, ge=1)
    """Optimiser steps."""
    batch: int = Field(128, ge=1)
    """Rows per step."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW, after a short warm-up; decays along a cosine. On a base that knows world rows more
    undoes what it knows."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip of the gradient's norm."""
    weights: WorldWeights = WorldWeights()
    shares: Mapping[str, float] = Field(default_factory=lambda: {"random": 1.0, "scripted": 1.0, "learner": 1.0})
    """How often each source of episodes is drawn from, relative to the others."""
    ending_share: float = Field(0.2, ge=0, lt=1)
    """At least this share of a batch's rows are steps that end an episode or pay an uncommon reward. Rows drawn more
    often than they happen weigh less in proportion, so that probabilities stay those of the episodes."""
    value_sources: tuple[str, ...] = ("scripted", "learner")
    """Whose returns the value is learned from. Random play's would say what random play earns."""
    own_every: int = Field(2, ge=0)
    """Every so many batches the rows start from what the model itself imagined; 0 is never."""
    own_steps: tuple[int, int] = (2, 4)
    """How many steps it imagines, drawn per batch, both ends included."""
    own_start: float = Field(0.3, ge=0, le=1)
    """Share of the training before the first such batch."""
    own_refresh: int = Field(8, ge=1)
    """Such batches made at a time, with the weights as they are then."""

    @model_validator(mode="after")
    def _parts_fit(self) -> WorldTraining:
        low, high = self.own_steps
        if not 1 <= low <= high:
            raise ValueError(f"own_steps={self.own_steps} is no range of steps from 1 up")
        if min(self.shares.values(), default=0.0) < 0 or not any(self.shares.values()):
            raise ValueError(f"shares={dict(self.shares)} leaves nothing to learn from")
        return self


class WorldModelSettings(BaseModel):
    """A token world model beside the team: an adapter on the shared base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float = Field(0.5, ge=0, lt=1)
    """Share of world rows in the warm start's full fine-tuning; turns stay as many as without. 0 leaves the base as it
    is without a world model."""
    tell_partners: bool = True
    """Prompts say whose play an episode is. Without it the model takes its partners for a mixture of all players that
    it has seen, drawn anew at every step."""
    own_words: bool = True
    """Prompts say what the agent itself said last, which is what its teammates have heard. Without it the model forgets
    after one imagined step whether they know."""
    recall: int = Field(0, ge=0)
    """How many earlier moments prompts show: what was seen and heard, said and done. Without them the model forgets
    what has gone out of sight."""
    random_episodes: int = Field(1500, ge=0)
    """Episodes of random play."""
    scripted_episodes: int = Field(1500, ge=1)
    """Episodes of the player that the warm start imitates."""
    learner_episodes: int = Field(1000, ge=0)
    """Episodes of the warm-started team."""
    heldout_episodes: int = Field(40, ge=1)
    """Per source: episodes on held-out layouts, for the report."""
    training: WorldTraining = WorldTraining()
    """Of the adapter."""
    refresh_every: int = Field(0, ge=0)
    """Reinforcement learning goes on training the adapter on its own rollouts every so many iterations; 0 is never."""
    refresh_steps: int = Field(20, ge=1)
    """Optimiser steps each time."""

    @model_validator(mode="after")
    def _sources_have_episodes(self) -> WorldModelSettings:
        for name, count in (("random", self.random_episodes), ("learner", self.learner_episodes)):
            if not count and self.training.shares.get(name, 0.0) > 0:
                raise ValueError(f"{name}_episodes=0, and training.shares draws from them: leave it out of the shares")
        return self
