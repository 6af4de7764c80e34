"""Finished runs of every kind, small and quickly made, to be exported."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from preconcert.models import TransformersModel
from preconcert.training.recipe import Recipe
from preconcert.training.run import train
from preconcert.training.run_folder import base_of
from tests.models.checkpoints import build_chat_checkpoint

HUB = "somebody/small-model"
_SHAPE = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "ffn": 32}
_NOTHING: dict[str, Any] = {"starter": _SHAPE, "warm_start": {"episodes": 0}, "grpo": {"iterations": 0}}
_WORLD = {
    "random_episodes": 6, "scripted_episodes": 6, "learner_episodes": 4, "heldout_episodes": 2,
    "training": {"steps": 2, "batch": 8, "own_every": 0},
}  # fmt: skip
_ADAPTERS_ONLY = {"episodes": 0, "method": "lora"}
RECIPES: dict[str, dict[str, Any]] = {
    "agents": {"task": "rendezvous", "agent": {"memory": 2}},
    "shared": {"task": "signal", "adapters": "shared", "world_model": _WORLD, "lora": {"r": 4}},
    "league": {
        "task": "kuhn", "league": {"mode": "past"},
        "agent": {"spans": {"intend": False, "foresee": False, "say": False}},
    },
    "latent": {
        "task": "rendezvous", "adapters": "shared",
        "agent": {"codec": {"type": "latent", "tokens": 2, "dims": 3}}, "latent_start": {"steps": 0},
    },
    "transcript": {"task": "rendezvous", "agent": {"context": "transcript"}, "warm_start": _ADAPTERS_ONLY},
    "hub": {"task": "rendezvous", "model": HUB, "warm_start": _ADAPTERS_ONLY},
}  # fmt: skip


def make_run(kind: str, root: Path) -> Path:
    """A finished run whose adapters differ from the base and from one another."""
    recipe = Recipe.model_validate({**_NOTHING, **RECIPES[kind], "keep_episodes": False})
    if kind == "transcript":
        recipe = recipe.model_copy(update={"model": str(long_checkpoint(root / f"{kind}-base"))})
    run = train(recipe, root / kind)
    model = TransformersModel.load(base_of(recipe, run), recipe.lora)
    folders = [*sorted((run / "adapters").iterdir())]
    if recipe.world_model is not None:
        folders.append(run / "world" / "adapter")
    if recipe.league is not None:
        for name in ("team@1", "team@12"):
            shutil.copytree(run / "adapters" / "team", run / "league" / name)
            folders.append(run / "league" / name)
    for number, folder in enumerate(folders):
        name = f"adapter-{number}"
        model.load_adapter(name, folder)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, value in model.adapter_parameters(name).items():
                if "lora_B" in key:
                    value.normal_(0, 0.1, generator=generator)
        model.save_adapter(name, folder)
        model.delete_adapter(name)
    return run


def long_checkpoint(folder: Path) -> Path:
    """A chat checkpoint whose context holds labelled prompts."""
    build_chat_checkpoint(folder, "qwen3", 3)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    (folder / "optimizer.pt").write_bytes(b"nothing that anybody needs")
    return folder


def hub_cache(home: Path) -> Mapping[str, str]:
    """A cache of the hub that holds `HUB`, and the variables under which it is found, without a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = home / "hub" / f"models--{HUB.replace('/', '--')}"
    long_checkpoint(place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    return {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}

