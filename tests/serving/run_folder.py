"""A finished run as a folder, made at once: random weights, adapters that matter, a recipe."""

from __future__ import annotations

from pathlib import Path

from preconcert.training.json_file import write_json
from preconcert.training.recipe import Recipe
from tests.training.teams import LORA, PARAMS, SHAPE, TASK, load, starter_checkpoint


def run_folder(folder: Path) -> Path:
    """Make it."""
    starter_checkpoint(folder / "base")
    model = load(folder / "base")
    for name in model.adapters:
        model.save_adapter(name, folder / "adapters" / name)
    recipe = Recipe(task=TASK, params=PARAMS, starter=SHAPE, lora=LORA)
    write_json(folder / "recipe.json", recipe.model_dump(mode="json"))
    return folder
