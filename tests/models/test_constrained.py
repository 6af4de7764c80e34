"""The trainer's log-probabilities: right against a naive computation, and equal to those of generation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from preconcert.core import ModelError
from preconcert.models import (
    UNCONSTRAINED,
    UNSCORED,
    ConstrainedOutput,
    GenerateRequest,
    TransformersModel,
    add_constrained_head,
    constrained_logprobs,
    grammar_table,
    route_rows,
)
from tests.models.conftest import two_adapters
from tests.models.test_transformers_model import grammar, requests_of

BATCH, TIME, WIDTH, VOCABULARY = 3, 5, 8, 20


def naive(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, index: Tensor, tokens: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor]:
    logits = functional.linear(hidden, weight, bias) / 0.7
    mask = torch.ones(BATCH, TIME, VOCABULARY, dtype=torch.bool)
    for row in range(BATCH):
        for place in range(TIME):
            if index[row, place] >= 0:
                mask[row, place] = False
                mask[row, place, tokens[allowed[index[row, place]]]] = True
    logps = logits.masked_fill(~mask, -torch.inf).log_softmax(-1)
    own = logps.gather(2, ids[..., None])[..., 0]
    entropy = -(logps.exp() * logps.masked_fill(~mask, 0)).sum(-1)
    scored = index != UNSCORED
    return own.masked_fill(~scored, 0), entropy.masked_fill(~scored, 0)


@pytest.mark.parametrize("kinds", [(0,), (UNCONSTRAINED,), (0, UNCONSTRAINED), (0, UNCONSTRAINED, UNSCORED)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_naive_computation_with_gradients(kinds: tuple[int, ...], with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([2, 3, 7, 11, 12, 19])
    allowed = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0]]).bool()
    index = torch.randint(3, (BATCH, TIME), generator=generator)
    ids = torch.zeros(BATCH, TIME, dtype=torch.long)
    for place in range(BATCH * TIME):
        row, column = divmod(place, TIME)
        kind = kinds[place % len(kinds)]
        if kind == 0:
            ids[row, column] = tokens[allowed[index[row, column]]][-1]
        else:
            index[row, column] = kind
            ids[row, column] = place
    shapes = ((BATCH, TIME, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    outcomes = []
    for function in (naive, lambda *given: constrained_logprobs(*given, temperature=0.7)):
        hidden, weight, bias = (value.clone().requires_grad_(True) for value in values)
        logprobs, entropy = function(hidden, weight, bias if with_bias else None, ids, index, tokens, allowed)
        (logprobs * torch.arange(15.0).view(3, 5) + entropy.square()).sum().backward()
        outcomes.append([logprobs, entropy, hidden.grad, weight.grad] + ([bias.grad] if with_bias else []))
    for one, other in zip(*outcomes, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    forced = index == 2
    assert bool((outcomes[1][0][forced] == 0).all())


def test_all_padding_is_a_differentiable_zero() -> None:
    hidden = torch.randn(1, 2, WIDTH, requires_grad=True)
    index = torch.full((1, 2), UNSCORED)
    logprobs, entropy = constrained_logprobs(
        hidden,
        torch.randn(VOCABULARY, WIDTH),
        None,
        torch.zeros(1, 2).long(),
        index,
        torch.tensor([1]),
        torch.ones(1, 1).bool(),
    )
    (logprobs + entropy).sum().backward()
    assert bool((hidden.grad == 0).all())


def test_a_token_out_of_grammar_is_an_error() -> None:
    with pytest.raises(ModelError, match="token 5 of row 0, position 1"):
        constrained_logprobs(
            torch.randn(1, 2, WIDTH),
            torch.randn(VOCABULARY, WIDTH),
            None,
            torch.tensor([[4, 5]]),
            torch.tensor([[0, 0]]),
            torch.tensor([4, 5]),
            torch.tensor([[True, False]]),
        )


def trainer_batch(requests: list[GenerateRequest], completions: list[tuple[int, ...]]) -> dict[str, object]:
    """Rows as TRL lays them out: prompts padded on the left, completions on the right."""
    before = max(len(request.prompt_ids) for request in requests)
    after = max(len(ids) for ids in completions)
    ids = torch.zeros(len(requests), before + after, dtype=torch.long)
    mask = torch.zeros_like(ids)
    index = torch.full((len(requests), after), UNSCORED)
    automatons = list({id(r.automaton): r.automaton for r in requests if r.automaton is not None}.values())
    tokens, allowed, starts = grammar_table(automatons)
    for row, (request, written) in enumerate(zip(requests, completions, strict=True)):
        start, stop = before - len(request.prompt_ids), before + len(written)
        ids[row, start:stop] = torch.tensor(request.prompt_ids + written)
        mask[row, start:stop] = 1
        index[row, : len(written)] = UNCONSTRAINED
        if request.automaton is not None:
            states = request.automaton.walk(written)[:-1]
            index[row, : len(written)] = torch.tensor(states) + starts[automatons.index(request.automaton)]
    return {
        "input_ids": ids, "attention_mask": mask, "constrained_head": True, "logits_to_keep": after,
        "completion_ids": ids[:, before:], "allowed_index": index, "table_tokens": torch.from_numpy(tokens),
        "table_allowed": torch.from_numpy(allowed),
    }  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("trl", ["without", "before", "after"])
def test_generation_and_training_agree(model: TransformersModel, temperature: float, trl: str) -> None:
    from trl.trainer.utils import add_fused_lm_head

    requests = requests_of(15, temperature=temperature)
    written = model.generate(requests)
    if trl == "before":
        add_fused_lm_head(model.base)
    add_constrained_head(model.model)
    add_constrained_head(model.model)
    if trl == "after":
        add_fused_lm_head(model.base)
    batch = trainer_batch(requests, [completion.ids for completion in written])
    model.model.train()
    with route_rows(model.model, [request.adapter for request in requests]):
        output = model.model(**batch, temperature=temperature)
        assert isinstance(output, ConstrainedOutput)
        output.logprobs.sum().backward()
        if trl != "without":
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            fused = model.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
            )
            assert fused.log_probs.shape == (15, batch["input_ids"].shape[1] - 1)
    for row, completion in enumerate(written):
        found = output.logprobs[row, : len(completion.ids)].detach().numpy()
        assert np.abs(found - completion.logprobs).max() < 1e-5
        assert bool((output.logprobs[row, len(completion.ids) :] == 0).all())
    for name in ("red", "blue"):
        assert any(bool((value.grad != 0).any()) for value in model.adapter_parameters(name).values())
    model.model.eval()
    assert [completion.ids for completion in model.generate(requests)] == [completion.ids for completion in written]
    assert model.base(input_ids=batch["input_ids"]).logits.shape[-1] == model.base.config.vocab_size
    assert "logits_to_keep" in inspect.signature(model.base.forward).parameters


def test_positions_start_after_the_padding(checkpoint: Callable[[str], Path]) -> None:
    """Without that, left padding would shift a model that knows absolute positions."""
    model = TransformersModel.load(checkpoint("llama"))
    add_constrained_head(model.base)
    request = GenerateRequest((3, 4, 5), 0, None, grammar(0, (1, 1)))
    (completion,) = model.generate([request])
    seen: list[Tensor] = []
    hook = model.base.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        model.base(**trainer_batch([request, GenerateRequest((3,) * 9, 0)], [completion.ids, (4,)]))
    hook.remove()
    assert seen[0][0, :10].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 2, 3]


def test_works_through_ddp(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = two_adapters(TransformersModel.load(checkpoint("starter")))
    add_constrained_head(model.model)
    requests = requests_of(6, adapter="red")
    batch = trainer_batch(requests, [completion.ids for completion in model.generate(requests)])
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model.model, find_unused_parameters=True)
        with route_rows(model.model, ["red"] * 6):
            output = wrapped(**batch)
            output.logprobs.sum().backward()
        with route_rows(model.model, ["red"] * 6), torch.no_grad():
            assert torch.equal(model.model(**batch).logprobs, output.logprobs)
    finally:
        torch.distributed.destroy_process_group()
    assert all(value.grad is not None for value in model.adapter_parameters("red").values())
