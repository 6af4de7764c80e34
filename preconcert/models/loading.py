"""Reading a checkpoint from a folder or from the Hugging Face hub; every failure is one line that names the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from preconcert.core import ModelError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_checkpoint(name_or_path: str | Path, dtype: str, device: str) -> tuple[PreTrainedModel, Any]:
    """The model, ready for inference, and its tokenizer.

    Args:
        name_or_path: a folder or a hub name.
        dtype: float32, bfloat16 or float16.
        device: as in torch; `auto` is this process's GPU where there is one.

    Raises:
        ModelError: no such model, a file is missing or unreadable, or the dtype or device is unknown.
    """
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; {nearest(dtype, DTYPES)}")
    name = check_checkpoint(name_or_path)
    config = read_pretrained(name, "config", AutoConfig.from_pretrained)
    tokenizer = read_pretrained(name, "tokenizer", AutoTokenizer.from_pretrained)
    model = read_pretrained(name, "weights", AutoModelForCausalLM.from_pretrained, config=config, dtype=DTYPES[dtype])
    if device == "auto":
        # Processes of one torchrun have a card each.
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used: {first_line(error)}") from error
    return model.eval(), tokenizer


def check_model_name(name: str) -> None:
    """Raises a `ModelError` where there is surely no such model: no folder or configuration of that name. Cheap."""
    _check_source(name)
    read_pretrained(name, "config", AutoConfig.from_pretrained)


def check_checkpoint(name_or_path: str | Path) -> str:
    """A model's name or folder as text.

    Raises:
        ModelError: it is a path without a checkpoint.
    """
    name = str(name_or_path) if name_or_path != Path() else ""
    _check_source(name)
    return name


def eos_ids(tokenizer: Any, settings: Any) -> list[int]:
    """Token ids that end a completion: the tokenizer's and those of a generation or model configuration."""
    found: set[int] = set()
    for value in (tokenizer.eos_token_id, getattr(settings, "eos_token_id", None)):
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return sorted(found)


def first_line(error: BaseException) -> str:
    """What somebody else's error says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_source(name: str) -> None:
    """A folder must hold a checkpoint; anything that looks like a path must be a folder."""
    path = Path(name).expanduser()
    if not name.strip():
        raise ModelError(f"no model folder at {name!r}")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model folder {name!r} has no config.json")
        if not any((path / file).is_file() for file in _WEIGHTS):
            raise ModelError(f"model folder {name!r} has no weights ({_WEIGHTS[0]})")
        if not any((path / file).is_file() for file in _TOKENIZERS):
            raise ModelError(f"model folder {name!r} has no tokenizer ({_TOKENIZERS[0]})")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")) or path.exists():
        raise ModelError(f"no model folder at {name!r}")


def read_pretrained(name: str, what: str, call: Callable[..., Any], **options: Any) -> Any:
    """Call a loader of transformers without its progress bars.

    Args:
        name: a folder or a hub name.
        what: it reads, for the error.
        call: the loader.
        options: of the loader.

    Raises:
        ModelError: whatever it raises, on one line.
    """
    local = Path(name).expanduser().is_dir()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return call(str(Path(name).expanduser()) if local else name, **options)
    # The loaders raise almost anything for a bad file: OSError, ValueError, KeyError, and errors of their parsers.
    except Exception as error:
        if local:
            raise ModelError(f"model folder {name!r}: its {what} cannot be read: {first_line(error)}") from error
        raise ModelError(
            f"no model {name!r}: it is no folder here, and the Hugging Face hub did not give its {what}: "
            f"{first_line(error)}"
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
