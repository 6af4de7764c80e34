"""The contract test finds backends that break it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from preconcert.core import ModelError
from preconcert.models import Completion, GenerateRequest, ScoreRequest, TransformersModel, check_backend
from tests.models.checkpoints import WORDS


class Seedless(TransformersModel):
    """Its tokens depend on how often it was asked."""

    calls = 0

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.calls += 1
        return super().generate([replace(request, seed=request.seed + self.calls) for request in requests])


class AdapterBlind(TransformersModel):
    """Scores everything with the base model."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[float, ...]]:
        return super().score([replace(request, adapter=None) for request in requests])


class Unmasked(TransformersModel):
    """Reports log-probabilities without the grammar's mask."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[float, ...]]:
        return super().score([replace(request, automaton=None) for request in requests])


class Endless(TransformersModel):
    """Does not say when the length ran out."""

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        return super().generate([replace(request, max_tokens=40) for request in requests])


@pytest.mark.parametrize(
    ("broken", "rule"),
    [(Seedless, "fresh adapter"), (AdapterBlind, "loaded adapter"), (Unmasked, "those of score"), (Endless, "the end")],
)
def test_broken_backends_are_named(
    checkpoint: Callable[[str], Path], broken: type[TransformersModel], rule: str
) -> None:
    model = broken.load(checkpoint("starter"))
    with pytest.raises(ModelError, match=f"broken rule: .*{rule}"):
        check_backend(model, WORDS)
    assert model.adapters == ()


def test_words_must_do(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="four words"):
        check_backend(TransformersModel.load(checkpoint("starter")), ["north", "north", "south"])
