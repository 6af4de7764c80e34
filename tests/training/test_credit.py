"""What every estimator must keep, whatever its grouping, and what TRL and Dr. MAS say about the scale."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preconcert.core import Episode
from preconcert.training.credit import (
    ESTIMATORS,
    GROUP_KEYS,
    Grouping,
    TurnKey,
    agent_group,
    global_group,
    group_relative,
)
from tests.training.episodes import returns

Estimator = Callable[[Sequence[Episode]], dict[TurnKey, float]]
AGENTS = ("a", "b", "c")
REWARD = st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3))
GROUPS = st.lists(
    st.lists(st.fixed_dictionaries(dict.fromkeys(AGENTS, REWARD)), min_size=1, max_size=5), min_size=1, max_size=3
)
every = pytest.mark.parametrize("name", ESTIMATORS)


def rollout_of(groups: Sequence[Sequence[dict[str, float]]]) -> list[Episode]:
    return [episode for number, group in enumerate(groups) for episode in returns(group, f"g{number}")]


def by_name(episodes: Sequence[Episode], advantages: dict[TurnKey, float]) -> dict[tuple[str, int, str, int], float]:
    """Advantages under names that do not depend on positions."""
    return {
        (episodes[key.episode].group, episodes[key.episode].sample, key.agent, key.index): value
        for key, value in advantages.items()
    }


@every
@settings(max_examples=30, deadline=None)
@given(groups=GROUPS, seed=st.integers(0, 2**16))
def test_the_order_of_episodes_does_not_matter(name: str, groups: list[list[dict[str, float]]], seed: int) -> None:
    episodes = rollout_of(groups)
    shuffled = random.Random(seed).sample(episodes, len(episodes))
    straight, mixed = by_name(episodes, ESTIMATORS[name](episodes)), by_name(shuffled, ESTIMATORS[name](shuffled))
    assert straight.keys() == mixed.keys()
    assert len(straight) == sum(len(group) for group in groups) * len(AGENTS) * 2
    assert all(straight[key] == pytest.approx(mixed[key], abs=1e-9) for key in straight)


@every
@settings(max_examples=30, deadline=None)
@given(groups=GROUPS, shift=st.floats(-100, 100))
def test_zero_mean_and_no_effect_of_a_constant(name: str, groups: list[list[dict[str, float]]], shift: float) -> None:
    episodes = rollout_of(groups)
    found = by_name(episodes, ESTIMATORS[name](episodes))
    for number in range(len(groups)):
        for agents in [(agent,) for agent in AGENTS] if name.startswith("agent") else [AGENTS]:
            mine = [value for (group, _, agent, _), value in found.items() if group == f"g{number}" and agent in agents]
            assert np.mean(mine) == pytest.approx(0.0, abs=1e-7)
    moved = rollout_of([[{a: r + shift for a, r in one.items()} for one in group] for group in groups])
    again = by_name(moved, ESTIMATORS[name](moved))
    assert all(found[key] == pytest.approx(again[key], abs=1e-6, rel=1e-4) for key in found)


@every
def test_no_variance_and_groups_of_one_give_exactly_zero(name: str) -> None:
    same = rollout_of([[dict.fromkeys(AGENTS, 0.1 + 0.2)] * 5])
    assert set(ESTIMATORS[name](same).values()) == {0.0}
    if name.startswith("agent"):
        alone = rollout_of([[{"a": 1.0, "b": -3.0, "c": 0.7}]])
        assert set(ESTIMATORS[name](alone).values()) == {0.0}
    else:
        assert set(ESTIMATORS[name](rollout_of([[{"a": 1.7}]])).values()) == {0.0}


@every
@settings(max_examples=20, deadline=None)
@given(groups=st.lists(GROUPS.map(lambda groups: groups[0]), min_size=2, max_size=4))
def test_two_batches_of_whole_groups_equal_one(name: str, groups: list[list[dict[str, float]]]) -> None:
    episodes = rollout_of(groups)
    cut = len(groups[0])
    halves = [episodes[:cut], episodes[cut:]]
    merged = {k: v for half in halves for k, v in by_name(half, ESTIMATORS[name](half)).items()}
    assert merged == by_name(episodes, ESTIMATORS[name](episodes))


@pytest.mark.parametrize(("name", "pool"), [("agent", 1), ("global", len(AGENTS))])
@pytest.mark.parametrize("scaled", [True, False])
def test_equals_the_normalisation_of_the_stock_trainer(name: str, pool: int, scaled: bool) -> None:
    """TRL: rewards.view(-1, num_generations); one of its rows is one of our (episode, agent) pairs."""
    from trl.trainer.utils import nanstd

    size, number = 6, 4
    rewards = torch.rand(number, len(AGENTS), size, generator=torch.Generator().manual_seed(0)) * 3
    episodes = rollout_of(
        [[dict(zip(AGENTS, rewards[g, :, k].tolist(), strict=True)) for k in range(size)] for g in range(number)]
    )
    flat = rewards.reshape(-1, size * pool)
    mean = torch.nanmean(flat, dim=1, keepdim=True)
    expected = flat - mean
    if scaled:
        expected = expected / (nanstd(flat, dim=1)[:, None] + 1e-4)
    expected = expected.reshape(number, len(AGENTS), size)
    found = ESTIMATORS[name if scaled else f"{name}-centred"](episodes)
    differences = [
        abs(value - float(expected[key.episode // size, AGENTS.index(key.agent), key.episode % size]))
        for key, value in found.items()
    ]
    assert max(differences) < 1e-6


def test_pooling_agents_of_different_scale_tilts_their_gradients() -> None:
    """Dr. MAS: under pooled statistics E[A_k²] = (σ_k² + (μ_k − μ)²) / σ², which is 1 only if all agents are alike."""
    rng = np.random.default_rng(0)
    count = 200_000
    drawn = {"a": rng.normal(0.9, 0.1, count), "b": rng.normal(0.2, 0.3, count)}
    # What is simulated is the formula's limit of one large group; the estimator itself is applied to it.
    episodes = returns([{a: float(drawn[a][i]) for a in drawn} for i in range(count // 10)], turns=1)
    for key, expected in ((global_group, {"a": 0.7675, "b": 1.2325}), (agent_group, {"a": 1.0, "b": 1.0})):
        found = group_relative(episodes, key)
        for agent, wanted in expected.items():
            squares = [value**2 for name, value in found.items() if name.agent == agent]
            assert np.mean(squares) == pytest.approx(wanted, rel=0.01)


def test_every_grouping_has_an_estimator() -> None:
    assert set(GROUP_KEYS) == set(Grouping)
    assert {str(grouping) for grouping in Grouping} <= ESTIMATORS.keys()
