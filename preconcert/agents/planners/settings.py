"""How a planner searches: one settings class per kind of search, told apart by `type`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class HorizonSettings(BaseModel):
    """How the horizon follows the model's measured errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: float = Field(0.05, gt=0)
    """As many steps are imagined as have a recent error below this: mean squared difference of view fields, from 0 to
    1, as far ahead."""
    rate: float = Field(0.3, gt=0, le=1)
    """Weight of the newest error in the running mean."""
    fade: float = Field(0.05, ge=0, lt=1)
    """An error that could not be measured anew shrinks by this share per decision, so that long horizons are tried
    again."""


class ScoreSettings(BaseModel):
    """What an imagined future is worth."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gamma: float = Field(0.99, gt=0, le=1)
    """Discount per step."""
    lam: float = Field(0.5, ge=0, le=1)
    """Of the lambda-return: 0 trusts the model's value after the first step, 1 imagines as far as the horizon. The
    value after the first step is the only one that the model gives in full knowledge of what was said in it."""
    spread_weight: float = Field(0.0, ge=0)
    """How much the standard deviation of a candidate's imagined returns counts against it."""
    disagreement_weight: float = Field(0.0, ge=0)
    """How much it counts against a candidate that its samples show different views."""
    prior_weight: float = Field(0.05, ge=0)
    """How much the logarithm of the share of samples in which the policy proposed a candidate counts for it. What is
    imagined is noisy, and the best of many noisy scores is often a slip; this asks a rare turn to look better by so
    much more (the trade between value and divergence from the policy of Abdolmaleki et al. 2018)."""


class SearchSettings(BaseModel):
    """What all searches have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    candidates: int = Field(16, ge=1, le=512)
    """First turns sampled from the policy; equal ones count once."""
    horizon: int = Field(3, ge=1, le=64)
    """Steps imagined ahead at the most."""
    score: ScoreSettings = ScoreSettings()
    """What an imagined future is worth."""
    adaptive: HorizonSettings | None = None
    """Let the horizon follow the model's measured errors; null keeps it."""


class BestOfK(SearchSettings):
    """Every candidate is followed by the policy's own turns; the best on average is taken."""

    type: Literal["best-of-k"] = "best-of-k"
    """The kind of search."""
    samples: int = Field(2, ge=1, le=64)
    """Imagined futures of each candidate."""


class Beam(SearchSettings):
    """The best partial plans are kept after every imagined step and branch again."""

    type: Literal["beam"] = "beam"
    """The kind of search."""
    samples: int = Field(2, ge=1, le=64)
    """Imagined futures of each plan."""
    width: int = Field(4, ge=1, le=64)
    """Plans kept."""
    branch: int = Field(4, ge=1, le=64)
    """Turns sampled from the policy to go on with each plan."""


class Tree(SearchSettings):
    """Monte-Carlo tree search with the policy's frequencies as priors and sampled outcomes as chance nodes."""

    type: Literal["tree"] = "tree"
    """The kind of search."""
    branch: int = Field(4, ge=1, le=64)
    """Turns sampled from the policy at every imagined moment."""
    rounds: int = Field(20, ge=1, le=4096)
    """One batched step of the world model each."""
    leaves: int = Field(8, ge=1, le=256)
    """Imagined steps per round and tree, kept apart by virtual losses."""
    exploration: float = Field(1.25, ge=0)
    """Weight of the prior in PUCT; values are scaled by the range that the tree has seen, at least that of a reward."""
    widening: float = Field(1.0, gt=0)
    """A turn that was tried N times has at most `widening` times the square root of N outcomes."""
    outcomes: int = Field(8, ge=1)
    """And never more than this."""


PlannerSettings = Annotated[BestOfK | Beam | Tree, Field(discriminator="type")]
PLANNERS: dict[str, type[BestOfK] | type[Beam] | type[Tree]] = {"best-of-k": BestOfK, "beam": Beam, "tree": Tree}
"""By `type`."""
