"""The stage of a run in which its agents learn to talk in vectors: after the warm start, before the gate.

Parts: `train_latent_stage`. The warm start itself is that of a team that talks in words, so that runs with other codecs
share it; here its adapters get codecs, and both are trained (`latent_start.py`). The adapters in `warm/` are replaced
by what came of it, all at once.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preconcert.agents import SlotsSettings, codec_of, turn_format_of
from preconcert.agents.codecs import LatentCodecSettings
from preconcert.core import Env, TrainingError, derive_seed
from preconcert.models import LatentMethod, LatentSettings, TransformersModel
from preconcert.training.imitation import scripted_episodes
from preconcert.training.json_file import write_json
from preconcert.training.latent_lines import lines_of
from preconcert.training.latent_start import LatentStart, Seat, train_latents
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter
from preconcert.training.run_folder import base_of

LATENT_START = "latent_start.json"
TEACHER = "teacher"
"""The adapter that reads messages in words, for as long as the stage takes."""


def train_latent_stage(
    recipe: Recipe, out: Path, env: Env, assignment: Mapping[str, str], reporter: Reporter
) -> dict[str, Any] | None:
    """Give the adapters in `warm/` codecs and train both; None where agents talk in words, or that is done.

    Args:
        recipe: of the run.
        out: the run folder, after the warm start.
        env: of the task.
        assignment: adapter by agent.
        reporter: receives progress.

    Raises:
        TrainingError: the task has no messages.
    """
    codec = recipe.agent.codec
    if not isinstance(codec, LatentCodecSettings):
        return None
    beside, warm, old = out / "warm.new", out / "warm", out / "warm.old"
    if (out / LATENT_START).is_file():
        if beside.is_dir() or old.is_dir():  # it was cut off while the folders changed places
            _swap(beside, warm, old)
        return None
    if not env.language.message:
        raise TrainingError(f"agent.codec=latent: the task {recipe.task} has no messages")
    shutil.rmtree(beside, ignore_errors=True)
    started = time.perf_counter()
    model = TransformersModel.load(base_of(recipe, out), recipe.lora, recipe.dtype)
    names = tuple(dict.fromkeys(assignment.values()))
    for name in names:
        model.load_adapter(name, warm / name)
    shape = LatentSettings(**codec.model_dump(exclude={"type"}))
    model.add_adapter(TEACHER, 0, names[0])
    for name in names:
        model.add_codec(name, shape, derive_seed(recipe.seed, "codec", name))
    settings = recipe.latent_start
    log: list[dict[str, float]] = []
    if settings.steps and shape.method is LatentMethod.LEARNED:
        words = codec_of(SlotsSettings(), env.language, recipe.agent.spans)
        episodes = scripted_episodes(recipe, words, max(1, recipe.warm_start.episodes), reporter)
        student = turn_format_of(model.tokenizer, recipe.agent, codec_of(codec, env.language, recipe.agent.spans))
        teacher = turn_format_of(model.tokenizer, recipe.agent, words)
        lines = lines_of(
            episodes,
            dict.fromkeys(env.agents, student),
            dict.fromkeys(env.agents, teacher) if settings.distil else {},
            recipe.agent,
        )
        seats = {agent: Seat(model, name, TEACHER) for agent, name in assignment.items()}
        reporter.stage("latent messages", settings.steps)
        log = train_latents(LatentStart(seats, settings), lines, derive_seed(recipe.seed, "latents"), reporter)
    for name in names:
        model.save_adapter(name, beside / name)
    found = {"log": log, "wall_s": time.perf_counter() - started}
    write_json(out / LATENT_START, found)
    _swap(beside, warm, old)
    return found


def _swap(beside: Path, warm: Path, old: Path) -> None:
    """Put the new adapters in the place of the old ones; may be carried on after any part of it."""
    if beside.is_dir():
        if warm.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(warm, old)
        os.replace(beside, warm)
    shutil.rmtree(old, ignore_errors=True)
