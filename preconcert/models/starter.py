"""The embedded default: a small Qwen3- or Llama-shaped model with a word-level tokenizer, made on the spot from a seed.

The folder is an ordinary Hugging Face checkpoint, so what works with the starter works with a downloaded model. The
weights are random, in a scaled initialisation that fine-tuning can work from; nothing is downloaded.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from preconcert.core import ModelError

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
"""The special words, with token ids 0, 1 and 2."""
_FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


class StarterSettings(BaseModel):
    """The shape of the starter model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Literal["qwen3", "llama"] = "qwen3"
    """Architecture."""
    layers: PositiveInt = 3
    """Transformer blocks."""
    width: PositiveInt = 64
    """Size of the hidden state."""
    heads: PositiveInt = 4
    """Attention heads; the head size is width / heads."""
    kv_heads: PositiveInt = 4
    """Heads of keys and values; must divide `heads`."""
    ffn: PositiveInt = 128
    """Inner size of the feed-forward layers."""
    max_context: PositiveInt = 512
    """Longest context in tokens."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> StarterSettings:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is not an even multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        return self


def build_starter(words: Sequence[str], folder: Path, seed: int, settings: StarterSettings | None = None) -> Path:
    """Write a starter checkpoint. Equal arguments give equal bytes; the global random state is not touched.

    Args:
        words: the vocabulary, each word without white space; special words and repetitions are left out.
        folder: where the checkpoint goes; replaced if it exists. Written beside and renamed.
        seed: every weight follows from it.
        settings: the model's shape.

    Returns:
        The folder.

    Raises:
        ModelError: a word is empty or has white space in it.
    """
    settings = settings or StarterSettings()
    tokenizer = word_tokenizer(words, settings.max_context)
    model = starter_model(len(tokenizer), seed, settings)
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return folder


def word_tokenizer(words: Sequence[str], max_context: int) -> PreTrainedTokenizerFast:
    """A tokenizer that splits at white space and knows whole words only; ids follow the order given."""
    vocabulary = {PAD: 0, EOS: 1, UNKNOWN: 2}
    for word in words:
        if not word or any(character.isspace() for character in word):
            raise ModelError(f"not a word: {word!r}")
        vocabulary.setdefault(word, len(vocabulary))
    inner = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=max_context,
        clean_up_tokenization_spaces=False,
    )


def starter_model(vocabulary_size: int, seed: int, settings: StarterSettings) -> PreTrainedModel:
    """The model in memory: float32, tied embeddings."""
    config_class, model_class = _FAMILIES[settings.family]
    config = config_class(
        vocab_size=vocabulary_size,
        hidden_size=settings.width,
        intermediate_size=settings.ffn,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.width // settings.heads,
        max_position_embeddings=settings.max_context,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        model = model_class(config)
    generator = torch.Generator().manual_seed(seed)
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            _fill(module.weight, 1 / math.sqrt(settings.width), generator)
        elif isinstance(module, nn.Linear) and path != "lm_head":
            into_residual = path.endswith(("o_proj", "down_proj"))
            depth = math.sqrt(2 * settings.layers) if into_residual else 1.0
            _fill(module.weight, 1 / (math.sqrt(module.in_features) * depth), generator)
    return model.eval()


def _fill(weight: Tensor, deviation: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        weight.normal_(0.0, deviation, generator=generator)
