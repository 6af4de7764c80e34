"""A cache of warm-started bases, addressed by what makes them, so that runs which differ later share one.

Parts: `warm_basis` (the part of a recipe that the supervised phase reads; it is carried out from this part alone, so
that nothing else can have an effect), `warm_key` (its hash), `WarmCache` (folders by key, each made once, also when
several processes ask at the same time). The making itself is in `run.py`.

The key holds the versions of the libraries but not the commit: a cache is for runs of one state of the code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from preconcert.agents import AgentSettings, SlotsSettings
from preconcert.agents.codecs import LatentCodecSettings
from preconcert.models import StarterSettings
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter
from preconcert.training.warm_start import WarmStartMethod
from preconcert.training.world_settings import WorldModelSettings

BASIS = ("task", "params", "model", "dtype", "starter", "lora", "agent", "channels", "warm_start", "seed", "threads")
"""Keys of a recipe that the supervised phase reads."""
_LIBRARIES = ("torch", "transformers", "trl", "peft")


def warm_basis(recipe: Recipe) -> Recipe:
    """The recipe with everything at its default that the supervised phase does not read."""
    read = {name: getattr(recipe, name) for name in BASIS}
    read["agent"] = in_words(recipe.agent)
    if recipe.world_model is not None:
        read["world_model"] = WorldModelSettings(**world_part(recipe))
    return Recipe(**read)


def in_words(settings: AgentSettings) -> AgentSettings:
    """The same agents talking in the task's own words, where they talk in vectors; they as they are otherwise."""
    if not isinstance(settings.codec, LatentCodecSettings):
        return settings
    return settings.model_copy(update={"codec": SlotsSettings()})


def world_part(recipe: Recipe) -> dict[str, Any]:
    """What the supervised phase reads of the section `world_model`; empty without one."""
    section = recipe.world_model
    if section is None:
        return {}
    # Without rows for the base only its words are different.
    mixed = {
        "random_episodes": section.random_episodes,
        "tell_partners": section.tell_partners,
        "own_words": section.own_words,
        "recall": section.recall,
    }
    return {"share": section.share, **(mixed if section.share else {})}


def warm_key(recipe: Recipe, first_adapter: str) -> str:
    """The hash of everything that the supervised phase depends on.

    Args:
        recipe: of the run.
        first_adapter: the adapter that is trained under method `lora`; its name seeds it. It has no effect otherwise.
    """
    return _hash(_supervised(recipe, first_adapter))


def world_key(recipe: Recipe, assignment: Mapping[str, str]) -> str:
    """The hash of everything that a run's world model depends on before reinforcement learning.

    Args:
        recipe: of the run, with a section `world_model`.
        assignment: adapter by agent, of the team whose play it learns from.
    """
    section = recipe.world_model
    assert section is not None
    content = _supervised(recipe, next(iter(assignment.values())))
    content["world_model"] = section.model_dump(mode="json", exclude={"refresh_every", "refresh_steps"})
    content["channel"] = recipe.channel.told()
    content["assignment"] = dict(assignment)
    return _hash(content)


def _supervised(recipe: Recipe, first_adapter: str) -> dict[str, Any]:
    """Everything that the supervised phase depends on."""
    content: dict[str, Any] = json.loads(warm_basis(recipe).model_dump_json(include=set(BASIS)))
    if content["agent"]["codec"] == SlotsSettings().model_dump(mode="json"):
        del content["agent"]["codec"]  # as it was before there were others
    if not content["channels"]:
        del content["channels"]
    if content["starter"]["family"] == StarterSettings().family:
        del content["starter"]["family"]
    if recipe.world_model is not None:  # recipes without one keep the keys that they always had
        content["world_model"] = world_part(recipe)
    content["adapter"] = first_adapter if recipe.warm_start.method is WarmStartMethod.LORA else None
    content["libraries"] = {name: metadata.version(name) for name in _LIBRARIES}
    content["cuda"] = torch.cuda.is_available()
    return content


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


class WarmCache:
    """Folders by key.

    Args:
        folder: made when the first entry is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, key: str) -> bool:
        return (self.folder / key).is_dir()

    def copy(self, key: str, out: Path, make: Callable[[Path], None], reporter: Reporter) -> None:
        """Copy an entry's content into a folder; make the entry first if there is none.

        Args:
            key: from `warm_key`.
            out: an existing folder.
            make: fills an empty folder. What it raises leaves no entry behind.
            reporter: is told about waiting.
        """
        shutil.copytree(self.entry(key, make, reporter), out, dirs_exist_ok=True)

    def entry(self, key: str, make: Callable[[Path], None], reporter: Reporter) -> Path:
        """The folder of an entry, not to be changed; made first if there is none. Arguments as in `copy`."""
        entry = self.folder / key
        if not entry.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            reporter.stage("shared warm start", 1)
            with FileLock(self.folder / f"{key}.lock"):  # the system lets go of it when its holder dies
                if not entry.is_dir():
                    beside = self.folder / f"{key}.new"
                    shutil.rmtree(beside, ignore_errors=True)
                    beside.mkdir()
                    make(beside)
                    os.replace(beside, entry)
        return entry
