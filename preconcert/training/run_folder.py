"""What a run folder holds: its recipe, base and adapters, found, checked and loaded.

Parts: `prepare_folder` and `load_recipe_of` (the recipe), `assign` and `adapter_names` (who plays with what),
`base_of`, `load_model` and `load_players` (the models).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preconcert.core import ConfigError, Env, UnknownNameError
from preconcert.models import LanguageModel, TransformersModel
from preconcert.training.json_file import write_json
from preconcert.training.league import check_scripts, learners_of
from preconcert.training.recipe import Adapters, Recipe
from preconcert.training.sampler import Engine, start_vllm

RESULT = "result.json"


def assign(recipe: Recipe, env: Env) -> dict[str, str]:
    """Adapter by agent name.

    Raises:
        ConfigError: an agent, a frozen adapter or a league's script that does not exist.
    """
    if recipe.adapters is Adapters.PER_AGENT:
        assignment = {agent: agent for agent in env.agents}
    elif recipe.adapters is Adapters.SHARED:
        assignment = dict.fromkeys(env.agents, "team")
    else:
        assert isinstance(recipe.adapters, Mapping)
        for agent in recipe.adapters:
            if agent not in env.agents:
                raise UnknownNameError("agent", agent, env.agents)
        missing = [agent for agent in env.agents if agent not in recipe.adapters]
        if missing:
            raise ConfigError(f"adapters: no adapter is named for agent {missing[0]!r}")
        assignment = {agent: recipe.adapters[agent] for agent in env.agents}
    for name in recipe.frozen:
        if name not in assignment.values():
            raise UnknownNameError("adapter", name, sorted(set(assignment.values())))
    if recipe.league is not None:
        recipe.league.sides_of(env.agents)
        check_scripts(env, recipe.league.scripts)
        adapter_names(recipe, assignment)
    return assignment


def adapter_names(recipe: Recipe, assignment: Mapping[str, str]) -> tuple[str, ...]:
    """Every adapter that a run makes: those of its agents, and a league's."""
    names = tuple(dict.fromkeys(assignment.values()))
    return names if recipe.league is None else learners_of(recipe.league, names[0])


def prepare_folder(recipe: Recipe, out: Path, resume: bool, rank: int = 0) -> None:
    """Make or check the run folder.

    Raises:
        ConfigError: it holds something and `resume` is off, or it holds a run of another recipe.
    """
    file = out / "recipe.json"
    wanted = json.loads(recipe.model_dump_json())
    if file.is_file():
        if not resume and rank == 0:
            raise ConfigError(f"{str(out)!r} already holds a run; use --resume to go on, --fresh to start over")
        # A section that there was not yet when the run began is off by default.
        held = json.loads(Recipe(task=recipe.task).model_dump_json()) | json.loads(file.read_text())
        moved = held["rollout"]["engine"] != wanted["rollout"]["engine"]
        before, after = _compared(held, moved), _compared(wanted, moved)
        for key in sorted(set(before) | set(after)):
            if before.get(key) != after.get(key):
                raise ConfigError(
                    f"{str(out)!r} holds a run with {key}={_short(before.get(key))}, "
                    f"the recipe says {_short(after.get(key))}"
                )
        if rank == 0 and held != wanted:  # who samples, and where, does not make another run
            write_json(file, wanted)
        return
    if resume and rank == 0 and out.exists() and any(out.iterdir()):
        raise ConfigError(f"{str(out)!r} is not a run: it has no recipe.json")
    if not resume and out.is_dir() and any(out.iterdir()) and rank == 0:
        raise ConfigError(f"{str(out)!r} is not empty")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)


def _compared(recipe: Mapping[str, Any], moved: bool) -> dict[str, Any]:
    """What a run goes on with: everything but `rollout`, and under another engine the correction that comes with it."""
    update = {key: value for key, value in recipe["update"].items() if not (moved and key == "correction")}
    return {**{key: value for key, value in recipe.items() if key != "rollout"}, "update": update}


def load_recipe_of(run: Path) -> Recipe:
    """The resolved recipe of a run folder.

    Raises:
        ConfigError: it is not a run folder.
    """
    file = run / "recipe.json"
    if not file.is_file():
        raise ConfigError(f"{str(run)!r} is not a run folder: it has no recipe.json")
    return Recipe.model_validate_json(file.read_text())


def load_model(recipe: Recipe, run: Path, adapters: Path) -> TransformersModel:
    """A run's base with the adapters of a folder.

    Args:
        recipe: of the run.
        run: the run folder.
        adapters: `warm` or `adapters` of the run.
    """
    model = TransformersModel.load(base_of(recipe, run), recipe.lora, recipe.dtype)
    for folder in _adapter_folders(run, adapters):
        model.load_adapter(folder.name, folder)
    return model


def load_players(recipe: Recipe, run: Path, adapters: Path) -> LanguageModel:
    """The same on the engine that the recipe's `rollout` names, for playing."""
    if recipe.rollout.engine is Engine.TRANSFORMERS:
        return load_model(recipe, run, adapters)
    folders = _adapter_folders(run, adapters)
    writer = load_model(recipe, run, adapters) if recipe.agent.codec.type == "latent" else None
    model = start_vllm(base_of(recipe, run), recipe.lora, recipe.dtype, recipe.rollout, writer)
    for folder in folders:
        model.load_adapter(folder.name, folder)
    return model


def base_of(recipe: Recipe, run: Path) -> str | Path:
    """The run's own base, or the model that the recipe names."""
    base = run / "base"
    return base if base.is_dir() else recipe.model


def _adapter_folders(run: Path, adapters: Path) -> list[Path]:
    if not adapters.is_dir():
        raise ConfigError(f"the run {str(run)!r} has no {adapters.name!r} folder; is it finished?")
    return sorted(path for path in adapters.iterdir() if path.is_dir() and not path.name.startswith("."))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
