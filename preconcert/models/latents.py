"""Latent messages: a few vectors that a model writes about what it has read, and another reads in the place of words.

Parts: `LatentSettings` (their shape), `LatentCodec` (queries and projections of one adapter), `quantised` (finite
scalar quantisation), `Fills` (vectors put in the place of embeddings during a forward pass), `alignment` and `aligned`
(the training-free baseline after LatentMAS, arXiv 2511.20639). `speech.py` writes and reads messages with them.

A sender appends its learned queries to what it has read and written; the last hidden states there become k × d numbers
(slots that read a text, after ICAE, arXiv 2307.06945). They are bounded and quantised, so that their bits are honest,
and every receiver's own codec turns them into k embeddings: sender and receiver need no common width, only the same
k, d and levels.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from preconcert.core import ModelError
from preconcert.models.loading import first_line

CODECS = "latent_codecs"
"""Attribute of a base model: its codecs by adapter."""
_WEIGHTS, _CONFIG = "latent_codec.safetensors", "latent_codec.json"
_MARGIN = 1e-3
"""How far the bounded number stays from the outermost rounding edges."""


class LatentMethod(StrEnum):
    """Where the vectors come from."""

    LEARNED = "learned"
    """Queries and projections that are trained."""
    ALIGNED = "aligned"
    """Nothing is trained: hidden states taken back to the space of embeddings, k steps of them (LatentMAS)."""


class LatentSettings(BaseModel):
    """The shape of latent messages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(2, ge=1, le=64)
    """Vectors per message (k)."""
    dims: int = Field(4, ge=1, le=4096)
    """Numbers per vector (d); `aligned` sends whole embeddings instead."""
    levels: int = Field(5, ge=0, le=65536)
    """Values that each number can take; 0 sends any number, which is charged at its full width."""
    method: LatentMethod = LatentMethod.LEARNED
    """`learned` or `aligned`."""
    deviation: float = Field(0.3, gt=0)
    """Standard deviation, at the start, of the Gaussian that a message is drawn from; greedy play sends its mean."""

    @model_validator(mode="after")
    def _levels_fit(self) -> LatentSettings:
        if self.levels == 1:
            raise ValueError("levels=1 says nothing: use 2 or more, or 0 for numbers that are not quantised")
        if self.method is LatentMethod.ALIGNED and self.levels:
            raise ValueError("method=aligned sends embeddings as they are: set levels=0")
        return self


class LatentCodec(nn.Module):
    """How one adapter writes and reads latent messages.

    Its parameters are plain tensors and no `nn.Linear`, so that peft does not take them for layers of the model.

    Args:
        settings: shape of the messages.
        width: of the model's hidden states.
        scale: typical size of one number of an embedding, from which vectors start.
        seed: of the initial weights.
        question: the embedding that every query begins near, shape (width,): that of a word after which the model is
            used to saying something; None for none.
    """

    def __init__(
        self, settings: LatentSettings, width: int, scale: float, seed: int, question: Tensor | None = None
    ) -> None:
        super().__init__()
        self.settings = settings
        self.width = width
        self.scale = scale
        generator = torch.Generator().manual_seed(seed % 2**63)

        def normal(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * std)

        k, d = settings.tokens, settings.dims
        if settings.method is LatentMethod.ALIGNED:
            return
        self.queries = normal(k, width, std=scale if question is None else 0.3 * scale)
        if question is not None:
            with torch.no_grad():
                self.queries.add_(question.float().cpu())
        self.out_in = normal(width, width, std=width**-0.5)
        self.out_bias = nn.Parameter(torch.zeros(width))
        self.out_code = normal(d, width, std=width**-0.5)
        self.log_deviation = nn.Parameter(torch.full((d,), math.log(settings.deviation)))
        self.in_code = normal(width, d, std=d**-0.5)
        self.in_bias = nn.Parameter(torch.zeros(width))
        self.in_out = normal(width, width, std=width**-0.5)
        self.places = normal(k, width, std=1.0)

    def mean(self, hidden: Float[Tensor, "rows k width"]) -> Float[Tensor, "rows k d"]:
        """The middle of the Gaussian that a message is drawn from, from the hidden states at the queries."""
        normed = functional.layer_norm(hidden.float(), hidden.shape[-1:])
        inner = functional.gelu(functional.linear(normed, self.out_in, self.out_bias))
        return functional.linear(inner, self.out_code)

    def deviation(self) -> Float[Tensor, " d"]:
        """Of that Gaussian; kept between 0.02 and 2."""
        return self.log_deviation.clamp(math.log(0.02), math.log(2.0)).exp()

    def logprob(
        self, drawn: Float[Tensor, "rows k d"], mean: Float[Tensor, "rows k d"], temperature: float | Tensor = 1.0
    ) -> Float[Tensor, "rows k"]:
        """Log-density of each vector that was drawn, in nats; the temperature widens the Gaussian."""
        deviation = self.deviation() * temperature
        scaled = (drawn - mean) / deviation
        return (-0.5 * scaled**2 - deviation.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def sent(self, drawn: Float[Tensor, "rows k d"]) -> Float[Tensor, "rows k d"]:
        """What goes into the channel: bounded to -1..1 and quantised; the gradient passes straight through."""
        return quantised(drawn, self.settings.levels)

    def embedded(self, values: Float[Tensor, "rows k d"]) -> Float[Tensor, "rows k width"]:
        """A message as the embeddings that its receiver reads; a shorter one fills the first places."""
        if self.settings.method is LatentMethod.ALIGNED:
            return values
        inner = functional.gelu(functional.linear(values, self.in_code, self.in_bias) + self.places[: values.shape[1]])
        return functional.linear(inner, self.in_out) * self.scale


def quantised(numbers: Tensor, levels: int) -> Tensor:
    """Bound to -1..1 and round to `levels` evenly spaced values; 0 only bounds.

    Finite scalar quantisation (arXiv 2309.15505): the gradient is that of the bounded number (straight-through).
    """
    if not levels:
        return torch.tanh(numbers)
    half = (levels - 1) / 2
    # An even number of levels has no middle one: the grid is shifted by half a step, zero stays between two of them.
    shift = 0.0 if levels % 2 else 0.5
    bounded = torch.tanh(numbers) * (half + 0.5 - _MARGIN)
    rounded = (torch.round(bounded - shift) + shift).clamp(-half, half)
    return (bounded + (rounded - bounded).detach()) / half


@dataclass(frozen=True)
class Fill:
    """Vectors for some places of a batch."""

    rows: Int[Tensor, " n"]
    columns: Int[Tensor, " n"]
    vectors: Float[Tensor, "n width"]

    @classmethod
    def side_by_side(
        cls, vectors: Float[Tensor, "m k width"], rows: Sequence[int] | Tensor, starts: Sequence[int] | Tensor
    ) -> Fill:
        """`k` vectors each from column `starts[i]` of row `rows[i]` on."""
        device, count = vectors.device, vectors.shape[1]
        row = torch.as_tensor(rows, device=device)[:, None].expand(-1, count)
        column = torch.as_tensor(starts, device=device)[:, None] + torch.arange(count, device=device)
        return cls(row.reshape(-1), column.reshape(-1), vectors.reshape(-1, vectors.shape[-1]))


class Fills:
    """While it is open, these vectors stand in the place of embeddings.

    A hook on the model's input embeddings, so that it works through peft and TRL's wrappers and lets gradients through
    to the vectors. Keep it open until after the backward pass, since activation checkpointing runs the forward pass a
    second time.
    """

    def __init__(self, base: Any, fills: Sequence[Fill]) -> None:
        self._fills = [fill for fill in fills if len(fill.rows)]
        self._handle = base.get_input_embeddings().register_forward_hook(self._after) if self._fills else None

    def close(self) -> None:
        """Take the hook away. Closing twice is allowed."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __enter__(self) -> Fills:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for fill in self._fills:
            output = output.index_put((fill.rows, fill.columns), fill.vectors.to(output.dtype))
        return output


def embedding_scale(base: Any) -> float:
    """Root mean square of the model's input embeddings: the typical size of one of their numbers."""
    layer = base.get_input_embeddings()
    return float(layer.weight.detach().float().square().mean().sqrt()) * layer_scale(layer)


def layer_scale(layer: nn.Module) -> float:
    """What an embedding layer multiplies its weights by (Gemma 3: the square root of the width); 1 for a plain one.

    Vectors stand in the place of what comes out of the layer, so it is part of what an embedding is.
    """
    return float(getattr(layer, "embed_scale", 1.0))


def alignment(base: Any, ridge: float = 1e-5) -> Float[Tensor, "width width"]:
    """The matrix that takes hidden states back to the space of embeddings.

    W = (Wo' Wo + ridge I)^-1 Wo' Wi, with the output and input embeddings Wo and Wi (LatentMAS, section 3).
    """
    outputs = base.get_output_embeddings().weight.detach().double()
    layer = base.get_input_embeddings()
    inputs = layer.weight.detach().double() * layer_scale(layer)
    gram = outputs.T @ outputs + ridge * torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
    return torch.linalg.solve(gram, outputs.T @ inputs).float()


def aligned(hidden: Float[Tensor, "rows width"], matrix: Tensor, base: Any) -> Float[Tensor, "rows width"]:
    """Hidden states as embeddings, rescaled to the mean length of the model's own."""
    layer = base.get_input_embeddings()
    target = layer.weight.detach().float().norm(dim=1).mean() * layer_scale(layer)
    moved = hidden.float() @ matrix
    return moved * (target / moved.norm(dim=1, keepdim=True).clamp(min=1e-6))


def save_codec(codec: LatentCodec, folder: Path) -> None:
    """Write a codec into an adapter's folder; each file is written beside and renamed."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in codec.state_dict().items()}
    content = {"settings": codec.settings.model_dump(mode="json"), "scale": codec.scale}
    save_file(tensors, folder / (_WEIGHTS + ".new"))
    (folder / (_CONFIG + ".new")).write_text(json.dumps(content, indent=1))
    for name in (_WEIGHTS, _CONFIG):
        os.replace(folder / (name + ".new"), folder / name)


def has_codec(folder: Path) -> bool:
    """Does an adapter's folder hold a codec?"""
    return (folder / _CONFIG).is_file()


def load_codec(folder: Path, width: int) -> LatentCodec:
    """Read a codec from an adapter's folder.

    Raises:
        ModelError: a file is missing or corrupt, or made for another width.
    """
    try:
        content = json.loads((folder / _CONFIG).read_text())
        codec = LatentCodec(LatentSettings(**content["settings"]), width, float(content["scale"]), 0)
        state = load_file(folder / _WEIGHTS)
        codec.load_state_dict(state)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"latent codec in {str(folder)!r} cannot be read: {first_line(error)}") from error
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        raise ModelError(f"latent codec in {str(folder)!r} is corrupt: it has values that are not finite")
    return codec
