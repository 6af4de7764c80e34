"""Checkpoints with attention heads that are too small for vLLM's kernels, put into heads of a size that they take.

Parts: `HeadFit` (what is done to a model of some configuration: nothing, for nearly all pretrained ones), with
`checkpoint` and `adapter` to write a folder that computes the same function. The starter model's heads have 16 numbers;
vLLM's attention begins at 32.

Each head's numbers go to the places of a larger head that rotary embeddings turn at the same speed, and zeros fill the
rest: pair i of D/2 stays pair i of D'/2 if the base of the frequencies becomes theta^(D'/D). Scores are divided by
sqrt(D') instead of sqrt(D), which the queries make up for; and where queries and keys are normalised over the head, the
projection is scaled by sqrt(D'/D) so that the mean over the larger head, epsilon included, is what it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from preconcert.core import ModelError

SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's attention on a CPU takes; those on GPUs take at least the powers of two among them."""
_FAMILIES = {"qwen3": True, "llama": False}
"""Model types that can be refitted; do they normalise queries and keys over the head?"""
_WEIGHTS, _ADAPTER = "model.safetensors", "adapter_model.safetensors"


@dataclass(frozen=True)
class HeadFit:
    """How the heads of one configuration are refitted."""

    size: int
    """Numbers per head."""
    larger: int
    """Numbers per head as vLLM gets it."""
    normed: bool
    """Are queries and keys normalised over the head?"""

    @staticmethod
    def of(config: PretrainedConfig) -> HeadFit | None:
        """What a model needs; None where it can stay as it is.

        Raises:
            ModelError: its heads are too small, and it is of a kind that cannot be refitted.
        """
        text = config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if size in SIZES or size > SIZES[0]:
            return None
        rope = getattr(text, "rope_parameters", None) or {}
        if text.model_type not in _FAMILIES or size % 2 or rope.get("rope_type", "default") != "default":
            raise ModelError(
                f"model type {text.model_type!r} has attention heads of {size} numbers, and vLLM takes {SIZES[0]} and "
                f"more; only {' and '.join(sorted(_FAMILIES))} models with plain rotary embeddings are refitted"
            )
        return HeadFit(size, SIZES[0], _FAMILIES[text.model_type])

    def checkpoint(self, source: Path, target: Path) -> None:
        """Write the refitted checkpoint beside its place and rename it.

        Raises:
            ModelError: the weights are not in one file.
        """
        if not (source / _WEIGHTS).is_file():
            raise ModelError(f"model folder {str(source)!r} has no {_WEIGHTS}: heads are refitted in one file only")
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        rope = config.get("rope_parameters") or {}
        theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
        theta **= self.larger / self.size
        config["head_dim"] = self.larger
        config["rope_theta"] = theta
        config["rope_parameters"] = {"rope_type": "default", **rope, "rope_theta": theta}
        state = {name: self._weight(name, value) for name, value in load_file(source / _WEIGHTS).items()}

        def write(folder: Path) -> None:
            save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")

        _copy(source, target, {_WEIGHTS, "config.json"}, write)

    def adapter(self, source: Path, target: Path) -> None:
        """Write the refitted adapter beside its place and rename it."""
        state = {name: self._lora(name, value) for name, value in load_file(source / _ADAPTER).items()}
        _copy(
            source, target, {_ADAPTER}, lambda folder: save_file(state, folder / _ADAPTER, metadata={"format": "pt"})
        )

    def _weight(self, name: str, value: Tensor) -> Tensor:
        layer = name.split(".")[-2] if "." in name else ""
        if layer in ("q_proj", "k_proj", "v_proj"):
            return (self._spread(value, 0) * self._factor(layer)).contiguous()
        if layer == "o_proj" and value.ndim == 2:
            return self._spread(value, 1)
        if layer in ("q_norm", "k_norm"):
            # The projection's factor is taken back; that of the scores stays with the queries.
            factor = 1.0 if layer == "q_norm" else 1.0 / math.sqrt(self.larger / self.size)
            return (self._spread(value, 0) * factor).contiguous()
        return value

    def _lora(self, name: str, value: Tensor) -> Tensor:
        for layer in ("q_proj", "k_proj", "v_proj"):
            if name.endswith(f"{layer}.lora_B.weight"):
                return (self._spread(value, 0) * self._factor(layer)).contiguous()
        return self._spread(value, 1) if name.endswith("o_proj.lora_A.weight") else value

    def _factor(self, layer: str) -> float:
        ratio = math.sqrt(self.larger / self.size)
        return ratio if layer == "q_proj" or (layer == "k_proj" and self.normed) else 1.0

    def _spread(self, value: Tensor, axis: int) -> Tensor:
        """Put every run of `size` numbers along an axis into one of `larger`."""
        half = self.size // 2
        heads = value.shape[axis] // self.size
        places = torch.arange(heads)[:, None] * self.larger + torch.cat(
            [torch.arange(half), self.larger // 2 + torch.arange(half)]
        )
        shape = list(value.shape)
        shape[axis] = heads * self.larger
        return torch.zeros(shape, dtype=value.dtype).index_copy_(axis, places.reshape(-1), value)


def fitted_checkpoint(base: Path, config: PretrainedConfig) -> Path:
    """A folder with a model that vLLM takes: the one given, or its refitted copy, which is kept in the user's cache.

    Args:
        base: a checkpoint folder.
        config: its configuration.
    """
    fit = HeadFit.of(config)
    return base if fit is None else _kept(base, fit, fit.checkpoint)


def fitted_adapter(adapter: Path, config: PretrainedConfig) -> Path:
    """The same for an adapter's folder."""
    fit = HeadFit.of(config)
    return adapter if fit is None else _kept(adapter, fit, fit.adapter)


def _kept(source: Path, fit: HeadFit, write: Callable[[Path, Path], None]) -> Path:
    """The refitted copy of a folder in the user's cache, made if there is none of this content."""
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted(path for path in source.iterdir() if path.is_file()):
        digest.update(file.name.encode())
        digest.update(hashlib.blake2b(file.read_bytes()).digest())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preconcert" / "vllm"
    target = cache / f"{digest.hexdigest()}-{fit.larger}"
    if not target.is_dir():
        write(source, target)
    return target


def _copy(source: Path, target: Path, without: set[str], write: Callable[[Path], None]) -> None:
    """A folder's other files and what `write` puts beside them, under its name only when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for file in source.iterdir():
            if file.is_file() and file.name not in without:
                shutil.copy2(file, beside / file.name)
        write(beside)
        beside.chmod(0o755)
        try:
            os.replace(beside, target)
        except OSError:  # somebody else was faster with the same content
            if not target.is_dir():
                raise
            shutil.rmtree(beside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
