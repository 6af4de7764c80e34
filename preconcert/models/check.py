"""The contract test of a language-model backend: run it on your own.

    check_backend(model, words=["north", "south", "east", "west"])

It uses the protocol alone. The model should compute in float32; the bounds below are too tight for less.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from preconcert.core import ModelError, derive_seed
from preconcert.models.language_model import (
    ChoiceRequest,
    Completion,
    CompletionEnd,
    GenerateRequest,
    LanguageModel,
    ScoreRequest,
)
from preconcert.models.next_token import NextRequest, NextTokenModel
from preconcert.prompts.automaton import Automaton, AutomatonBuilder

_FRESH, _FIRST, _SECOND, _COPY, _BACK = "check-fresh", "check-first", "check-second", "check-copy", "check-back"
_TOLERANCE = 1e-4
"""Largest difference between log-probabilities that should be equal, in nats."""


def check_backend(model: LanguageModel, words: Sequence[str], seed: int = 0) -> list[str]:
    """Put a backend through every rule of the protocol.

    Adds five adapters whose names start with `check-`, and removes them if the backend has a `delete_adapter`.

    Args:
        model: the backend, in float32.
        words: at least four words that its tokenizer knows; prompts and grammars are made of them.
        seed: of the prompts and samples.

    Returns:
        The rules that were checked, in words.

    Raises:
        ModelError: the first rule that is broken.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            check = _Check(model, words, seed, Path(folder))
            rules: list[tuple[str, Callable[[], None]]] = [
                ("an empty prompt and an unknown adapter are ModelErrors", check.errors),
                ("a fresh adapter equals the base model", check.fresh),
                ("a loaded adapter changes the model, and two differ", check.loaded),
                ("a copied adapter equals its source", check.copied),
                ("a saved adapter comes back the same", check.round_trip),
                ("the same seed gives the same tokens, whatever the order and the batch", check.batches),
                ("a batch of mixed adapters equals batches of one adapter", check.mixed),
                ("log-probabilities of generate equal those of score", check.scores),
                ("watching changes nothing, and what is watched is what score says", check.watches),
                ("choices are what score says, divided by their sum", check.choices),
                ("temperature 0 takes the most likely token", check.greedy),
                ("forced tokens have log-probability 0 and are not sampled", check.forced),
                ("the end of a completion is what it says", check.ends),
                ("sessions change nothing", check.sessions),
            ]
            if isinstance(model, NextTokenModel):
                rules.append(("the next token is what score says, the same bits in every call", check.next_tokens))
            for rule, run in rules:
                try:
                    run()
                except _BrokenError as broken:
                    raise ModelError(f"broken rule: {rule}: {broken}") from None
        finally:
            for name in (_FRESH, _FIRST, _SECOND, _COPY, _BACK):
                if hasattr(model, "delete_adapter") and name in model.adapters:
                    model.delete_adapter(name)
    return [rule for rule, _ in rules]


class _BrokenError(Exception):
    pass


class _Check:
    def __init__(self, model: LanguageModel, words: Sequence[str], seed: int, folder: Path) -> None:
        self.model, self.folder, self.seed = model, folder, seed
        self.texts = [tuple(model.tokenizer.encode(f" {word}", add_special_tokens=False)) for word in words]
        options: list[tuple[int, ...]] = []
        for ids in self.texts:
            if not any(ids[: len(other)] == other[: len(ids)] for other in options):
                options.append(ids)
        self.eos = int(model.tokenizer.eos_token_id)
        if len(options) < 4 or any(self.eos in ids for ids in options):
            raise ModelError(f"the contract test needs four words, none the beginning of another, not {list(words)}")
        self.rng = np.random.default_rng(seed)
        self.options = (*options[:3], options[3] + options[0])
        self.grammars = [_grammar(options, 1, self.eos), _grammar(options[::-1], 2, self.eos)]
        for number, name in enumerate((_FRESH, _FIRST, _SECOND)):
            model.add_adapter(name, seed=derive_seed(seed, name))
            if number:
                place = folder / name
                model.save_adapter(name, place)
                _disturb(place, derive_seed(seed, "disturb", name))
                model.load_adapter(name, place)
        self.names: list[str | None] = [None, _FIRST, _SECOND]

    def request(self, number: int, **changes: object) -> GenerateRequest:
        length = 3 + number % 5
        prompt = sum((self.texts[int(i)] for i in self.rng.integers(len(self.texts), size=length)), ())
        automaton = (None, self.grammars[0], self.grammars[1])[number // 3 % 3]
        plain = GenerateRequest(prompt, derive_seed(self.seed, number), self.names[number % 3], automaton, 40)
        return replace(plain, **changes)  # type: ignore[arg-type]

    def errors(self) -> None:
        for request in (self.request(0, prompt_ids=()), self.request(0, adapter="check-nobody")):
            try:
                self.model.generate([request])
            except ModelError:
                continue
            raise _BrokenError("nothing was raised")

    def fresh(self) -> None:
        requests = [self.request(number, adapter=None) for number in range(9)]
        self.equal(requests, [replace(request, adapter=_FRESH) for request in requests])

    def loaded(self) -> None:
        request = self.request(0)
        texts = [ScoreRequest(request.prompt_ids, self.texts[0] + self.texts[1], name) for name in self.names]
        scores = self.model.score(texts)
        for one, other in ((0, 1), (0, 2), (1, 2)):
            if np.abs(np.subtract(scores[one], scores[other])).max() < _TOLERANCE:
                raise _BrokenError(f"adapters {self.names[one]!r} and {self.names[other]!r} score alike")

    def copied(self) -> None:
        self.model.add_adapter(_COPY, seed=1, source=_FIRST)
        requests = [self.request(number, adapter=_FIRST) for number in range(9)]
        self.equal(requests, [replace(request, adapter=_COPY) for request in requests])

    def round_trip(self) -> None:
        self.model.save_adapter(_SECOND, self.folder / "saved")
        self.model.load_adapter(_BACK, self.folder / "saved")
        requests = [self.request(number, adapter=_SECOND) for number in range(9)]
        self.equal(requests, [replace(request, adapter=_BACK) for request in requests])

    def batches(self) -> None:
        requests = [self.request(number) for number in range(18)]
        whole = self.model.generate(requests)
        self.same(requests, whole, self.model.generate(requests))
        self.same(requests[::-1], whole[::-1], self.model.generate(requests[::-1]))
        self.same(requests[4:7], whole[4:7], self.model.generate(requests[4:7]))
        self.same(requests, whole, [self.model.generate([request])[0] for request in requests])

    def mixed(self) -> None:
        requests = [self.request(number) for number in range(18)]
        whole = self.model.generate(requests)
        for name in self.names:
            places = [place for place, request in enumerate(requests) if request.adapter == name]
            own = [requests[place] for place in places]
            self.same(own, [whole[place] for place in places], self.model.generate(own))

    def scores(self) -> None:
        requests = [self.request(number) for number in range(18)]
        written = self.model.generate(requests)
        scored = self.model.score(
            [
                ScoreRequest(request.prompt_ids, completion.ids, request.adapter, request.automaton)
                for request, completion in zip(requests, written, strict=True)
            ]
        )
        for request, completion, logprobs in zip(requests, written, scored, strict=True):
            _close(request, completion.logprobs, logprobs)

    def watches(self) -> None:
        plain = [self.request(number, temperature=0.7 + 0.1 * number) for number in range(18)]
        requests = [
            replace(one, watch=frozenset(range(one.automaton.size)[number % 2 :: 2])) if one.automaton else one
            for number, one in enumerate(plain)
        ]
        completions = self.model.generate(requests)
        self.same(plain, self.model.generate(plain), completions)
        scored: list[ScoreRequest] = []
        reported: list[float] = []
        for request, completion in zip(requests, completions, strict=True):
            if request.automaton is None:
                wanted = []
            else:
                states = request.automaton.walk(completion.ids)[:-1]
                wanted = [
                    (position, state, tuple(sorted(request.automaton.transitions[state])))
                    for position, state in enumerate(states)
                    if state in request.watch and len(request.automaton.transitions[state]) > 1
                ]
            found = [(one.position, one.state, one.tokens) for one in completion.watched]
            if found != wanted:
                raise _BrokenError(f"{found} was reported and {wanted} watched for {_describe(request)}")
            for one in completion.watched:
                for token, logprob in zip(one.tokens, one.logprobs, strict=True):
                    ids = (*completion.ids[: one.position], token)
                    scored.append(ScoreRequest(request.prompt_ids, ids, request.adapter, request.automaton))
                    reported.append(logprob)
        if not scored:
            raise _BrokenError("nothing was reported")
        wanted_logprobs = [logprobs[-1] for logprobs in self.model.score(scored)]
        _close(requests[0], reported, wanted_logprobs)

    def choices(self) -> None:
        single = tuple(ids for ids in self.texts if len(ids) == 1)
        requests = [self.request(number) for number in range(9)]
        asked = [
            ChoiceRequest(request.prompt_ids, options, request.adapter)
            for request in requests
            for options in (self.options, self.options[::-1], tuple(dict.fromkeys(single)))
            if options
        ]
        flat = [ScoreRequest(one.prompt_ids, option, one.adapter) for one in asked for option in one.options]
        scores = iter([sum(logprobs) for logprobs in self.model.score(flat)])
        for one, found in zip(asked, self.model.choose(asked), strict=True):
            sums = np.array([next(scores) for _ in one.options])
            wanted = (sums - np.logaddexp.reduce(sums)).tolist()
            if len(found) != len(wanted) or np.abs(np.subtract(found, wanted)).max() > _TOLERANCE:
                raise _BrokenError(f"{found} where {wanted} is true for a prompt of {len(one.prompt_ids)} tokens")
        prompt = requests[0].prompt_ids
        for options in ((), ((),), (self.options[0], self.options[0])):
            try:
                self.model.choose([ChoiceRequest(prompt, options)])
            except ModelError:
                continue
            raise _BrokenError(f"nothing was raised for the options {options}")

    def greedy(self) -> None:
        requests = [self.request(number, temperature=0.0) for number in range(9)]
        first = self.model.generate(requests)
        self.same(requests, first, self.model.generate([replace(r, seed=r.seed + 1) for r in requests]))
        for request, completion in zip(requests, first, strict=True):
            if request.automaton is None:
                continue
            states = request.automaton.walk(completion.ids)
            place = max(i for i, sampled in enumerate(completion.sampled) if sampled)
            before = completion.ids[:place]
            options = [
                ScoreRequest(request.prompt_ids, (*before, token), request.adapter, request.automaton)
                for token in request.automaton.transitions[states[place]]
            ]
            best = max(logprobs[-1] for logprobs in self.model.score(options))
            if best > completion.logprobs[place] + _TOLERANCE:
                raise _BrokenError(f"a token with log-probability {best} was passed over for {_describe(request)}")

    def forced(self) -> None:
        requests = [self.request(number) for number in range(18)]
        for request, completion in zip(requests, self.model.generate(requests), strict=True):
            if request.automaton is None:
                if not all(completion.sampled):
                    raise _BrokenError(f"a free token is not marked as sampled for {_describe(request)}")
                continue
            states = request.automaton.walk(completion.ids)[:-1]
            for state, logprob, sampled in zip(states, completion.logprobs, completion.sampled, strict=True):
                choice = len(request.automaton.transitions[state]) > 1
                if choice != sampled or (not choice and logprob != 0):
                    raise _BrokenError(f"sampled={sampled}, log-probability {logprob} for {_describe(request)}")

    def ends(self) -> None:
        requests = [self.request(number, max_tokens=1 + number % 6, temperature=1.5) for number in range(36)]
        requests += [self.request(number, max_tokens=40, temperature=1.5) for number in range(18)]
        for request, completion in zip(requests, self.model.generate(requests), strict=True):
            finished = request.automaton is not None and request.automaton.is_final(
                request.automaton.walk(completion.ids)[-1]
            )
            if not len(completion.ids) == len(completion.logprobs) == len(completion.sampled) <= request.max_tokens:
                raise _BrokenError(f"{len(completion.ids)} tokens for {_describe(request)}")
            expected = CompletionEnd.GRAMMAR if finished else CompletionEnd.LENGTH
            if request.automaton is None and self.eos in completion.ids:
                expected = CompletionEnd.EOS
                if completion.ids.index(self.eos) != len(completion.ids) - 1 or completion.logprobs[-1] == 0:
                    raise _BrokenError(f"tokens after the end, or an end without a price, for {_describe(request)}")
            full = len(completion.ids) == request.max_tokens
            if completion.ended != expected or (expected == CompletionEnd.LENGTH and not full):
                raise _BrokenError(
                    f"ended {completion.ended} after {len(completion.ids)} tokens where {expected} is true for "
                    f"{_describe(request)}"
                )

    def sessions(self) -> None:
        requests = [self.request(number, session=f"check-{number}") for number in range(9)]
        for turn in range(3):
            held = self.model.generate(requests)
            self.same(requests, self.model.generate([replace(r, session=None) for r in requests]), held)
            requests = [
                replace(request, prompt_ids=request.prompt_ids + one.ids + self.texts[turn], seed=request.seed + 1)
                for request, one in zip(requests, held, strict=True)
            ]
            requests = requests[1:][::-1] if turn else requests
        for number in range(9):
            self.model.close_session(f"check-{number}")
        self.model.close_session("check-nobody")

    def next_tokens(self) -> None:
        assert isinstance(self.model, NextTokenModel)
        some = tuple(dict.fromkeys(ids[0] for ids in self.texts))
        prompts = [self.request(number) for number in range(18)]
        # Longer and shorter ones in between, so that rows change places and company.
        requests = [
            NextRequest(one.prompt_ids * (1 + number % 3), one.adapter, (None, some, some[:2])[number // 3 % 3])
            for number, one in enumerate(prompts)
        ]
        whole = self.model.next_logprobs(requests)
        parts = [self.model.next_logprobs(requests[::-1])[::-1], [self.model.next_logprobs([r])[0] for r in requests]]
        if not all(np.array_equal(one, other) for part in parts for one, other in zip(whole, part, strict=True)):
            raise _BrokenError("another call gave other bits")
        asked: list[ScoreRequest] = []
        for request in requests:
            grammar = None
            if request.tokens is not None:
                builder = AutomatonBuilder()
                builder.choice([(token,) for token in request.tokens])
                grammar = builder.build()
            asked += [ScoreRequest(request.prompt_ids, (token,), request.adapter, grammar) for token in some[:2]]
        scores = [logprobs[0] for logprobs in self.model.score(asked)]
        found = [
            float(row[token if request.tokens is None else request.tokens.index(token)])
            for request, row in zip(requests, whole, strict=True)
            for token in some[:2]
        ]
        _close(prompts[0], found, scores)

    def equal(self, one: list[GenerateRequest], other: list[GenerateRequest]) -> None:
        self.same(one, self.model.generate(one), self.model.generate(other))

    def same(self, requests: list[GenerateRequest], one: list[Completion], other: list[Completion]) -> None:
        for request, first, second in zip(requests, one, other, strict=True):
            if (first.ids, first.sampled, first.ended) != (second.ids, second.sampled, second.ended):
                raise _BrokenError(f"tokens {first.ids} and {second.ids} for {_describe(request)}")
            _close(request, first.logprobs, second.logprobs)


def _grammar(options: list[tuple[int, ...]], forced: int, eos: int) -> Automaton:
    """Forced first tokens, three choices with forced words between them, and the end."""
    builder = AutomatonBuilder()
    builder.literal(options[0] * forced)
    for number in range(3):
        builder.choice(options[: 3 + number % 2])
        builder.literal(options[number] * (1 + (number + forced) % 3))
    builder.literal([eos])
    return builder.build()


def _disturb(folder: Path, seed: int) -> None:
    """Give a fresh adapter's file weights that change the model."""
    generator = torch.Generator().manual_seed(seed)
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    for key in sorted(state):
        if "lora_B" in key:
            state[key] = (0.05 * torch.randn(state[key].shape, generator=generator)).to(state[key].dtype)
    save_file(state, file, metadata={"format": "pt"})


def _close(request: GenerateRequest, one: Sequence[float], other: Sequence[float]) -> None:
    worst = float(np.abs(np.subtract(one, other)).max(initial=0.0))
    if not worst <= _TOLERANCE:
        raise _BrokenError(f"log-probabilities differ by {worst:.2g} for {_describe(request)}")


def _describe(request: GenerateRequest) -> str:
    grammar = "free" if request.automaton is None else "constrained"
    return f"adapter {request.adapter!r}, {grammar}, prompt of {len(request.prompt_ids)} tokens"
