"""The exception tree: one root, every class picklable, hints that name the nearest known name."""

from __future__ import annotations

import pickle

import pytest

from preconcert.core import ConfigError, PreconcertError, UnknownNameError, errors, nearest

TREE = sorted(
    (thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, PreconcertError)),
    key=lambda thing: thing.__name__,
)


def made(kind: type[PreconcertError]) -> PreconcertError:
    if kind is UnknownNameError:
        return UnknownNameError("task", "rendez-vous", iter(["signal", "rendezvous"]))
    return kind(f"{kind.__name__} of «x»: 3 ≠ 4")


def test_the_tree_is_complete() -> None:
    assert len(TREE) >= 9
    assert {thing.__name__ for thing in TREE} <= set(dir(__import__("preconcert.core", fromlist=["core"])))


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling(kind: type[PreconcertError], protocol: int) -> None:
    error = made(kind)
    error.add_note("in cell 4")
    back = pickle.loads(pickle.dumps(error, protocol))
    assert type(back) is kind
    assert str(back) == str(error)
    assert back.args == error.args
    assert vars(back) == vars(error)


def test_an_unknown_name_hints_at_the_nearest() -> None:
    error = made(UnknownNameError)
    assert isinstance(error, ConfigError)
    assert str(error) == "unknown task 'rendez-vous'; did you mean 'rendezvous'?"


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("singal", ["signal", "box_push"], "did you mean 'signal'?"),
        ("zzz", ["signal", "box_push"], "known: box_push, signal"),
        ("", ["b", "a"], "known: a, b"),
        ("x", [], "known: none"),
        ("lern_rate", iter(["learning_rate", "rank"]), "did you mean 'learning_rate'?"),
    ],
)
def test_nearest(name: str, known: list[str], hint: str) -> None:
    assert nearest(name, known) == hint
