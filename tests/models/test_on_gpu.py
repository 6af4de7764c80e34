"""The embedded backend on a GPU: the contract, and batches of mixed adapters beside the CPU's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from preconcert.models import GenerateRequest, LoraSettings, ScoreRequest, TransformersModel, check_backend
from tests.models.checkpoints import WORDS
from tests.models.conftest import two_adapters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """TF32 rounds to ten bits, which is more than the contract allows."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_the_contract(checkpoint: Callable[[str], Path], kind: str) -> None:
    model = TransformersModel.load(checkpoint(kind), LoraSettings(r=4), "float32", "cuda")
    assert model.device.type == "cuda"
    assert check_backend(model, WORDS)
    assert model.adapters == ()


def test_mixed_adapters_as_on_the_cpu(checkpoint: Callable[[str], Path], kind: str) -> None:
    """Every row goes through its own adapter: greedy tokens are the same, log-probabilities nearly."""
    models = [
        two_adapters(TransformersModel.load(checkpoint(kind), LoraSettings(r=4), "float32", device))
        for device in ("cpu", "cuda")
    ]
    cpu = models[0]
    prompts = [tuple(cpu.tokenizer.encode(" ".join(WORDS[place : place + 4]))) for place in range(6)]
    names = (None, "red", "blue")
    asked = [
        GenerateRequest(prompt, number, name, max_tokens=12, temperature=0.0)
        for number, prompt in enumerate(prompts)
        for name in names
    ]
    wanted, found = (model.generate(asked) for model in models)
    assert [each.ids for each in found] == [each.ids for each in wanted]
    texts = [
        ScoreRequest(each.prompt_ids, completion.ids, name)
        for each, completion in zip(asked, wanted, strict=True)
        for name in names
    ]
    on_cpu, on_gpu = (model.score(texts) for model in models)
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert other == pytest.approx(one, abs=1e-4)
    assert len(set(on_cpu[:3])) == 3, "the adapters must matter"
