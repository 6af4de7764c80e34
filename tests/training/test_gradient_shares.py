"""Whose gradient it is: parameters by adapter, whatever adapters are called, and shares that sum to 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from preconcert.models import LatentSettings
from preconcert.training.gradient_shares import GradientShares, adapter_parameters, set_trainable
from tests.training.teams import load, starter_checkpoint

NAMES = ("0", "mlp", "q_proj")
"""Each is a part of the names of the model's modules, too."""


def test_adapters_may_be_called_like_modules(tmp_path: Path) -> None:
    model = load(starter_checkpoint(tmp_path / "base"), NAMES)
    model.add_codec("0", LatentSettings(tokens=2, dims=3, levels=5), 0)
    for name in NAMES:
        own = {id(parameter) for parameter in model.adapter_parameters(name).values()}
        if name == "0":
            own |= {id(parameter) for parameter in model.codecs[name].parameters()}
        assert {id(parameter) for parameter in adapter_parameters(model.model, name)} == own
    set_trainable(model.model, ("mlp",))
    wanted = {id(parameter) for parameter in model.adapter_parameters("mlp").values()}
    assert {id(p) for p in model.model.parameters() if p.requires_grad} == wanted


def test_shares_are_of_all_adapters_that_learn(tmp_path: Path) -> None:
    """Agents a and b share an adapter, c has one of its own that is named like it."""
    model = load(starter_checkpoint(tmp_path / "base"), ("x", "c"))
    shares = GradientShares(("x", "c"), ("a", "b", "c"))
    for name, size in (("x", 1.0), ("c", 3.0)):
        first, *others = adapter_parameters(model.model, name)
        first.grad = torch.zeros_like(first)
        first.grad.view(-1)[0] = size
        assert all(parameter.grad is None for parameter in others)
    shares.note(model.model, None)
    found = dict(shares.take())
    assert found == pytest.approx(
        {"gradient_norm/largest": 10.0**0.5, "gradient_share/x": 0.1, "gradient_share/c": 0.9}
    )
    shares.note(model.model, None)
    for agent, size in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        shares.note_agent(agent, torch.tensor([size]))
    found = dict(shares.take())
    assert found["gradient_share/x"] == pytest.approx(0.1)
    assert [found[f"gradient_share/{agent}"] for agent in "abc"] == pytest.approx([1 / 6, 1 / 6, 4 / 6])
