"""Whole distributions of the next token, the same bits whoever asks: what a shared prior is made of.

Parts: `NextRequest`, the protocol `NextTokenModel`, and `next_logprobs`, which computes them for a transformers model.

Two sides that code with a model's probabilities must hold the very same numbers, but a matrix product rounds
differently for other shapes, and decoding batches have the shapes that happen to come together. So nothing here depends
on the call: every forward pass has a fixed number of rows (by the model's size), a width that follows from the
request's own length, one adapter, no cache and no mask but the causal one, and no row's numbers depend on what is in
the others or behind its own end. That this is so is a rule of the contract test (`check.py`), to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from preconcert.core import ModelError
from preconcert.models.decoding import Head
from preconcert.models.reading import block_of
from preconcert.models.routing import route_rows

_STEP = 8
"""Widths are multiples of this."""
_ROWS = ((1 << 20, 64), (1 << 24, 16), (1 << 28, 4))
"""Rows of a pass for models of up to so many parameters; larger ones take one row."""


@dataclass(frozen=True, slots=True)
class NextRequest:
    """A text whose next token is asked for."""

    prompt_ids: tuple[int, ...]
    """The whole context."""
    adapter: str | None = None
    """The adapter's name; None for the base model."""
    tokens: tuple[int, ...] | None = None
    """Probabilities are taken among these tokens; None for the whole vocabulary."""


@runtime_checkable
class NextTokenModel(Protocol):
    """A language model that says what it expects, reproducibly. Not every backend can."""

    def next_logprobs(self, requests: Sequence[NextRequest]) -> list[NDArray[np.float64]]:
        """Natural log-probabilities of each request's next token, at temperature 1.

        A request's numbers are the same bits whatever else is in the call, in every process on the same kind of machine
        with the same weights, library versions and number of threads. Other machines may round otherwise.

        Returns:
            Per request an array with one number per token asked for, or per token of the vocabulary.

        Raises:
            ModelError: an unknown adapter, an empty prompt or choice, or a context longer than the model takes.
        """
        ...


def rows_of(base: PreTrainedModel) -> int:
    """How many rows a forward pass has: as many as pay off for a model of this size."""
    size = sum(parameter.numel() for name, parameter in base.named_parameters() if "lora_" not in name)
    return next((rows for limit, rows in _ROWS if size <= limit), 1)


def next_logprobs(
    base: PreTrainedModel, head: Head, rows: int, longest: int, requests: Sequence[NextRequest]
) -> list[NDArray[np.float64]]:
    """As `NextTokenModel.next_logprobs`, for requests whose adapters and lengths are known to be right.

    Args:
        base: the causal language model, peft's layers inside.
        head: its projection.
        rows: of every pass, from `rows_of`.
        longest: context in tokens that the model takes; no pass is wider.
        requests: what is asked.

    Raises:
        ModelError: a choice among no tokens.
    """
    groups: dict[tuple[str | None, int], dict[tuple[int, ...], list[int]]] = {}
    for index, request in enumerate(requests):
        if request.tokens is not None and not request.tokens:
            raise ModelError("there are no tokens to choose from")
        width = min(-(-len(request.prompt_ids) // _STEP) * _STEP, longest)
        groups.setdefault((request.adapter, width), {}).setdefault(request.prompt_ids, []).append(index)
    answers: dict[int, NDArray[np.float64]] = {}
    for (adapter, width), prompts in groups.items():
        unique = list(prompts)
        for start in range(0, len(unique), rows):
            some = unique[start : start + rows]
            hidden = _last_hidden(base, some, adapter, rows, width)
            free = None
            if any(requests[index].tokens is None for prompt in some for index in prompts[prompt]):
                free = _logprobs(hidden, head, None)
            for row, prompt in enumerate(some):
                for index in prompts[prompt]:
                    tokens = requests[index].tokens
                    if tokens is None:
                        assert free is not None
                        answers[index] = free[row]
                    else:
                        answers[index] = _logprobs(hidden[row : row + 1], head, tokens)[0]
    return [answers[index] for index in range(len(requests))]


def _last_hidden(
    base: PreTrainedModel, prompts: Sequence[tuple[int, ...]], adapter: str | None, rows: int, width: int
) -> Float[Tensor, "rows width"]:
    """The last hidden state of each prompt, from a pass of exactly this shape."""
    block, lengths = block_of([*prompts, *[(0,)] * (rows - len(prompts))])
    padded = np.zeros((rows, width), dtype=np.int64)
    padded[:, : block.shape[1]] = block
    device = base.get_input_embeddings().weight.device
    with route_rows(base, [adapter] * rows):
        hidden = base.base_model(
            input_ids=torch.from_numpy(padded).to(device), use_cache=False
        ).last_hidden_state
    return hidden[torch.arange(rows, device=device), torch.from_numpy(lengths - 1).to(device)]


def _logprobs(
    hidden: Float[Tensor, "rows width"], head: Head, tokens: tuple[int, ...] | None
) -> Float[np.ndarray, "rows tokens"]:
    weight, bias = head.weight, head.bias
    if tokens is not None:
        columns = torch.tensor(tokens, device=weight.device)
        weight, bias = weight[columns], None if bias is None else bias[columns]
    logits = head.scale.apply(functional.linear(hidden, weight, bias).float())
    found: NDArray[np.float64] = logits.double().log_softmax(-1).cpu().numpy()
    return found
