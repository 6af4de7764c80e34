"""Rolling plans: one call per step, samples that differ, paths that end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from preconcert.core import ImaginedStep, Move
from preconcert.world_models.imagination import disagreement, imagine
from preconcert.world_models.tables import CountTable
from tests.world_models.worlds import LANGUAGE, VIEW, Knowing, cases, counted, request_of, seen

UP, ONE = ("up", "up"), ("up", "stay")
EPISODES = [counted([ONE, ONE, ONE, ONE], ["red", "red", "green", "green", "red"]), counted([UP, UP], ["red"] * 3)]


def shown(height: int, light: str, malformed: bool = False) -> ImaginedStep:
    observation = None if malformed else seen("a", height, light, 1)
    return ImaginedStep(observation, (), {}, 0.0, False, None, None, malformed)


def test_disagreement_is_the_share_of_fields_that_differ() -> None:
    same = shown(1, "red")
    assert disagreement([same], VIEW) == 0.0
    assert disagreement([same, same, same], VIEW) == 0.0
    assert disagreement([same, shown(2, "red")], VIEW) == 0.5
    # Pairs: one field, both fields, both fields.
    assert disagreement([same, shown(2, "red"), shown(3, "green")], VIEW) == pytest.approx((0.5 + 1 + 1) / 3)
    assert disagreement([same, shown(1, "red", malformed=True)], VIEW) == 1.0
    assert disagreement([same, shown(2, "red")], None) == 0.25  # words instead of fields


class Counting:
    """Hands on, and notes how many it was asked at a time."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.asked = inner, []  # type: ignore[var-annotated]

    def begin(self, requests: Any, pasts: Any) -> list[Any]:
        return self.inner.begin(requests, pasts)

    def advance(self, beliefs: Sequence[Any], moves: Sequence[Move], seeds: Sequence[int]) -> list[ImaginedStep]:
        self.asked.append(len(beliefs))
        return self.inner.advance(beliefs, moves, seeds)

    def judge(self, *asked: Any) -> list[Any]:
        return self.inner.judge(*asked)

    def finish(self, episode: str) -> None:
        """Nothing is held."""


def test_all_plans_and_samples_share_one_call_per_step() -> None:
    asked = [case for case in cases(EPISODES, LANGUAGE, (2, 4), 1) if case.request.agent == "a"]
    model = Counting(Knowing(asked))
    found = imagine(model, [c.request for c in asked], [c.past for c in asked], [c.moves for c in asked], samples=3)
    assert model.asked == [6, 6, 3, 3]  # the second episode is over after two steps
    assert [len(each.samples[0]) for each in found] == [4, 2]
    assert found[0].disagreement == (0.0,) * 4
    assert found[1].returns == (1.0, 1.0, 1.0)
    assert found[0].samples[0][-1].done


def test_what_is_malformed_ends_its_path() -> None:
    asked = [case for case in cases(EPISODES[:1], LANGUAGE, (4,), 1) if case.request.agent == "a"]
    [found] = imagine(Knowing(asked, malformed_from=2), [asked[0].request], [()], [asked[0].moves], samples=2)
    assert [len(path) for path in found.samples] == [2, 2]
    assert found.malformed == 1.0
    assert found.disagreement == (0.0, 1.0, 1.0, 1.0)


def test_imagination_follows_from_its_seed_alone() -> None:
    model = CountTable(EPISODES, LANGUAGE)
    requests = [request_of(EPISODES[0], "a", 0, "x"), request_of(EPISODES[1], "a", 0, "y")]
    plan = [Move("up"), Move("stay"), Move("up")]

    def texts(number: int, seed: int, both: bool) -> list[str]:
        some = requests if both else [requests[number]]
        found = imagine(model, some, [()] * len(some), [plan] * len(some), samples=4, seed=seed)
        each = found[number if both else 0]
        return [str(step.observation and step.observation.text) for path in each.samples for step in path]

    for number in (0, 1):
        assert texts(number, 5, True) == texts(number, 5, False)
    assert texts(0, 5, False) != texts(0, 7, False)
