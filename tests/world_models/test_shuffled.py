"""The shuffled control: the right form, from somewhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from preconcert.core import ModelError, Move
from preconcert.world_models.shuffled import ShuffledWorldModel, exchange
from preconcert.world_models.tables import CopyLast
from tests.world_models.worlds import LANGUAGE, counted, request_of

EPISODES = [counted([("up", "stay")] * 4, ["red"] * 5), counted([("stay", "up")] * 3, ["green"] * 4)]


@pytest.mark.parametrize("sizes", [(1, 1), (3, 3), (2, 5, 3, 1), (4, 1, 1, 1, 1)])
def test_nobody_gets_an_answer_of_its_own_episode(sizes: tuple[int, ...]) -> None:
    groups = [(f"e{number}", f"m{index}") for number, size in enumerate(sizes) for index in range(size)]
    for seed in range(20):
        order = exchange(groups, seed)
        assert sorted(order) == list(range(len(groups)))
        assert all(groups[place][0] != groups[other][0] for place, other in enumerate(order))
    assert len({tuple(exchange(groups, seed)) for seed in range(20)}) > 1 or len(groups) == 2


def test_within_one_episode_moves_are_exchanged() -> None:
    groups = [("e", f"m{index // 2}") for index in range(6)]
    for seed in range(20):
        order = exchange(groups, seed)
        assert sorted(order) == list(range(6))
        assert all(groups[place][1] != groups[other][1] for place, other in enumerate(order))
    assert exchange([("e", "m")] * 3, 0) in ([1, 2, 0], [2, 0, 1])
    assert exchange([], 0) == []


def test_what_the_inner_model_writes_is_counted() -> None:
    inner = CopyLast(EPISODES, LANGUAGE)
    model = ShuffledWorldModel(inner, 0)
    assert model.tokens_generated == 0
    inner.tokens_generated = 7  # type: ignore[attr-defined]
    assert model.tokens_generated == 7


def test_answers_are_exchanged_and_beliefs_are_kept() -> None:
    inner = CopyLast(EPISODES, LANGUAGE)
    model = ShuffledWorldModel(inner, 0)
    requests = [request_of(EPISODES[0], "a", 2, "one"), request_of(EPISODES[1], "a", 0, "two")]
    beliefs = model.begin(requests, [(), ()])
    for _ in range(3):
        steps = model.advance(beliefs, [Move("up"), Move("stay")], [1, 2])
        assert [step.observation.text for step in steps if step.observation] == [
            requests[1].observation.text, requests[0].observation.text,
        ]  # fmt: skip
        beliefs = [step.belief for step in steps]


def test_a_request_alone_gets_an_earlier_answer() -> None:
    model = ShuffledWorldModel(CopyLast(EPISODES, LANGUAGE), 0)
    request = request_of(EPISODES[0], "a", 2, "one")
    [belief] = model.begin([request], [()])
    with pytest.raises(ModelError, match="alone in the first batch"):
        model.advance([belief], [Move("up")], [0])
    other = replace(request_of(EPISODES[1], "a", 0, "two"))
    model.advance(model.begin([request, other], [(), ()]), [Move("up")] * 2, [0, 1])
    [step] = model.advance([belief], [Move("up")], [0])
    assert step.observation is not None
    assert step.observation.text == other.observation.text


def test_answers_stay_with_their_agent() -> None:
    """Names of others and owners of views are those of the request, whoever's answer it is."""
    model = ShuffledWorldModel(CopyLast(EPISODES, LANGUAGE), 3)
    requests = [request_of(EPISODES[n % 2], "ab"[n // 2 % 2], n % 3, f"e{n % 2}") for n in range(8)]
    requests.append(request_of(EPISODES[0], "b", 1, "alone"))
    beliefs = model.begin(requests, [()] * 9)
    for some in (slice(0, 9), slice(0, 3), slice(2, 4)):
        count = len(beliefs[some])
        steps = model.advance(beliefs[some], [Move("up")] * count, range(count))
        for request, step in zip(requests[some], steps, strict=True):
            assert step.observation is not None
            assert step.observation.agent == request.agent
            assert tuple(step.others) == request.others


def test_two_agents_alone_swap_views_in_their_own_form() -> None:
    model = ShuffledWorldModel(CopyLast(EPISODES, LANGUAGE), 3)
    requests = [request_of(EPISODES[0], "a", 2, "one"), request_of(EPISODES[1], "b", 0, "two")]
    steps = model.advance(model.begin(requests, [(), ()]), [Move("up")] * 2, [0, 1])
    for request, other, step in zip(requests, requests[::-1], steps, strict=True):
        assert step.observation is not None
        assert (step.observation.agent, step.observation.text) == (request.agent, other.observation.text)
        assert tuple(step.others) == request.others
