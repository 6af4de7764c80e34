"""What the tests of vLLM share: a checkpoint that knows a task's words, adapters with codecs, requests of all kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from preconcert.core import Latent
from preconcert.envs import make_env
from preconcert.models import (
    Completion,
    GenerateRequest,
    LatentSettings,
    LoraSettings,
    Placed,
    StarterSettings,
    TransformersModel,
    build_starter,
)
from preconcert.prompts import starter_words
from preconcert.prompts.automaton import Automaton, AutomatonBuilder
from tests.models.checkpoints import WORDS
from tests.models.conftest import two_adapters

LORA = LoraSettings(r=4)
TASK = "rendezvous"
LATENT = LatentSettings(tokens=2, dims=3, levels=5)


def build_base(folder: Path) -> Path:
    """A starter with heads of 16 numbers, which vLLM does not take as they are."""
    env: Any = make_env(TASK, {}, 0)
    words = [*WORDS, *starter_words(env.words, env.language, env.agents)]
    return build_starter(words, folder / "base", 0, StarterSettings(layers=2, width=64))


def build_reference(base: Path, folder: Path) -> TransformersModel:
    """The same in transformers, with adapters `red` and `blue`, their codecs, and their folders."""
    model = two_adapters(TransformersModel.load(base, LORA))
    for seed, name in enumerate(("red", "blue")):
        model.add_codec(name, LATENT, seed)
        model.save_adapter(name, folder / name)
    return model


def grammars(tokenizer: Any) -> tuple[Automaton, ...]:
    """Of one length, of several lengths, with forced words between, without a last word, and without a choice."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    north, south, east, west, red = (ids(word) for word in ("north", "south", "east", "west", "red"))
    found: list[Automaton] = []
    one = AutomatonBuilder()
    one.literal(red)
    one.choice([north, south, east, west])
    one.literal(red + north)
    one.choice([north, east])
    one.literal((tokenizer.eos_token_id,))
    found.append(one.build())
    many = AutomatonBuilder()
    many.choice([north, south + west, east], skips={north: 2})
    many.literal(red)
    many.choice([north, south, red])
    many.choice([red + red + north, west])
    found.append(many.build())
    only = AutomatonBuilder()
    only.literal(north + south + (tokenizer.eos_token_id,))
    found.append(only.build())
    return tuple(found)


def requests(model: TransformersModel, number: int, latents: bool = False) -> list[GenerateRequest]:
    """Prompts of all lengths, some alike but for the seed; grammars, temperatures, limits, watched states, adapters."""
    rng = np.random.default_rng(7)
    known = grammars(model.tokenizer)
    words = [int(i) for i in model.tokenizer.encode(" ".join(WORDS), add_special_tokens=False)]
    shared = tuple(int(i) for i in rng.choice(words, size=70))
    found: list[GenerateRequest] = []
    for index in range(number):
        length = int(rng.integers(1, 30))
        prompt = (shared, shared[:40], ())[index % 3] + tuple(int(i) for i in rng.choice(words, size=length))
        if index % 5 == 4:
            prompt = found[-1].prompt_ids
        adapter = ("red", "blue", None)[int(rng.integers(3 - latents))]
        automaton = (None, *known)[int(rng.integers(4))]
        placed: tuple[Placed, ...] = ()
        if latents:
            values = tuple(tuple(float(v) for v in rng.choice([-1, -0.5, 0, 0.5, 1], size=3)) for _ in range(2))
            placed = (Placed(int(rng.integers(max(1, len(prompt) - 2))), Latent(values, 5)),)
            prompt = (*prompt, words[0], words[1])
        found.append(
            GenerateRequest(
                prompt,
                seed=int(rng.integers(2**62)),
                adapter=adapter,
                automaton=automaton,
                max_tokens=int(rng.integers(1, 12)),
                temperature=float(rng.choice([0.0, 0.7, 1.0, 1.6])),
                watch=frozenset(range(automaton.size)[index % 2 :: 2]) if automaton is not None else frozenset(),
                latents=placed,
            )
        )
    return found


def distance(one: list[Completion], other: list[Completion]) -> float:
    """Largest difference between log-probabilities in nats; everything else must be the same."""
    worst = 0.0
    for first, second in zip(one, other, strict=True):
        assert (first.ids, first.sampled, first.ended) == (second.ids, second.sampled, second.ended)
        assert [(w.position, w.state, w.tokens) for w in first.watched] == [
            (w.position, w.state, w.tokens) for w in second.watched
        ]
        pairs = [(first.logprobs, second.logprobs)]
        pairs += [(a.logprobs, b.logprobs) for a, b in zip(first.watched, second.watched, strict=True)]
        worst = max([worst, *(float(np.abs(np.subtract(a, b)).max(initial=0.0)) for a, b in pairs)])
    return worst
