"""The part of `check_env` that is about views: well formed, true to every text, and as determined as they claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from preconcert.core import EnvError, GrammarError, Observation, TaskLanguage, View, ViewField

Seen: TypeAlias = "dict[tuple[str, tuple[str, ...], tuple[tuple[str, str], ...]], tuple[str, ...]]"
"""By agent, its view's values and the joint action: the values that followed."""


def check_words(what: str, words: Sequence[str]) -> None:
    """A non-empty tuple of unique words without white space."""
    if not isinstance(words, tuple) or not words:
        raise EnvError(f"{what} must be a non-empty tuple of words, not {words!r}")
    for word in words:
        if not isinstance(word, str) or not word or word.split() != [word]:
            raise EnvError(f"{what}: {word!r} is not a word without white space")
    if len(set(words)) != len(words):
        raise EnvError(f"{what} must be unique: {words!r}")


def check_view(language: TaskLanguage) -> None:
    """Is every declared view well formed?"""
    if language.view is not None and language.views:
        raise EnvError("language.view and language.views are both given; one view for all agents, or one for each")
    if language.view is not None:
        _check_fields(language.view, "language.view")
    for agent, view in language.views:
        _check_fields(view, f"language.views of {agent!r}")


def _check_fields(view: View, where: str) -> None:
    if not isinstance(view, View) or not view.fields:
        raise EnvError(f"{where} must be a View with fields or None, not {view!r}")
    names = [field.name for field in view.fields]
    if len(set(names)) != len(names):
        raise EnvError(f"{where}: field names must be unique: {names!r}")
    for field in view.fields:
        _check_field(field, f"{where} field {field.name!r}")


def _check_field(field: ViewField, where: str) -> None:
    check_words(where, field.choices)
    if field.label != " ".join(field.label.split()):
        raise EnvError(f"{where}: label {field.label!r} must be words with single spaces between them")
    if field.number and field.choices != tuple(str(number) for number in range(len(field.choices))):
        raise EnvError(f"{where}: a number's choices must be 0, 1, ... in order, not {field.choices!r}")
    if field.places and len(field.places) != len(field.choices):
        raise EnvError(f"{where}: {len(field.places)} places for {len(field.choices)} choices")
    if any(not 0 <= place <= 1 for place in field.places):
        raise EnvError(f"{where}: places must be from 0 to 1: {field.places!r}")


def check_view_text(language: TaskLanguage, observation: Observation, where: str) -> None:
    """Does the view read this text, write it back, and agree with the forecast fields of the same name?"""
    view = language.view_of(observation.agent)
    if view is None:
        return
    name = "language.view" if language.view is not None else "language.views"
    try:
        values = view.parse(observation.text)
    except GrammarError as error:
        raise EnvError(f"{where}: {name} does not read {observation.text!r}: {error}") from None
    if view.render(values) != observation.text:
        raise EnvError(f"{where}: {name} writes {view.render(values)!r} for {observation.text!r}")
    for field, value in zip(view.fields, values, strict=True):
        foretold = observation.fields.get(field.name, value)
        if foretold != value:
            raise EnvError(f"{where}: {field.name} is {value!r} in the text, but {foretold!r} in fields")


def check_determined(
    language: TaskLanguage,
    steps: Sequence[tuple[Mapping[str, Observation], Mapping[str, str], Mapping[str, Observation]]],
    seen: Seen,
) -> None:
    """Do fields that claim to be determined ever take two values after equal views and joint actions?

    Args:
        language: of the environment; agents whose views it does not describe are left out.
        steps: views before, joint action, views after.
        seen: what followed what so far; filled further, so that episodes are compared with each other too.
    """
    name = "language.view" if language.view is not None else "language.views"
    for before, actions, after in steps:
        joint = tuple(sorted(actions.items()))
        for agent, observation in before.items():
            view = language.view_of(agent)
            if view is None:
                continue
            values = view.parse(observation.text)
            following = view.parse(after[agent].text)
            known = seen.setdefault((agent, values, joint), following)
            for field, one, other in zip(view.fields, known, following, strict=True):
                if field.determined and one != other:
                    raise EnvError(
                        f"{name} field {field.name!r} claims to be determined, but after {observation.text!r} "
                        f"of {agent!r} and {dict(actions)!r} it was {one!r} once and {other!r} another time"
                    )
