"""LoRA adapters of one model by name: make, copy, load, save. peft's file format, every file checked before use."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from preconcert.core import ModelError, nearest
from preconcert.models.loading import first_line
from preconcert.models.routing import lora_layers

_PREFIX = "base_model.model."
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


class LoraSettings(BaseModel):
    """The shape of every adapter of a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: PositiveInt = 8
    """Rank of the low-rank matrices."""
    alpha: float = Field(16.0, gt=0)
    """The adapter's output is scaled by alpha / r."""
    targets: str | tuple[str, ...] = "all-linear"
    """Names of the layers that get an adapter; `all-linear` is every linear layer but the head."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training."""

    def config(self) -> LoraConfig:
        """The same in peft's terms."""
        whole = int(self.alpha) if float(self.alpha).is_integer() else self.alpha
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        return LoraConfig(
            r=self.r,
            lora_alpha=whole,
            target_modules=targets,
            lora_dropout=self.dropout,
            bias="none",
            task_type=TaskType.CAUSAL_LM,
        )


class Adapters:
    """The adapters of one base model. peft wraps the model when the first one is made."""

    def __init__(self, base: PreTrainedModel, settings: LoraSettings) -> None:
        self.base = base
        self.settings = settings
        self.peft: PeftModel | None = None
        self._layers: dict[str, LoraLayer] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they were made."""
        return tuple(self.peft.peft_config) if self.peft is not None else ()

    def check(self, name: str) -> None:
        """Raises:
        ModelError: there is no such adapter.
        """
        if name not in self.names:
            raise ModelError(f"unknown adapter {name!r}; {nearest(name, self.names)}")

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The trainable tensors of one adapter by their name in peft's files."""
        self.check(name)
        found: dict[str, nn.Parameter] = {}
        for path, layer in self._layers.items():
            found[f"{_PREFIX}{path}.lora_A.weight"] = layer.lora_A[name].weight
            found[f"{_PREFIX}{path}.lora_B.weight"] = layer.lora_B[name].weight
        return found

    def add(self, name: str, seed: int, source: str | None) -> None:
        """A fresh adapter, which changes nothing yet, or a copy of another."""
        if name in self.names:
            raise ModelError(f"adapter {name!r} exists already")
        if source is not None:
            self.check(source)
        self._install(name)
        if source is not None:
            self._write(name, {key: value.detach() for key, value in self.parameters(source).items()})
            return
        self._write(name, self.fresh(name, seed))

    def fresh(self, name: str, seed: int) -> dict[str, Tensor]:
        """The tensors that an adapter of this name begins with; they change nothing yet."""
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, Tensor] = {}
        for key, value in sorted(self.parameters(name).items()):
            found[key] = torch.zeros(value.shape)
            if key.endswith("lora_A.weight"):
                bound = 1 / math.sqrt(value.shape[1])
                found[key].uniform_(-bound, bound, generator=generator)
        return found

    def load(self, name: str, path: Path) -> None:
        """Read an adapter folder, replacing one of the same name; nothing changes if the folder is unusable."""
        state = self._read(Path(path))
        new = name not in self.names
        if new:
            self._install(name)
        try:
            self._check_fit(name, state, Path(path))
        except ModelError:
            if new:
                self.delete(name)
            raise
        self._write(name, state)

    def save(
        self,
        name: str,
        path: Path,
        more: Callable[[Path], None] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write an adapter folder beside its place and rename it.

        Args:
            name: the adapter's.
            path: the folder; one that is there is replaced.
            more: writes further files into the folder before it is renamed.
            state: tensors to write in the place of the adapter's own.
        """
        state = self.parameters(name) if state is None else state
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            save_file(tensors, beside / _WEIGHTS, metadata={"format": "pt"})
            config = self.settings.config()
            config.target_modules = sorted({layer.rsplit(".", 1)[-1] for layer in self._layers})
            config.base_model_name_or_path = getattr(self.base, "name_or_path", None) or None
            config.inference_mode = True
            config.save_pretrained(str(beside))
            if more is not None:
                more(beside)
            beside.chmod(0o755)
            if path.exists():
                shutil.rmtree(path)
            os.replace(beside, path)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise

    def delete(self, name: str) -> None:
        """Remove an adapter; without any left, the base model is as it was."""
        self.check(name)
        assert self.peft is not None
        if len(self.names) == 1:
            self.peft.unload()
            self.peft, self._layers = None, {}
            return
        if self.peft.active_adapter == name:
            self._activate(next(other for other in self.names if other != name))
        self.peft.delete_adapter(name)

    def _activate(self, name: str) -> None:
        """Change the active adapter and keep every `requires_grad` as it is."""
        assert self.peft is not None
        wanted = {key: value.requires_grad for key, value in self.peft.named_parameters()}
        self.peft.set_adapter(name)
        for key, value in self.peft.named_parameters():
            value.requires_grad_(wanted[key])

    def _install(self, name: str) -> None:
        """Make room for an adapter without touching the global random state. Its parameters require gradients."""
        if not re.fullmatch(r"[^\s./\\]+", name) or name == "__base__" or hasattr(nn.ModuleDict(), name):
            raise ModelError(f"{name!r} cannot name an adapter: white space, dots, slashes and reserved words are out")
        config = self.settings.config()
        before = {key: value.requires_grad for key, value in self.peft.named_parameters()} if self.peft else {}
        # peft warns of short names, for reasons of its own loader, which is not used here.
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*should not be contained in the prefix.*")
            try:
                if self.peft is None:
                    self.peft = get_peft_model(self.base, config, adapter_name=name)
                else:
                    self.peft.add_adapter(name, config)
            except (ValueError, KeyError) as error:
                raise ModelError(f"adapter {name!r} cannot be made: {first_line(error)}") from error
        self._layers = lora_layers(self.base)
        if isinstance(self.base.get_output_embeddings(), LoraLayer):
            self.delete(name)
            raise ModelError(f"targets {self.settings.targets!r} include the language-model head, which must be plain")
        for key, value in self.peft.named_parameters():
            if key in before:
                value.requires_grad_(before[key])
        for value in self.parameters(name).values():
            value.requires_grad_(True)

    def _write(self, name: str, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for key, value in self.parameters(name).items():
                value.copy_(state[key])

    def _read(self, path: Path) -> dict[str, Tensor]:
        if not path.is_dir():
            raise ModelError(f"no adapter folder at {str(path)!r}")
        for file in (_CONFIG, _WEIGHTS):
            if not (path / file).is_file():
                raise ModelError(f"adapter folder {str(path)!r} has no {file}")
        try:
            config = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
            kind, rank, alpha = config["peft_type"], config["r"], config["lora_alpha"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{str(path / _CONFIG)!r} is not an adapter configuration: {first_line(error)}") from error
        if kind != "LORA" or config.get("use_dora") or config.get("use_rslora") or config.get("rank_pattern"):
            raise ModelError(f"adapter {str(path)!r} is not plain LoRA (peft_type {kind!r})")
        if (rank, float(alpha)) != (self.settings.r, float(self.settings.alpha)):
            raise ModelError(
                f"adapter {str(path)!r} has r={rank}, alpha={alpha}; this model's adapters have r={self.settings.r}, "
                f"alpha={self.settings.alpha:g}"
            )
        try:
            return load_file(path / _WEIGHTS)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{str(path / _WEIGHTS)!r} is corrupt: {first_line(error)}") from error

    def _check_fit(self, name: str, state: dict[str, Tensor], path: Path) -> None:
        expected = self.parameters(name)
        for key in sorted(expected.keys() - state.keys()):
            raise ModelError(f"adapter {str(path)!r} is for another architecture: it lacks {key!r}")
        for key in sorted(state.keys() - expected.keys()):
            raise ModelError(f"adapter {str(path)!r} is for another architecture: this model has no {key!r}")
        for key, value in expected.items():
            if state[key].shape != value.shape:
                raise ModelError(
                    f"adapter {str(path)!r} is for another architecture: {key!r} is {tuple(state[key].shape)}, "
                    f"here {tuple(value.shape)}"
                )
            if not bool(torch.isfinite(state[key]).all()):
                raise ModelError(f"adapter {str(path)!r} is corrupt: {key!r} has values that are not finite")
