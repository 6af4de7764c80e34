"""Seeds as values: derivation by hashing, and counter-based uniforms. No global random state."""

from __future__ import annotations

import hashlib
import operator

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any sequence of integers and strings.

    Equal parts give equal seeds on every machine and in every process; different parts give unrelated ones.
    """
    text = "\x1f".join(_tagged(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def uniforms(seeds: NDArray[np.uint64], counter: int | NDArray[np.uint64]) -> NDArray[np.float64]:
    """One uniform in (0, 1) per seed at position `counter` (splitmix64, Steele et al. 2014).

    The value depends on the seed and the counter alone, never on the batch around it, so a sampled token does not
    change when other rows join or leave.

    Args:
        seeds: shape (rows,).
        counter: the position in each row's stream, one for all or shape (rows,).
    """
    with np.errstate(over="ignore"):
        z = np.asarray(seeds, dtype=np.uint64) + (np.asarray(counter, dtype=np.uint64) + np.uint64(1)) * _GAMMA
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    # 52 bits: with 53 the half would round the largest value up to exactly 1.
    uniform: NDArray[np.float64] = ((z >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return uniform


def _tagged(part: int | str) -> str:
    """One part as text that no other part gives: enum members and numpy integers count as what they equal."""
    if isinstance(part, str):
        return "str:" + str.__str__(part).replace("\\", "\\\\").replace("\x1f", "\\x1f")
    return f"int:{int(operator.index(part))}"
