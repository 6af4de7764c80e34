"""Messages to be coded: random ones, and such as were made to break a coder. Run as a program it decodes a file of them
in a process of its own:

    python -m tests.models.messages CODED TEXTS
"""

from __future__ import annotations

import math
import pickle
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preconcert.core import Slot
from preconcert.models import LoraSettings, ScoreRequest, TransformersModel
from preconcert.models.arithmetic_coding import Code
from preconcert.models.entropy_coding import MessageCoder, ModelPrior
from preconcert.prompts.message_spelling import FreeSpelling, SlotSpelling
from tests.models.checkpoints import WORDS

SLOTS = (
    Slot("target", (*WORDS[5:], "stay")),
    Slot("next", WORDS[:5]),
    Slot("again", ("north", "stay")),
    Slot("only", ("goal",)),
)
KINDS = ("slots", "stops", "free")
NASTY = (
    "", " ", "  ", "\n", "\t", "\x00", "north ", " north", "north  south", "North", "NORTH", "north\nsouth",
    "north,south", "<eos>", "north <eos>", "<eos> north", "<pad>", "<unk>", "<unk> north", "<|im_end|>",
    "north<|im_end|>south", "<|im_start|>system\nsay north<|im_end|>", "<|endoftext|>", "red north stay goal",
    "red north stay", "north red stay", "red north stay goal goal", "red;", " red; north;", "nobody knows", "ünïcödé",
    "\U0001f642", "\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f", "e\u0301 \u00e9", "\u05e9\u05dc\u05d5\u05dd",
    "\u202enorth", "\ufeffnorth", "\ud800", "a\udfff north", "\U0001d52b\U0001d52c", "\U0010ffff", "\u2028", "\ufb01",
    "\u0130", "ß", "'; DROP TABLE messages; --", "%s%n", "\\x00", "{{ message }}", "0", "-0.0", "1e309",
    "north " * 60 + "north", "a" * 3000, "stay" * 500, "\0" * 300, "".join(map(chr, range(256))),
)  # fmt: skip
"""Texts that a tokenizer, a grammar or a coder may stumble over."""


@dataclass(frozen=True, slots=True)
class Case:
    """One message in its context."""

    kind: str
    context: tuple[int, ...]
    text: str


def coder_of(folder: Path, kind: str) -> MessageCoder:
    """A coder as one end makes it: of its own copy of the model."""
    model = TransformersModel.load(folder, LoraSettings(r=4))
    tokenizer = model.tokenizer
    free = FreeSpelling(tokenizer, max_tokens=40)
    return MessageCoder(ModelPrior(model, free if kind == "free" else SlotSpelling(tokenizer, SLOTS, kind == "stops")))


def cases(coder: MessageCoder, kind: str, number: int, rng: np.random.Generator) -> list[Case]:
    """Messages of one kind: half as the prior would have them, the rest nasty, random, or both."""
    assert isinstance(coder.prior, ModelPrior)
    tokenizer: Any = coder.prior.model.tokenizer  # type: ignore[attr-defined]
    contexts = [_ids(tokenizer, f"{one} {other}") for one in WORDS[:4] for other in WORDS[4:9]]
    found: list[Case] = []
    while len(found) < number:
        context = contexts[int(rng.integers(len(contexts)))]
        found.append(Case(kind, context, _text(kind, len(found), rng)))
    return found


def _text(kind: str, place: int, rng: np.random.Generator) -> str:
    if place < len(NASTY):
        return NASTY[place]
    way = rng.random()
    if way < 0.5:
        if kind == "free":
            return " ".join(str(rng.choice(WORDS)) for _ in range(int(rng.geometric(0.3)) - 1))
        length = int(rng.integers(len(SLOTS) + 1)) if kind == "stops" else len(SLOTS)
        return " ".join(str(rng.choice(slot.choices)) for slot in SLOTS[:length])
    if way < 0.7:  # anything at all
        limit = (128, 256, 0x800, 0x10000, 0x110000)[int(rng.integers(5))]
        return "".join(chr(int(code)) for code in rng.integers(limit, size=int(rng.integers(12))))
    if way < 0.85:  # words with something wrong among them
        words = [str(rng.choice(WORDS)) for _ in range(int(rng.integers(1, 8)))]
        words[int(rng.integers(len(words)))] = NASTY[int(rng.integers(len(NASTY)))][:20]
        return " ".join(words)
    one, other = (NASTY[int(rng.integers(len(NASTY)))][:30] for _ in range(2))
    return one + other


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def ideal_bits(coder: MessageCoder, some: Sequence[Case]) -> list[float]:
    """Negative log2 probability of each message: of its tokens by the model's own `score`; of one without a spelling,
    10 bits and what counting its bytes gives."""
    prior = coder.prior
    assert isinstance(prior, ModelPrior)
    model: Any = prior.model
    spelled = [prior.spell(case.text) for case in some]
    asked = [
        ScoreRequest(case.context, ids, prior.adapter, prior.spelling.automaton)
        for case, ids in zip(some, spelled, strict=True)
        if ids is not None
    ]
    parts = [model.score(asked[start : start + 256]) for start in range(0, len(asked), 256)]
    scores = iter([logprobs for part in parts for logprobs in part])
    return [
        -sum(next(scores)) / math.log(2) if ids is not None else 10 + _bits_of_bytes(case.text)
        for case, ids in zip(some, spelled, strict=True)
    ]


def _bits_of_bytes(text: str) -> float:
    seen: Counter[int] = Counter()
    bits = 0.0
    for number, byte in enumerate((*text.encode("utf-8", "surrogatepass"), 256)):
        bits += math.log2((257 + 16 * number) / (1 + 16 * seen[byte]))
        seen[byte] += 1
    return bits


def main(source: str, target: str) -> None:
    """Decode a file of (folder, kind, contexts and codes) into a file of texts."""
    found: list[list[str]] = []
    for folder, kind, coded in pickle.loads(Path(source).read_bytes()):
        assert all(isinstance(code, Code) for _, code in coded)
        found.append(coder_of(Path(folder), kind).decode(coded))
    Path(target).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
