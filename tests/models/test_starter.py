"""The starter is an ordinary checkpoint that follows from its seed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from preconcert.core import ModelError
from preconcert.models import StarterSettings, build_starter

WORDS = [f"word{number}" for number in range(50)]


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_equal_seeds_give_equal_bytes_and_leave_the_global_state(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    build_starter(WORDS, tmp_path / "one", seed=3)
    torch.manual_seed(99)
    after = torch.get_rng_state()
    build_starter(WORDS, tmp_path / "two", seed=3)
    assert torch.equal(after, torch.get_rng_state())
    torch.set_rng_state(before)
    build_starter(WORDS, tmp_path / "three", seed=4)
    assert torch.equal(before, torch.get_rng_state())
    one, two, three = (digest(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one["model.safetensors"] != three["model.safetensors"]
    build_starter(WORDS, tmp_path / "one", seed=4)
    assert digest(tmp_path / "one") == three
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three", "two"]


def test_an_ordinary_checkpoint(tmp_path: Path) -> None:
    folder = build_starter(WORDS, tmp_path / "starter", seed=0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen3"
    assert model.dtype == torch.float32
    assert 110_000 < sum(value.numel() for value in model.parameters()) < 140_000
    ids = tokenizer.encode("word3 word0  word49\nunheard")
    assert ids == [6, 3, 52, tokenizer.unk_token_id]
    assert tokenizer.decode(ids[:3]) == "word3 word0 word49"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.padding_side) == (0, 1, "left")
    assert model.generation_config.eos_token_id == 1
    logits = model(input_ids=torch.tensor([ids])).logits.detach()
    assert 0.3 < float(logits.std()) < 3


def test_bad_words_and_settings(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'two words'"):
        build_starter(["two words"], tmp_path / "starter", seed=0)
    assert not list(tmp_path.iterdir())
    for wrong in ({"width": 60, "heads": 8}, {"heads": 4, "kv_heads": 3}, {"depth": 3}):
        with pytest.raises(ValidationError):
            StarterSettings(**wrong)
