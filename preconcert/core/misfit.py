"""What does not fit a pydantic model, in one line that names the key, the value and what would have been accepted."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, get_args

from pydantic import BaseModel

from preconcert.core.errors import nearest


class Misfit(Protocol):
    """Pydantic's `ValidationError`, or whatever else lists errors as it does."""

    def errors(self, *, include_url: bool = True) -> Any:
        """One mapping per error, with `type`, `loc`, `msg`, `input` and perhaps `ctx`."""
        ...


def describe(error: Misfit, model: type[BaseModel], content: Any, prefix: str = "") -> str:
    """The first thing that pydantic found, in one line.

    Args:
        error: what pydantic says.
        model: what was validated against.
        content: what was validated.
        prefix: goes before every key.
    """
    errors = error.errors(include_url=False)
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    path = _path(first["loc"], content, first["type"])
    key = prefix + ".".join(path)
    value = _short(first.get("input"))
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path, model, prefix, content)
    if kind == "missing":
        return f"{key} is missing"
    siblings = [one for one in errors if _path(one["loc"], content, one["type"]) == path]
    words = [word for one in siblings for word in re.findall(r"'([^']*)'", str(one.get("ctx", {}).get("expected", "")))]
    if words:
        given = first.get("input")
        hint = nearest(given, words) if isinstance(given, str) else f"known: {', '.join(words)}"
        return f"unknown {key} {value}; {hint}"
    wanted = _expected(kind, context)
    if wanted is not None:
        return f"{key} = {value}: expected {wanted}"
    return f"{key + ' = ' + value + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}"


def _path(loc: Sequence[int | str], content: Any, kind: str) -> list[str]:
    """The keys of a location, without the tags that pydantic adds for unions."""
    path: list[str] = []
    tagged = False
    for number, part in enumerate(loc):
        if not tagged and isinstance(content, Mapping) and content.get("type") == part and number + 1 < len(loc):
            tagged = True  # the member of a union, which may be called as one of its own keys is
            continue
        tagged = False
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            if kind != "missing" or number + 1 < len(loc):
                continue
        path.append(str(part))
    return path


def _unknown_key(path: Sequence[str], model: type[BaseModel], prefix: str, content: Any) -> str:
    level: type[BaseModel] | None = model
    for part in path[:-1]:
        content = content[part]
        level = _model_of(level, part, content) if level is not None else None
    key, name = prefix + ".".join(path), path[-1]
    known = list(level.model_fields) if level is not None else []
    before = prefix + "".join(f"{part}." for part in path[:-1])
    hints = [before + close for close in difflib.get_close_matches(name, known, n=1, cutoff=0.8)]
    hints += [prefix + full for full in _all_keys(model) if full.rpartition(".")[2] == name]
    hints += [before + close for close in difflib.get_close_matches(name, known, n=1, cutoff=0.5)]
    hint = f"did you mean {hints[0]!r}?" if hints else f"known: {', '.join(known)}"
    return f"unknown key {key!r} = {_short(content[name])}; {hint}"


def _model_of(model: type[BaseModel], name: str, content: Any = None) -> type[BaseModel] | None:
    """The model of a field, also where it may be null; of a union of models, the one that the content's `type` says."""
    field = model.model_fields.get(name)
    found: Any = field.annotation if field is not None else None
    if len(get_args(found)) == 2 and type(None) in get_args(found):
        found = next(member for member in get_args(found) if member is not type(None))
    if isinstance(content, Mapping) and "type" in content:
        for member in get_args(found):
            kind = getattr(member, "model_fields", {}).get("type")
            if kind is not None and kind.default == content["type"]:
                found = member
    return found if isinstance(found, type) and not get_args(found) and issubclass(found, BaseModel) else None


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name in model.model_fields:
        yield prefix + name
        inner = _model_of(model, name)
        if inner is not None:
            yield from _all_keys(inner, f"{prefix}{name}.")


_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping of keys",
    "mapping": "a mapping of keys",
    "model": "a mapping of keys",
}


def _expected(kind: str, context: Mapping[str, Any]) -> str | None:
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"{words} {context[key]:g}"
    return _KINDS.get(kind.partition("_")[0])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
