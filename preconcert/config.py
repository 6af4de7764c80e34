"""Recipes from files: YAML, dotted overrides on top, one pydantic model in the end.

Whatever cannot be used becomes one line that names the key, the value and what would have been accepted. YAML is read
by the rules of version 1.2, where `on` and `off` are words and `1e-3` is a number.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from preconcert.core import ConfigError, UnknownNameError, describe, nearest
from preconcert.envs import TALK_ROUNDS, make_env, task_class, without_rounds

if TYPE_CHECKING:  # it brings torch along, which takes seconds; a misspelt file name is answered at once
    from preconcert.training.recipe import Recipe

SectionT = TypeVar("SectionT", bound=BaseModel)

RECIPE_FILE = "recipe.json"
"""What a run folder keeps its recipe in."""

PLAY_KEYS = ("params", "agent", "channel", "rollout")
"""Parts of a recipe that say how a finished run plays; the rest made it and cannot be changed afterwards."""

ALIASES = {"messages": "channel.mode", "drop": "channel.drop"}
"""Short forms for evaluation."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides and check everything that can be checked before a run.

    Args:
        path: a YAML file, a run folder, or a run's recipe.json.
        overrides: `dotted.key=value`, values as in YAML.

    Raises:
        ConfigError: in one or two lines, what is wrong and what would be right.
    """
    file = path / RECIPE_FILE if path.is_dir() else path
    content = _read(file)
    for override in overrides:
        key, value = parse_override(override)
        _set(content, key.split("."), value, key)
    recipe = _recipe(content)
    check_play(recipe)
    _check_names(recipe)
    return recipe


def load_run(run: Path) -> Recipe:
    """The recipe of a run folder.

    Raises:
        ConfigError: there is no such folder, or it is no run.
    """
    if not run.is_dir():
        beside = run.parent if run.parent.is_dir() else Path()
        runs = [str(path.parent) for path in sorted(beside.glob(f"*/{RECIPE_FILE}"))]
        raise ConfigError(f"no run folder at {str(run)!r}; {nearest(str(run), runs)}")
    return load_recipe(run)


def override_play(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The same run played otherwise.

    Args:
        recipe: of the run.
        overrides: of `params`, `agent` and `channel`; `messages` and `drop` are short for two of them.

    Raises:
        ConfigError: an unknown key or value, or a key that only training reads.
    """
    from preconcert.training.recipe import Recipe

    content = json.loads(recipe.model_dump_json())
    for override in overrides:
        key, value = parse_override(override)
        key = ALIASES.get(key, key)
        top = key.partition(".")[0]
        if top not in PLAY_KEYS:
            if top in Recipe.model_fields:
                raise ConfigError(f"{key} belongs to training; a finished run takes {_listed([*PLAY_KEYS, *ALIASES])}")
            raise ConfigError(f"unknown key {key!r}; {nearest(key, [*PLAY_KEYS, *ALIASES])}")
        _set(content, key.split("."), value, key)
    changed = _recipe(content)
    check_play(changed)
    return changed


def section(model: type[SectionT], overrides: Sequence[str], prefix: str) -> SectionT:
    """Settings that stand on their own, from overrides alone.

    Args:
        model: of the settings.
        overrides: `key=value`, without the prefix.
        prefix: goes before every key in messages.

    Raises:
        ConfigError: an unknown key or value.
    """
    content: dict[str, Any] = {}
    for override in overrides:
        key, value = parse_override(override)
        _set(content, key.split("."), value, key)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(describe(error, model, content, prefix)) from None


def parse_override(text: str) -> tuple[str, Any]:
    """`dotted.key=value` as key and value.

    Raises:
        ConfigError: it has another form.
    """
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[^\s.]+(\.[^\s.]+)*", key):
        raise ConfigError(f"override {text!r} is not of the form key=value")
    if key == f"params.{TALK_ROUNDS}":
        raise ConfigError(f"override {text!r}: rounds of talk are set by channel.rounds")
    try:
        return key, yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: {_problem(error)}") from None


def check_play(recipe: Recipe) -> None:
    """Try the task's name and parameters.

    Raises:
        ConfigError: the task, one of its parameters or a channel's setting cannot be used.
    """
    from preconcert.agents.channel import check_topology

    found = task_class(recipe.task)
    params = getattr(found, "Params", None)
    if isinstance(params, type) and issubclass(params, BaseModel):
        own = without_rounds(recipe.params)
        try:
            params.model_validate(own)
        except ValidationError as error:
            raise ConfigError(describe(error, params, own, "params.")) from None
    env = make_env(recipe.task, recipe.params, 0, "train")
    check_topology(recipe.channel.topology, env, recipe.task)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As always, after a look for repeated keys."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: _number(node.value))


def _number(text: str) -> float:
    return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        if file.name == RECIPE_FILE and file.parent.is_dir():
            raise ConfigError(f"{str(file.parent)!r} is not a run folder: it has no {RECIPE_FILE}")
        raise ConfigError(f"no recipe at {str(file)!r}; {_nearest_recipe(file)}")
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{str(file)!r}: {_problem(error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{str(file)!r} is not a recipe: it must be a mapping of keys, e.g. `task: rendezvous`")
    return content


def _nearest_recipe(file: Path) -> str:
    folders = dict.fromkeys((file.parent, Path("recipes")))
    found = {path.name: path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.y*ml"))}
    close = difflib.get_close_matches(file.name, found, n=1, cutoff=0.4)
    stem = difflib.get_close_matches(file.stem, [Path(name).stem for name in found], n=1, cutoff=0.5)
    if not close and stem:
        close = [name for name in found if Path(name).stem == stem[0]]
    if close:
        return f"did you mean {str(found[close[0]])!r}?"
    return f"known: {', '.join(map(str, found.values())) or 'none'}"


def _problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    said = " ".join(str(getattr(error, "problem", None) or error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {said}" if mark is not None else said


def _set(content: dict[str, Any], path: Sequence[str], value: Any, key: str) -> None:
    """Put a value where a dotted key says, making mappings on the way."""
    place = content
    for part in path[:-1]:
        inner = place.get(part)
        if not isinstance(inner, dict):
            inner = place[part] = {}
        place = inner
    place[path[-1]] = value


def _recipe(content: Mapping[str, Any]) -> Recipe:
    from preconcert.training.recipe import Recipe

    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise ConfigError(describe(error, Recipe, content)) from None


def _check_names(recipe: Recipe) -> None:
    """Agents, adapters, whose rewards are scaled, and the model's name."""
    from preconcert.training.recipe import STARTER
    from preconcert.training.run_folder import assign

    recipe.grpo.rewards.check(assign(recipe, make_env(recipe.task, recipe.params, 0, "train")))
    name = recipe.model
    close = [] if "/" in name else difflib.get_close_matches(name, [STARTER], cutoff=0.5)
    if close and name != STARTER and not Path(name).expanduser().exists():
        raise UnknownNameError("model", name, [STARTER])


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
