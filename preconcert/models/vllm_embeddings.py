"""Prompts as embeddings, for latent messages: what `TransformersModel` puts in the place of tokens inside the model is
put there before the prompt goes to vLLM.

Parts: `PromptEmbeddings`, which holds the base's input embeddings and the adapters' codecs.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from preconcert.core import ModelError
from preconcert.models.language_model import Placed
from preconcert.models.latents import LatentCodec
from preconcert.models.loading import DTYPES, first_line
from preconcert.models.reading import Body
from preconcert.models.speech import Speech

_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")


class _Scaled(nn.Embedding):
    """Embeddings that are multiplied by a number, as the model's own layer does it."""

    embed_scale = 1.0

    def forward(self, input: Tensor) -> Tensor:
        """Of tokens."""
        return super().forward(input) * torch.tensor(self.embed_scale, dtype=self.weight.dtype)


class _Embeddings(nn.Module):
    """As much of a base model as reading latent messages takes."""

    def __init__(self, weight: Tensor, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config
        scale = _scale(config)
        layer = nn.Embedding if scale == 1.0 else _Scaled
        self.tokens = layer.from_pretrained(weight, freeze=True)
        if isinstance(self.tokens, _Scaled):
            self.tokens.embed_scale = scale

    def get_input_embeddings(self) -> nn.Embedding:
        """The input embeddings."""
        return self.tokens


class PromptEmbeddings:
    """Embeds prompts with latent messages.

    Args:
        base: folder of the base model.
        config: its configuration.
        dtype: in which the engine holds the model, and so its embeddings and what agents say in vectors.

    Raises:
        ModelError: the input embeddings are not found.
    """

    def __init__(self, base: Path, config: PretrainedConfig, dtype: str = "float32") -> None:
        inner: Any = _Embeddings(_weight(base).to(DTYPES[dtype]), config)
        self._inner = inner
        self._alone = threading.Lock()  # messages are put in by a hook on what all threads share
        self.speech = Speech(inner, Body(inner, None))

    @property
    def codecs(self) -> Mapping[str, LatentCodec]:
        """By adapter."""
        return self.speech.codecs

    def of(self, prompt_ids: tuple[int, ...], adapter: str | None, latents: tuple[Placed, ...]) -> Tensor:
        """A prompt as embeddings, shape (tokens, width), with its latent messages in their places.

        Raises:
            ModelError: an adapter without a codec, or a message of another shape than its own.
        """
        with self._alone, torch.no_grad(), self.speech.fills([adapter], [latents]):
            embedded: Tensor = self._inner.tokens(torch.tensor([prompt_ids]))
        return embedded[0]


def _scale(config: PretrainedConfig) -> float:
    """What the architecture's input embeddings are multiplied by: an engine takes prompts as they are after that."""
    with torch.device("meta"):
        layer = AutoModelForCausalLM.from_config(config).get_input_embeddings()
    if type(layer) is nn.Embedding:
        return 1.0
    scale = getattr(layer, "scalar_embed_scale", getattr(layer, "embed_scale", None))
    if isinstance(scale, int | float):
        return float(scale)
    raise ModelError(
        f"latent messages on vLLM: input embeddings of type {type(layer).__name__} are not supported; "
        "use rollout.engine=transformers"
    )


def _weight(base: Path) -> Tensor:
    try:
        name, file = None, _WEIGHTS
        if (base / _INDEX).is_file():
            where = json.loads((base / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            name = next((one for one in where if one.endswith(_NAMES)), None)
            file = where.get(name, _WEIGHTS)
        with safe_open(base / file, framework="pt") as weights:
            name = name or next((one for one in weights.keys() if one.endswith(_NAMES)), None)  # noqa: SIM118 - no dict
            if name is None:
                raise ModelError(f"model folder {str(base)!r}: no input embeddings among its tensors")
            found: Tensor = weights.get_tensor(name)
            return found
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"model folder {str(base)!r}: its embeddings cannot be read: {first_line(error)}") from error
