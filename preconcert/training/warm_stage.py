"""The warm start of a run: a starter is built, imitates scripted play, and every agent gets its adapter.

Parts: `warm_start` (the stage) and `imitate` (what runs can share of it).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from preconcert.agents import codec_of, turn_format_of
from preconcert.core import Env, derive_seed
from preconcert.models import TransformersModel, build_starter
from preconcert.prompts import starter_words
from preconcert.training.imitation import scripted_episodes
from preconcert.training.json_file import write_json
from preconcert.training.progress import LossProgress
from preconcert.training.recipe import STARTER, Recipe
from preconcert.training.reporter import Reporter
from preconcert.training.run_folder import adapter_names, base_of
from preconcert.training.warm_cache import WarmCache, warm_basis, warm_key
from preconcert.training.warm_start import WarmStartMethod, fine_tune, supervised_examples
from preconcert.training.world_stage import mix_world_rows

_IMITATOR = "imitator"
"""The adapter that method `lora` trains, until the agents' own are copied from it."""
_IMITATION = "imitation.json"
"""What the supervised phase found, until the adapters stand."""


def warm_start(
    recipe: Recipe,
    out: Path,
    env: Env,
    assignment: Mapping[str, str],
    reporter: Reporter,
    cache: WarmCache | None = None,
) -> dict[str, Any]:
    """Build or load the base, imitate scripted play, and write `warm/` (and `base/`)."""
    marker = out / "warm_start.json"
    if marker.is_file():
        return json.loads(marker.read_text())
    for name in ("warm", "base", _IMITATOR):
        shutil.rmtree(out / name, ignore_errors=True)
    names = adapter_names(recipe, assignment)
    basis = warm_basis(recipe)
    if cache is None:
        imitate(basis, out, env, names[0], reporter)
    else:
        cache.copy(
            warm_key(recipe, names[0]), out, lambda folder: imitate(basis, folder, env, names[0], reporter), reporter
        )
    model = TransformersModel.load(base_of(recipe, out), recipe.lora, recipe.dtype)
    copied = names[0] if (out / _IMITATOR).is_dir() else None
    if copied is not None:
        model.load_adapter(copied, out / _IMITATOR)
    for name in names:
        if name not in model.adapters:
            model.add_adapter(name, derive_seed(recipe.seed, "adapter", name), copied)
        model.save_adapter(name, out / "warm" / name)
    found = json.loads((out / _IMITATION).read_text())
    write_json(marker, found)
    (out / _IMITATION).unlink()
    shutil.rmtree(out / _IMITATOR, ignore_errors=True)
    return found


def imitate(basis: Recipe, folder: Path, env: Env, adapter: str, reporter: Reporter) -> None:
    """The part of the warm start that runs can share: `base/` or `imitator/` in a folder, and what was found.

    Args:
        basis: from `warm_basis`.
        folder: an existing folder.
        env: of the task, for its words.
        adapter: the name that seeds the imitator under method `lora`.
        reporter: receives progress.
    """
    started = time.perf_counter()
    settings = basis.warm_start
    codec = codec_of(basis.agent.codec, env.language, basis.agent.spans)
    count = max(settings.episodes, 64 if basis.model == STARTER else 0)
    episodes = scripted_episodes(basis, codec, count, reporter, basis.channels)
    source = basis.model
    if basis.model == STARTER:
        texts = [turn.observation.text for e in episodes for t in e.trajectories.values() for turn in t.turns]
        texts += [t.final_observation.text for e in episodes for t in e.trajectories.values()]
        digits = basis.world_model is not None
        words = starter_words([*texts, *getattr(env, "words", ())], env.language, env.agents, digits)
        source = str(build_starter(words, folder / "blank", derive_seed(basis.seed, "starter"), basis.starter))
    model = TransformersModel.load(source, basis.lora, basis.dtype)
    log: list[dict[str, float]] = []
    if settings.episodes:
        turn_format = turn_format_of(model.tokenizer, basis.agent, codec)
        examples = supervised_examples(episodes, turn_format, basis.agent)
        examples, settings = mix_world_rows(basis, episodes, examples, turn_format, reporter)
        reporter.stage("warm start", settings.steps)
        callbacks: list[TrainerCallback] = [LossProgress(reporter)]
        scratch = folder / "scratch"
        seed = derive_seed(basis.seed, "warm start")
        if settings.method is WarmStartMethod.FULL:
            log = fine_tune(model.base, model.tokenizer, examples, settings, scratch, seed, callbacks)
        else:
            model.add_adapter(adapter, derive_seed(basis.seed, "adapter", adapter))
            log = fine_tune(model.model, model.tokenizer, examples, settings, scratch, seed, callbacks)
            model.save_adapter(adapter, folder / _IMITATOR)
        shutil.rmtree(scratch, ignore_errors=True)
    if settings.episodes and settings.method is WarmStartMethod.FULL:
        _save_base(model, folder / "base")
    elif basis.model == STARTER:
        shutil.copytree(folder / "blank", folder / "base")
    shutil.rmtree(folder / "blank", ignore_errors=True)
    judged = [e.success for e in episodes if e.success is not None]
    found = {
        "episodes": len(episodes),
        "log": log,
        "wall_s": time.perf_counter() - started,
        "script_success": sum(judged) / len(judged) if judged else None,
    }
    write_json(folder / _IMITATION, found)


def _save_base(model: TransformersModel, folder: Path) -> None:
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    model.base.save_pretrained(beside)
    model.tokenizer.save_pretrained(beside)
    os.replace(beside, folder)
