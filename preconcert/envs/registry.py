"""Task names: the built-in ones, and `module:Class` for a user's own environment."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel

from preconcert.core import ConfigError, Env, UnknownNameError, nearest
from preconcert.envs.talk import TalkRounds, rounds_of, without_rounds
from preconcert.envs.task import SPLITS, Task, parse_params

_TASKS: dict[str, type[Task[Any, Any]]] = {}
TaskT = TypeVar("TaskT", bound=type[Task[Any, Any]])


def register(task: TaskT) -> TaskT:
    """Class decorator: make a task known under its `name`."""
    known = _TASKS.setdefault(task.name, task)
    if known is not task:
        raise ConfigError(f"task {task.name!r} is already {known.__module__}.{known.__qualname__}")
    return task


def tasks() -> dict[str, type[Task[Any, Any]]]:
    """The built-in tasks by name, sorted."""
    return dict(sorted(_TASKS.items()))


def task_class(name: str) -> type[Env]:
    """The class behind a task name.

    Args:
        name: a built-in task, or `module:Class`, imported with the current directory on the path.
    """
    if ":" in name:
        return _import_class(name)
    if name not in _TASKS:
        raise UnknownNameError("task", name, _TASKS)
    return cast("type[Env]", _TASKS[name])


def make_env(task: str, params: Mapping[str, Any], seed: int, split: str = "train") -> Env:
    """One instance of a task.

    Args:
        task: a built-in name or `module:Class`.
        params: checked against the class's `Params` where it has one, else handed over as a dict. `talk_rounds` is
            every task's: that many rounds per step, of which the last is the step itself.
        seed: everything random in the instance follows from it.
        split: `train` or `heldout`.
    """
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    build = cast("Callable[..., Env]", task_class(task))
    rounds, own = rounds_of(params), without_rounds(params)
    model = getattr(build, "Params", None)
    checked = parse_params(task, model, own) if isinstance(model, type) and issubclass(model, BaseModel) else own
    env = build(checked, seed, split)
    return env if rounds == 1 else TalkRounds(env, rounds)


def _import_class(name: str) -> type[Env]:
    """Import `module:Class`."""
    module_name, _, class_name = name.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise ConfigError(f"task {name!r}: {module_name!r} is not a module name")
    try:
        with _current_directory_importable():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        here = [path.stem for path in Path.cwd().glob("*.py")]
        raise ConfigError(f"task {name!r}: no module {module_name!r}; {nearest(module_name, here)}") from None
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type) and hasattr(value, "step")]
        raise ConfigError(
            f"task {name!r}: no class {class_name!r} in module {module_name!r}; {nearest(class_name, classes)}"
        )
    return found


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    """The current directory at the front of the import path, as `python -m` has it."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
