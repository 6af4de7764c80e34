"""Does a model decode here as its own forward pass says?

Decoding projects hidden states itself, keeps its own cache and reads rows of different lengths side by side. An
architecture that scales its logits in a way of its own, keeps another kind of state than keys and values, or counts
positions by columns would write other tokens than it means, and nothing else would show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel

from preconcert.core import ModelError
from preconcert.models.language_model import GenerateRequest

if TYPE_CHECKING:
    from preconcert.models.transformers_model import TransformersModel

_LENGTHS = (7, 2, 4)
"""Tokens of the prompts, which are read side by side."""
_NEW = 3
_EXACT, _ROUNDED = 0.02, 0.5
"""Nats by which log-probabilities may differ in float32, and in a shorter type."""


def check_decoding(model: TransformersModel) -> None:
    """Let a model write a few tokens after random prompts, and compare.

    Raises:
        ModelError: their log-probabilities are not those of the model's own forward pass.
    """
    known = min(model.base.get_input_embeddings().weight.shape[0], len(model.tokenizer))
    rng = np.random.default_rng(0)
    prompts = [tuple(int(token) for token in rng.integers(known, size=length)) for length in _LENGTHS]
    requests = [GenerateRequest(prompt, seed=number, max_tokens=_NEW) for number, prompt in enumerate(prompts)]
    apart = 0.0
    for prompt, written in zip(prompts, model.generate(requests), strict=True):
        meant = _logprobs(model.base, prompt, written.ids)
        apart = max(apart, *(abs(one - other) for one, other in zip(written.logprobs, meant, strict=True)))
    allowed = _EXACT if model.base.dtype == torch.float32 else _ROUNDED
    if not apart <= allowed:
        raise ModelError(
            f"model type {model.base.config.model_type!r} cannot be decoded here: log-probabilities of what is sampled "
            f"are {apart:.3g} nats away from those of the model's own forward pass"
        )


@torch.inference_mode()
def _logprobs(base: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """Of each token given all before it, from one plain pass."""
    tokens = torch.tensor([[*prompt, *ids]], device=base.device)
    logits = base(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
    found = logits.double().log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
    return [float(value) for value in found]
