"""Reinforcement learning in bfloat16 on a GPU, on a small Qwen3-shaped checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preconcert.training.recipe import Recipe
from preconcert.training.run import train
from tests.training.teams import chat_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]


def test_grpo_in_bfloat16(tmp_path: Path) -> None:
    """It runs to its end, its figures are numbers, and both adapters have moved."""
    chat_checkpoint(tmp_path / "base", "qwen3")
    recipe = Recipe.model_validate(
        {
            "task": "rendezvous", "params": {"size": 3, "landmarks": 2, "horizon": 3},
            "model": str(tmp_path / "base"), "dtype": "bfloat16", "gate": {"min_gap": 0, "episodes": 8},
            "warm_start": {"method": "lora", "episodes": 32, "steps": 10, "batch": 16},
            "grpo": {"iterations": 3, "seeds": 4, "group": 4, "minibatches": 2, "epochs": 1, "credit": "loo"},
        }
    )  # fmt: skip
    run = train(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float)), line
    for name in ("agent_0", "agent_1"):
        before, after = (load_file(run / place / name / "adapter_model.safetensors") for place in ("warm", "adapters"))
        assert any(not torch.equal(before[key], after[key]) for key in before)
        assert all(bool(torch.isfinite(value).all()) for value in after.values())
