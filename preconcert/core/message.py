"""What agents send each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it left its sender, with its price."""

    sender: str
    recipients: tuple[str, ...]
    payload: str
    """The words, separated by single spaces."""
    bits: float
    """Length in bits: the negative log2 probability of the sampled words under the sender's own model."""
    tokens: int
    """Number of tokens in the payload."""
    sent_at: int
    """Environment step in which it was written."""
