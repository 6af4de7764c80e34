"""What is wrong with the channel in training, drawn for each task instance.

Noise that is drawn anew for every message is something that a team can wait out. What it cannot wait out, that nothing
ever comes, it meets only where a whole episode is like that; and episodes that are compared with one another must have
the same channel, or their credit is for luck.

Parts: `ChannelHarm` and `drawn`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from preconcert.agents.channel.settings import ChannelSettings


class ChannelHarm(BaseModel):
    """What can be wrong with a channel, and how often; null leaves a setting as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(1.0, gt=0)
    """How often it is drawn, in proportion to others."""
    drop: float | None = Field(None, ge=0.0, le=1.0)
    """Probability that a message is lost."""
    substitute: float | None = Field(None, ge=0.0, le=1.0)
    """Probability of each word to arrive as another one."""
    noise: float | None = Field(None, ge=0)
    """Standard deviation of what is added to each number of a latent message."""
    delay: int | None = Field(None, ge=0)
    """Steps that a message takes longer."""
    cap_bits: float | None = Field(None, ge=0)
    """Bits per message at the most."""
    truncate: int | None = Field(None, ge=1)
    """Words (or vectors) per message at the most."""

    def of(self, channel: ChannelSettings) -> ChannelSettings:
        """The channel with this harm."""
        changed = self.model_dump(exclude={"weight"}, exclude_none=True)
        return ChannelSettings.model_validate({**channel.model_dump(), **changed})

    def of_scripts(self, channel: ChannelSettings) -> ChannelSettings:
        """The channel with what of this harm scripted players are to be imitated under: messages lost or late.

        Scripts believe what they hear. Whoever imitates them where words are wrong learns to believe wrong words.
        """
        return ChannelHarm(drop=self.drop, delay=self.delay).of(channel)


def drawn(harms: Mapping[str, ChannelHarm], count: int, seed: int) -> tuple[str, ...]:
    """Names of harms for so many task instances; none where there are no harms to draw.

    Systematic sampling: each comes as often as its weight says, to less than one instance, in an order that is random.
    """
    names = list(harms)
    if not names:
        return ()
    rng = np.random.default_rng(seed)
    ends = np.cumsum([harms[name].weight for name in names])
    points = (rng.permutation(count) + rng.random()) / count
    places = np.searchsorted(ends[:-1] / ends[-1], points, side="right")
    return tuple(names[int(place)] for place in places)
