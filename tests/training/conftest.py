"""Checkpoints shared by the tests of this folder; made once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from preconcert.models import TransformersModel
from tests.training.teams import chat_checkpoint, load, starter_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a checkpoint by its kind: `starter`, `qwen3` or `llama`."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            starter_checkpoint(folder) if kind == "starter" else chat_checkpoint(folder, kind)
        return folder

    return make


@pytest.fixture
def starter(checkpoint: Callable[[str], Path]) -> TransformersModel:
    """The starter model with one adapter per agent, for this test alone."""
    return load(checkpoint("starter"))
