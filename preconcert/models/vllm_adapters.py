"""The adapters of a model whose weights are in an engine: checked, kept as folders, and named by version.

Parts: `AdapterStore`. An engine reads adapters from folders under names that are never used twice (`name@version`), as
its prefix cache is keyed by the adapter's name: a name with other weights behind it would be served with the old one's
keys and values. To the outside an adapter is its name.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from preconcert.core import ModelError, nearest
from preconcert.models.adapters import Adapters, LoraSettings
from preconcert.models.vllm_heads import HeadFit


class AdapterEngine(Protocol):
    """What an engine does with adapters."""

    def load(self, name: str, path: Path) -> None:
        """Make an adapter known under a name that was never used before."""
        ...

    def unload(self, name: str) -> None:
        """Forget an adapter."""
        ...


@dataclass
class _Held:
    """One version of an adapter."""

    inner: str
    """Its name in the engine."""
    folder: Path | None
    """Its files as peft has them; None where a server had it before we came."""
    version: int
    users: int = 0
    """Calls that use it at this moment."""
    retired: bool = False
    """Is a newer one served under its name?"""


class AdapterStore:
    """Adapters by name, for one engine.

    Args:
        config: of the base model.
        lora: the shape of every adapter.
        engine: where they are served.
        suffix: of the names in the engine, after the version; one that another process cannot have used.
    """

    def __init__(self, config: PretrainedConfig, lora: LoraSettings, engine: AdapterEngine, suffix: str = "") -> None:
        self._engine = engine
        self._suffix = suffix
        self._fit = HeadFit.of(config)
        # Without weights: shapes and names are all that a folder is checked against.
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        skeleton.name_or_path = getattr(config, "_name_or_path", "")
        self._shapes = Adapters(skeleton, lora)
        self._workspace = tempfile.TemporaryDirectory(prefix="preconcert-adapters-")
        self._held: dict[str, _Held] = {}
        self._used: set[str] = set()
        self._count = itertools.count()
        self._lock = threading.RLock()

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they were made."""
        return tuple(self._held)

    def check(self, name: str) -> None:
        """Raises:
        ModelError: there is no such adapter.
        """
        if name not in self._held:
            raise ModelError(f"unknown adapter {name!r}; {nearest(name, self.names)}")

    def version(self, name: str) -> int:
        """Which version of an adapter is served."""
        self.check(name)
        return self._held[name].version

    def adopt(self, name: str, inner: str, version: int) -> None:
        """Know an adapter that the engine serves already."""
        with self._lock:
            self._held[name] = _Held(inner, None, version)
            self._used.add(inner)

    def add(self, name: str, seed: int, source: str | None) -> None:
        """A fresh adapter, or a copy of another.

        Raises:
            ModelError: the name is taken or unusable, or the source is unknown.
        """
        with self._lock:
            if name in self._held:
                raise ModelError(f"adapter {name!r} exists already")
            if source is not None:
                self.put(name, self.folder(source), 0)
                return
            self._shapes.add(name, seed, None)
            folder = self._new_folder()
            self._shapes.save(name, folder, state=self._shapes.fresh(name, seed))
            self._serve(name, folder, 0)

    def put(self, name: str, path: Path, version: int | None) -> None:
        """Serve a folder under a name, in the place of what was there before.

        Args:
            name: the adapter's.
            path: a folder in peft's format; it is copied and may change afterwards.
            version: None for one more than the present one.

        Raises:
            ModelError: the folder is missing or corrupt, or made for another architecture.
        """
        path = Path(path)
        with self._lock:
            self._shapes.load(name, path)
            if version is None:
                version = self._held[name].version + 1 if name in self._held else 0
            folder = self._new_folder()
            shutil.copytree(path, folder)
            self._serve(name, folder, version)

    def folder(self, name: str) -> Path:
        """The files of an adapter as it is served.

        Raises:
            ModelError: it is unknown, or a server has it and we do not.
        """
        self.check(name)
        folder = self._held[name].folder
        if folder is None:
            raise ModelError(f"adapter {name!r} is on the server only: load it from its folder first")
        return folder

    def save(self, name: str, path: Path) -> None:
        """Write an adapter's folder; written beside and renamed."""
        source, path = self.folder(name), Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            shutil.copytree(source, beside, dirs_exist_ok=True)
            beside.chmod(0o755)
            if path.exists():
                shutil.rmtree(path)
            beside.rename(path)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise

    def delete(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            ModelError: there is no such adapter.
        """
        with self._lock:
            self.check(name)
            if name in self._shapes.names:
                self._shapes.delete(name)
            self._retire(self._held.pop(name))

    @contextmanager
    def using(self, names: Sequence[str | None]) -> Iterator[dict[str | None, str | None]]:
        """The engine's names of some adapters, which stay served as long as this is open."""
        with self._lock:
            held = {name: self._held[name] for name in set(names) if name is not None}
            for one in held.values():
                one.users += 1
        try:
            yield {None: None, **{name: one.inner for name, one in held.items()}}
        finally:
            with self._lock:
                for one in held.values():
                    one.users -= 1
                    if one.retired and not one.users:
                        self._drop(one)

    def close(self) -> None:
        """Remove the copies of the folders."""
        self._workspace.cleanup()

    def _serve(self, name: str, folder: Path, version: int) -> None:
        inner = f"{name}@{version}{self._suffix}"
        for again in itertools.count(1):
            if inner not in self._used:
                break
            inner = f"{name}@{version}.{again}{self._suffix}"
        served = folder
        if self._fit is not None:
            served = folder.with_name(folder.name + "-fitted")
            self._fit.adapter(folder, served)
        self._used.add(inner)
        self._engine.load(inner, served)
        before = self._held.get(name)
        self._held[name] = _Held(inner, folder, version)
        if before is not None:
            self._retire(before)

    def _retire(self, held: _Held) -> None:
        held.retired = True
        if not held.users:
            self._drop(held)

    def _drop(self, held: _Held) -> None:
        if held.folder is None:
            return  # it was there before us, and others may use it
        self._engine.unload(held.inner)
        shutil.rmtree(held.folder, ignore_errors=True)
        shutil.rmtree(held.folder.with_name(held.folder.name + "-fitted"), ignore_errors=True)

    def _new_folder(self) -> Path:
        return Path(self._workspace.name) / str(next(self._count))


def version_of(inner: str) -> tuple[str, int]:
    """Name and version from an engine's name; version 0 where there is none in it."""
    name, _, rest = inner.partition("@")
    digits: Any = rest.partition(".")[0]
    return (name, int(digits)) if digits.isdigit() else (inner, 0)
