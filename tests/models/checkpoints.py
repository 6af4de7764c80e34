"""Tiny checkpoints made on the spot, shaped like Qwen3, Llama and Gemma 3, with a byte-level BPE tokenizer and a chat
template."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WORDS = ("north", "south", "east", "west", "stay", "red", "blue", "green", "goal", "wall")
CORPUS = [
    f"{first} {second} {third}" for first in WORDS for second in WORDS for third in ("at the", "row", "column", "says")
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_chat_tokenizer() -> PreTrainedTokenizerFast:
    """About 300 tokens; `<|im_end|>` ends a completion."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_chat_model(vocabulary_size: int, kind: str, seed: int, sliding_window: int | None = None) -> PreTrainedModel:
    """Two layers of width 32; `qwen3` with grouped keys and tied embeddings, `llama` with a head of its own,
    `gemma3` with tied embeddings that are multiplied by a number.

    With `sliding_window`, the second layer of `qwen3` sees that many tokens only.
    """
    shape = {
        "vocab_size": vocabulary_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "qwen3":
            window = {"use_sliding_window": True, "sliding_window": sliding_window, "max_window_layers": 1}
            config = Qwen3Config(**shape, tie_word_embeddings=True, **(window if sliding_window else {}))
            return Qwen3ForCausalLM(config).eval()
        if kind == "llama":
            return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)).eval()
        if kind == "gemma3":
            return Gemma3ForCausalLM(Gemma3TextConfig(**shape, tie_word_embeddings=True)).eval()
    raise ValueError(f"unknown kind {kind!r}")


def build_chat_checkpoint(folder: Path, kind: str = "qwen3", seed: int = 0) -> Path:
    """Write a loadable checkpoint folder of kind `qwen3`, `llama` or `gemma3`."""
    tokenizer = build_chat_tokenizer()
    build_chat_model(len(tokenizer), kind, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
