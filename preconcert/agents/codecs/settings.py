"""A recipe's `agent.codec`: what messages are made of.

A recipe writes `codec: learned`, or `codec: {type: learned, words: free}` where it changes a setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from preconcert.core import nearest
from preconcert.models.latents import LatentSettings


class SlotsSettings(BaseModel):
    """Every word of the task's message slots, in every turn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["slots"] = "slots"


class Words(StrEnum):
    """Which words can stand where in a `learned` message."""

    POSITIONAL = "positional"
    """Each position has the words of one of the task's message slots, in their order."""
    FREE = "free"
    """Each position has the words of all slots."""


class LearnedSettings(BaseModel):
    """Words of the task's message slots, as many as the sender likes: it may end a message before any of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["learned"] = "learned"
    words: Words = Words.POSITIONAL
    """`positional`, or `free`: any word at any position."""
    max_words: int | None = Field(None, ge=1)
    """Words of a message at the most; null: as many as the task has slots."""
    shorten: float = Field(0.5, ge=0, le=1)
    """Share of the scripted messages that the warm start cuts short, so that there are short ones to imitate."""


class RawStateSettings(BaseModel):
    """The sender's observation, word by word; nothing is sampled."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["raw-state"] = "raw-state"


class IntentionSettings(BaseModel):
    """What the sender's own turn intends and foresees, in words; nothing is sampled besides the turn itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["intention"] = "intention"
    forecast: bool = True
    """Say, after the action, what the sender foresees to see."""
    reward: bool = False
    """Say also the reward that it foresees, and whether the episode ends."""
    about: tuple[str, ...] | None = None
    """Say what it expects these agents to do; null: all others."""


class LatentCodecSettings(LatentSettings):
    """A few vectors in the place of words."""

    type: Literal["latent"] = "latent"


_TYPES: Mapping[str, type[BaseModel]] = {
    "slots": SlotsSettings,
    "learned": LearnedSettings,
    "raw-state": RawStateSettings,
    "intention": IntentionSettings,
    "latent": LatentCodecSettings,
}


def _in_full(given: Any) -> Any:
    """A name as a mapping; an unknown one is refused with the nearest."""
    if isinstance(given, str):
        if given not in _TYPES:
            expected = ", ".join(repr(known) for known in _TYPES)
            raise PydanticCustomError("unknown_type", "unknown {name}", {"name": repr(given), "expected": expected})
        return {"type": given}
    if isinstance(given, Mapping) and given.get("type") not in _TYPES:
        if "type" not in given:
            raise PydanticCustomError("type_missing", "{said}", {"said": f"needs a type; known: {', '.join(_TYPES)}"})
        said = f"unknown type {given['type']!r}; {nearest(str(given['type']), list(_TYPES))}"
        raise PydanticCustomError("unknown_type", "{said}", {"said": said})
    return given


CodecSettings = Annotated[
    Annotated[
        SlotsSettings | LearnedSettings | RawStateSettings | IntentionSettings | LatentCodecSettings,
        Field(discriminator="type"),
    ],
    BeforeValidator(_in_full),
]
"""What a recipe's `agent.codec` may be."""
