"""Rollouts on an engine of their own: which one, and how its adapters follow the trainer's.

Parts: `Engine`, `RolloutSettings` (the recipe's section `rollout`), `rollout_engine` (what rollouts are played with)
and `Publisher` (gives the trainer's adapters to it as files, never merged into the base).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pydantic import Field

from preconcert.core import ConfigError
from preconcert.models import LanguageModel, LoraSettings, TransformersModel, VLLMSettings
from preconcert.training.reporter import Reporter

if TYPE_CHECKING:
    from preconcert.models.vllm_model import VLLMModel


class Engine(StrEnum):
    """What samples."""

    TRANSFORMERS = "transformers"
    """The model that is trained, in this process."""
    VLLM = "vllm"
    """vLLM with a copy of the adapters: an engine of its own, or the server at `rollout.url`."""


class RolloutSettings(VLLMSettings):
    """What samples rollouts, and how far behind the trainer it may be. All keys but `engine` are vLLM's."""

    engine: Engine = Engine.TRANSFORMERS
    """`transformers` or `vllm`."""
    staleness: int = Field(0, ge=0, le=64)
    """How many iterations the adapters that a rollout is played with may lag behind the trainer's. 0: play, then train,
    then publish. From 1 on the next rollout is played while the trainer works on this one; larger numbers publish less
    often. `update.correction` weighs for the difference."""


@runtime_checkable
class Sampler(Protocol):
    """A language model whose adapters can be replaced while it serves."""

    def publish(self, name: str, path: Path, version: int) -> None:
        """Replace an adapter by that of a folder in peft's format; later requests get the new one."""
        ...


class Publisher:
    """Keeps a sampler's adapters as fresh as settings ask for.

    Args:
        trained: holds the adapters that learn.
        sampler: plays with copies of them.
        names: the adapters that learn.
        folder: where they are written on their way; the sampler must be able to read it.
        staleness: how many iterations the copies may lag behind.
    """

    def __init__(
        self, trained: TransformersModel, sampler: Sampler, names: Sequence[str], folder: Path, staleness: int = 0
    ) -> None:
        self.trained = trained
        self.sampler = sampler
        self.names = tuple(names)
        self.folder = folder
        self.staleness = staleness
        self.version = -1
        """Iterations behind the published adapters; -1 before the first time."""
        self.seconds = 0.0
        """What the last publication took; 0 where there was none."""

    def publish_for(self, iteration: int, present: int) -> bool:
        """Publish the trainer's adapters unless a rollout for an iteration may still be played with those out there.

        Args:
            iteration: the rollout is trained on in this one.
            present: iterations behind the trainer's adapters as they are now.

        Returns:
            Whether they were published.
        """
        started = time.perf_counter()
        self.seconds = 0.0
        if self.version >= 0 and (self.version == present or iteration - self.version <= self.staleness):
            return False
        for name in self.names:
            place = self.folder / name
            self.trained.save_adapter(name, place)
            self.sampler.publish(name, place, present)
        self.version = present
        self.seconds = time.perf_counter() - started
        return True


def check_engine(settings: RolloutSettings, world: int) -> None:
    """Raises:
    ConfigError: every process of several would start an engine of its own on the same card.
    """
    if settings.engine is Engine.VLLM and settings.url is None and world > 1:
        raise ConfigError(
            f"rollout.engine=vllm in {world} processes needs a vLLM server that they share: start one and set "
            "rollout.url, for example rollout.url=http://127.0.0.1:8000"
        )


def start_vllm(
    base: str | Path, lora: LoraSettings, dtype: str, settings: RolloutSettings, writer: TransformersModel | None = None
) -> VLLMModel:
    """The engine that the settings describe.

    Args:
        base: a checkpoint folder, or a name of the hub.
        lora: the shape of the adapters.
        dtype: of the weights.
        settings: the recipe's `rollout`.
        writer: writes the latent messages of agents that talk in vectors; None where they talk in words.

    Raises:
        ModelError: vLLM is not installed, or the engine or server does not come up.
    """
    from preconcert.models.vllm_model import VLLMModel

    if writer is not None:
        settings = settings.model_copy(update={"latents": True})
    return VLLMModel.load(base, lora, dtype, settings, writer)


@contextmanager
def rollout_engine(
    settings: RolloutSettings,
    trained: TransformersModel,
    base: str | Path,
    dtype: str,
    adapters: Mapping[str, Path],
    latents: bool,
    reporter: Reporter,
) -> Iterator[LanguageModel]:
    """What rollouts are played with, closed in the end.

    Args:
        settings: the recipe's `rollout`.
        trained: the model that learns; it plays, too, unless the settings name another engine.
        base: its base: a checkpoint folder, or a name of the hub.
        dtype: of the weights.
        adapters: by name, the folders that the engine begins with.
        latents: agents talk in vectors, which the trained model then writes.
        reporter: is told of what takes long.

    Raises:
        ModelError: the engine does not come up.
    """
    if settings.engine is Engine.TRANSFORMERS:
        yield trained
        return
    reporter.say("starting vLLM" if settings.url is None else f"rollouts by the vLLM server at {settings.url}")
    engine = start_vllm(base, trained.lora, dtype, settings, trained if latents else None)
    try:
        for name, folder in adapters.items():
            engine.load_adapter(name, folder)
        yield engine
    finally:
        engine.close()


def publisher_of(
    settings: RolloutSettings, trained: TransformersModel, sampler: LanguageModel, names: Sequence[str], folder: Path
) -> Publisher | None:
    """Who keeps a sampler's adapters fresh; None where it is the trained model itself."""
    if sampler is trained:
        return None
    if not isinstance(sampler, Sampler):
        raise ConfigError(f"rollout.engine={settings.engine.value}: {type(sampler).__name__} takes no new adapters")
    return Publisher(trained, sampler, names, folder, settings.staleness)
