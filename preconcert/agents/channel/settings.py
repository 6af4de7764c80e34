"""What a recipe can ask of the channel."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from preconcert.agents.channel.topology import Broadcast, TopologySettings
from preconcert.core import MOST_ROUNDS


class ChannelMode(StrEnum):
    """What happens to a message on its way."""

    ON = "on"
    """It arrives."""
    SHUFFLED = "shuffled"
    """Another episode's message from the same sender arrives instead: same form, no information."""
    CONSTANT = "constant"
    """The same fixed message arrives instead, at every step of every episode."""
    RANDOM = "random"
    """A message drawn at random arrives instead: words uniformly from the task's own, numbers from their levels."""
    OFF = "off"
    """Nothing is sent."""


class ChannelSettings(BaseModel):
    """How messages travel."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: ChannelMode = ChannelMode.ON
    """`on`, or one of the controls `shuffled`, `constant`, `random` and `off`."""
    drop: float = Field(0.0, ge=0.0, le=1.0)
    """Probability that a message is lost, independently for each recipient."""
    topology: TopologySettings = Broadcast()
    """Who hears whom: `broadcast`, or a mapping with a `type` (`pairs`, `nearest`, `messenger`) and its settings."""
    rounds: int = Field(1, ge=1, le=MOST_ROUNDS)
    """Rounds per step of the world: all but the last are for talking only. Everything that is counted in steps here
    (`delay`, the step of a record) counts rounds."""
    cap_bits: float | None = Field(None, ge=0)
    """Bits per message at the most, without any model: words are cut off its end until it fits. null: no cap."""
    cap_episode_bits: float | None = Field(None, ge=0)
    """Bits per sender and episode at the most: a message that is beyond is not sent at all. null: no cap."""
    truncate: int | None = Field(None, ge=1)
    """Words (or vectors) per message at the most; the rest is cut off. null: no limit."""
    delay: int = Field(0, ge=0)
    """Steps that a message takes longer than the one it always takes."""
    substitute: float = Field(0.0, ge=0.0, le=1.0)
    """Probability of each word to arrive as another word of its slot, independently for each recipient."""
    noise: float = Field(0.0, ge=0)
    """Standard deviation of what is added to each number of a latent message, in the numbers' own units (quantised
    ones go from -1 to 1), independently for each recipient. Quantised numbers arrive as the nearest of their values."""

    @property
    def looks(self) -> bool:
        """Does the channel look at anything but the messages themselves?"""
        return (
            not isinstance(self.topology, Broadcast)
            or self.mode in (ChannelMode.CONSTANT, ChannelMode.RANDOM)
            or self.capped
            or self.substitute > 0
        )

    @property
    def capped(self) -> bool:
        """Is there a limit in bits?"""
        return self.cap_bits is not None or self.cap_episode_bits is not None

    def told(self) -> dict[str, Any]:
        """Mode and loss, and whatever else is not at its default, as plain values."""
        usual = ChannelSettings().model_dump(mode="json")
        told = self.model_dump(mode="json")
        return {key: value for key, value in told.items() if key in ("mode", "drop") or value != usual[key]}
