"""Checkpoints shared by the tests of this folder; made once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from preconcert.models import LoraSettings, StarterSettings, TransformersModel, build_starter
from tests.models.checkpoints import WORDS, build_chat_checkpoint

KINDS = ("starter", "qwen3", "llama")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a checkpoint by its kind."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            if kind == "starter":
                build_starter(WORDS, folder, seed=0, settings=StarterSettings(layers=2, width=32, ffn=48))
            else:
                build_chat_checkpoint(folder, kind, seed=1)
        return folder

    return make


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind of checkpoint in turn."""
    return str(request.param)


@pytest.fixture
def model(checkpoint: Callable[[str], Path], kind: str) -> TransformersModel:
    """A model of each kind with two adapters that differ from the base."""
    return two_adapters(TransformersModel.load(checkpoint(kind), LoraSettings(r=4)))


def two_adapters(model: TransformersModel) -> TransformersModel:
    """Give a model adapters `red` and `blue` with weights that matter."""
    for seed, name in enumerate(("red", "blue")):
        model.add_adapter(name, seed)
        generator = torch.Generator().manual_seed(100 + seed)
        with torch.no_grad():
            for key, value in model.adapter_parameters(name).items():
                if "lora_B" in key:
                    value.normal_(0, 0.1, generator=generator)
    return model
