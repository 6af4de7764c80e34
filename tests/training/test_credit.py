"""What every estimator must keep, what each is held to by hand, and what TRL and Dr. MAS say about the scale."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from preconcert.core import Episode, TrainingError, UnknownNameError
from preconcert.training.credit import (
    ESTIMATORS,
    SHORT,
    AgentCredit,
    AgentTurnCredit,
    AlignedCredit,
    ChainedGAECredit,
    Credit,
    CreditSettings,
    Estimator,
    GAECredit,
    GlobalCredit,
    JointCredit,
    Normalise,
    RewardMode,
    RewardSettings,
    RoleCredit,
    Shift,
    TurnCredit,
    TurnKey,
    Values,
    Weighting,
    estimate,
    ledger_of,
)
from tests.training.episodes import episode, returns, turn

AGENTS = ("a", "b", "c")
TOKENS = 2
"""Per turn of the episodes made here."""
REWARD = st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3))
PAID = st.tuples(REWARD, REWARD, REWARD)
GAMES = st.lists(st.fixed_dictionaries(dict.fromkeys(AGENTS, PAID)), min_size=1, max_size=5)
GROUPS = st.lists(GAMES, min_size=1, max_size=3)
VARIANTS: Mapping[str, Estimator] = {
    **ESTIMATORS,
    "agent by turns": AgentCredit(weighting=Weighting.TURNS),
    "global by turns": GlobalCredit(weighting=Weighting.TURNS),
    "turn by index": TurnCredit(per_index=True),
    "turn, scaled": TurnCredit(scale=True),
    "turn, discounted": TurnCredit(gamma=0.9),
    "joint, scaled": JointCredit(scale=True),
    "agent-turn, centred": AgentTurnCredit(scale=False),
    "gae, pooled": GAECredit(normalise=Normalise.GLOBAL),
    "gae as it is": GAECredit(normalise=Normalise.NONE),
    "gae of tokens": GAECredit(level="token"),
    "chained-gae as it is": ChainedGAECredit(normalise=Normalise.NONE),
    "chained-gae of tokens": ChainedGAECredit(level="token"),
    "adalign, weaker": AlignedCredit(beta=0.3, gamma=0.9, scale=True),
}
every = pytest.mark.parametrize("name", VARIANTS)
grouped = pytest.mark.parametrize("name", [name for name, estimator in VARIANTS.items() if estimator.grouped])
Name = tuple[str, int, str, int]


def game(rewards: Mapping[str, Sequence[float]], group: str = "g", sample: int = 0) -> Episode:
    """An episode in which each agent is paid so at each of its turns."""
    turns = {a: [turn(a, i, reward=r) for i, r in enumerate(paid)] for a, paid in rewards.items()}
    return episode(turns, group, sample)


def rollout_of(groups: Sequence[Sequence[Mapping[str, Sequence[float]]]]) -> list[Episode]:
    return [game(one, f"g{g}", sample) for g, group in enumerate(groups) for sample, one in enumerate(group)]


def values_of(episodes: Sequence[Episode], scale: float = 3.0) -> Values:
    """A critic that knows group, sample, agent, turn and token, and nothing of the reward."""
    found: dict[TurnKey, Any] = {}
    for position, one in enumerate(episodes):
        for agent, trajectory in one.trajectories.items():
            for index, played in enumerate(trajectory.turns):
                seed = [ord(letter) for letter in f"{one.group}{one.sample}{agent}{index}"]
                count = len(played.completion_ids)
                found[TurnKey(position, agent, index)] = np.random.default_rng(seed).normal(0, scale, count)
    return found


def credit_of(estimator: Estimator, episodes: Sequence[Episode], state: Mapping[str, float] | None = None) -> Credit:
    return estimate(episodes, estimator, values=values_of(episodes) if estimator.needs_values else None, state=state)


def by_name(episodes: Sequence[Episode], advantages: Mapping[TurnKey, Any]) -> dict[Name, np.ndarray]:
    """Advantages under names that do not depend on positions, one number per token."""
    games = [(one.group, one.sample) for one in episodes]
    return {(*games[key.episode], key.agent, key.index): np.broadcast_to(v, TOKENS) for key, v in advantages.items()}


def same(one: Mapping[Name, np.ndarray], other: Mapping[Name, np.ndarray], tolerance: float = 1e-9) -> bool:
    assert one.keys() == other.keys()
    return all(np.allclose(one[key], other[key], rtol=tolerance, atol=tolerance) for key in one)


@every
@settings(max_examples=8, deadline=None)
@given(groups=GROUPS, seed=st.integers(0, 2**16))
def test_the_order_of_episodes_does_not_matter(name: str, groups: list[list[Any]], seed: int) -> None:
    episodes, estimator = rollout_of(groups), VARIANTS[name]
    mixed = random.Random(seed).sample(episodes, len(episodes))
    straight, other = credit_of(estimator, episodes), credit_of(estimator, mixed)
    assert len(straight.advantages) == sum(len(group) for group in groups) * len(AGENTS) * 3
    assert same(by_name(episodes, straight.advantages), by_name(mixed, other.advantages))
    assert straight.state == pytest.approx(other.state)
    assert (straight.returns is not None) == estimator.needs_values
    if straight.returns is not None and other.returns is not None:
        assert same(by_name(episodes, straight.returns), by_name(mixed, other.returns))


@every
@settings(max_examples=8, deadline=None)
@given(groups=GROUPS)
def test_advantages_have_mean_zero_over_the_group_that_is_declared(name: str, groups: list[list[Any]]) -> None:
    episodes, estimator = rollout_of(groups), VARIANTS[name]
    ledger = ledger_of(episodes)
    members: dict[Hashable, list[float]] = defaultdict(list)
    for key, value in credit_of(estimator, episodes).advantages.items():
        group = estimator.group_of(ledger[key.episode], key.agent, key.index)
        if group is not None:
            assert isinstance(value, float)
            members[group].append(value)
    assert all(np.mean(mine) == pytest.approx(0.0, abs=1e-7) for mine in members.values())
    if name in ("role", "adalign", "adalign, weaker") or "as it is" in name or "of tokens" in name:
        assert not members
    else:
        assert sum(map(len, members.values())) > 0


@every
@settings(max_examples=8, deadline=None)
@given(groups=GROUPS, shifts=st.tuples(*[st.floats(-100, 100)] * 3))
def test_constants_that_are_declared_to_change_nothing_do_not(
    name: str, groups: list[list[Any]], shifts: tuple[float, ...]
) -> None:
    """A constant on a return is paid at the last turn."""
    episodes, estimator = rollout_of(groups), VARIANTS[name]
    by_agent = dict(zip(AGENTS, shifts if estimator.shift is Shift.AGENT else [shifts[0]] * 3, strict=True))
    moved = rollout_of(
        [[{a: (*paid[:-1], paid[-1] + by_agent[a]) for a, paid in one.items()} for one in group] for group in groups]
    )
    one, other = (by_name(e, credit_of(estimator, e).advantages) for e in (episodes, moved))
    if estimator.shift is not Shift.NONE:
        assert same(one, other, 1e-4)
    elif abs(shifts[0]) > 1 and not estimator.needs_values and len(episodes) > 1 and not estimator.grouped:
        assert not same(one, other, 1e-4)


@grouped
def test_no_variance_and_groups_of_one_give_exactly_zero(name: str) -> None:
    estimator = VARIANTS[name]
    equal = rollout_of([[dict.fromkeys(AGENTS, (0.0, 0.0, 0.1 + 0.2))] * 5])
    single = {"a": (1.0, 0.0, 1.7), "b": (0.3, 2.0, 0.0)}
    if isinstance(estimator, GlobalCredit):  # several agents are no group of one
        del single["b"]
    for episodes in (equal, rollout_of([[single]])):
        found = credit_of(estimator, episodes).advantages
        if estimator.shift is Shift.NONE and episodes is equal:  # a discount makes early and late turns differ
            continue
        assert set(found.values()) == {0.0}


@every
@settings(max_examples=8, deadline=None)
@given(groups=st.lists(GAMES, min_size=2, max_size=4))
def test_two_batches_of_whole_groups_equal_one(name: str, groups: list[list[Any]]) -> None:
    episodes, estimator = rollout_of(groups), VARIANTS[name]
    cut = len(groups[0])
    state = {"a": 1.5}
    found: dict[Name, np.ndarray] = {}
    for half in (episodes[:cut], episodes[cut:]):
        found |= by_name(half, credit_of(estimator, half, state).advantages)
    if estimator.local:
        assert same(found, by_name(episodes, credit_of(estimator, episodes, state).advantages), 1e-12)


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(name: str, bad: float) -> None:
    estimator = VARIANTS[name]
    broken = rollout_of([[{"a": (0.0, 1.0), "b": (0.0, 0.0)}, {"a": (0.0, 1.0), "b": (bad, 0.0)}]])
    with pytest.raises(TrainingError, match=r"reward (nan|inf) of 'b' at turn 0 in group g0"):
        credit_of(estimator, broken)
    if estimator.needs_values:
        whole = rollout_of([[{"a": (0.0, 1.0)}]])
        values = {**values_of(whole), TurnKey(0, "a", 1): np.array([0.0, bad])}
        with pytest.raises(TrainingError, match=r"at turn 1 of 'a' in group g0"):
            estimate(whole, estimator, values=values)


# ---- single estimators


@pytest.mark.parametrize(("name", "pool"), [("agent", 1), ("global", len(AGENTS))])
@pytest.mark.parametrize("scaled", [True, False])
def test_equals_the_normalisation_of_the_stock_trainer(name: str, pool: int, scaled: bool) -> None:
    """TRL: rewards.view(-1, num_generations); one of its rows is one of our (episode, agent) pairs."""
    from trl.trainer.utils import nanstd

    size, number = 6, 4
    rewards = torch.rand(number, len(AGENTS), size, generator=torch.Generator().manual_seed(0)) * 3
    episodes = [
        one
        for g in range(number)
        for one in returns(
            [dict(zip(AGENTS, rewards[g, :, k].tolist(), strict=True)) for k in range(size)], f"g{g}"
        )
    ]
    flat = rewards.reshape(-1, size * pool)
    mean = torch.nanmean(flat, dim=1, keepdim=True)
    expected = flat - mean
    if scaled:
        expected = expected / (nanstd(flat, dim=1)[:, None] + 1e-4)
    expected = expected.reshape(number, len(AGENTS), size)
    found = estimate(episodes, name if scaled else f"{name}-centred").advantages
    differences = [
        abs(float(value) - float(expected[key.episode // size, AGENTS.index(key.agent), key.episode % size]))
        for key, value in found.items()
    ]
    assert max(differences) < 1e-6


def test_pooling_agents_of_different_scale_tilts_their_gradients() -> None:
    """Dr. MAS: under pooled statistics E[A_k²] = (σ_k² + (μ_k − μ)²) / σ², which is 1 only if all agents are alike."""
    rng = np.random.default_rng(0)
    count = 20_000
    drawn = {"a": rng.normal(0.9, 0.1, count), "b": rng.normal(0.2, 0.3, count)}
    # The formula is the limit of one large group; the estimator itself is applied to it.
    episodes = returns([{a: float(drawn[a][i]) for a in drawn} for i in range(count)], turns=1)
    for name, expected in (("global", {"a": 0.7675, "b": 1.2325}), ("agent", {"a": 1.0, "b": 1.0})):
        found = estimate(episodes, name).advantages
        for agent, wanted in expected.items():
            squares = [float(value) ** 2 for key, value in found.items() if key.agent == agent]
            assert np.mean(squares) == pytest.approx(wanted, rel=0.01)


def test_turns_as_weights_draw_the_mean_to_long_games() -> None:
    """Dr. MAS takes μ and σ over all steps of an agent: returns 1, 1, 1 and 0 here, over trajectories 1 and 0."""
    episodes = [game({"a": (0.0, 0.0, 1.0)}), game({"a": (0.0,)}, sample=1)]
    by_turns = estimate(episodes, AgentCredit(scale=False, weighting=Weighting.TURNS)).advantages
    by_trajectories = estimate(episodes, AgentCredit(scale=False)).advantages
    assert [by_turns[TurnKey(0, "a", i)] for i in range(3)] == [0.25] * 3
    assert by_turns[TurnKey(1, "a", 0)] == -0.75
    assert set(by_trajectories.values()) == {0.5, -0.5}


def test_a_turn_that_changes_nothing_gets_no_credit_at_turn_level() -> None:
    """MARS: a two-turn chain in which turn 1 alone is paid. The state before turn 2 is what turn 1 was."""
    rng = np.random.default_rng(0)
    choices = rng.integers(2, size=(4000, 2))
    episodes = [game({"a": (float(first), 0.0)}, sample=i) for i, (first, _) in enumerate(choices)]

    def after(estimator: Estimator, first: int) -> float:
        """Mean advantage of turn 2 where turn 1 was `first`."""
        found = estimate(episodes, estimator).advantages
        return float(np.mean([found[TurnKey(i, "a", 1)] for i in range(len(episodes)) if choices[i, 0] == first]))

    for first in (0, 1):
        assert after(TurnCredit(per_index=True), first) == 0.0
    # Centred over both turns together, turn 2 has a constant, which no choice and no state changes.
    assert after(TurnCredit(), 0) == pytest.approx(after(TurnCredit(), 1), abs=1e-12)
    assert after(AgentCredit(scale=False), 1) - after(AgentCredit(scale=False), 0) == pytest.approx(1.0)
    firsts = estimate(episodes, TurnCredit(per_index=True)).advantages
    assert firsts[TurnKey(0, "a", 0)] == pytest.approx(choices[0, 0] - choices[:, 0].mean())


def test_a_team_has_one_return() -> None:
    episodes = [game({"a": (0.0, 4.0), "b": (2.0, 0.0)}), game({"a": (0.0, 0.0), "b": (0.0, 2.0)}, sample=1)]
    found = estimate(episodes, "joint").advantages
    # To go, averaged over agents: 3 and 2 in the first game, 1 and 1 in the second.
    assert [found[TurnKey(0, agent, i)] for agent in "ab" for i in (0, 1)] == [1.0, 0.5, 1.0, 0.5]
    assert [found[TurnKey(1, agent, i)] for agent in "ab" for i in (0, 1)] == [-1.0, -0.5, -1.0, -0.5]


def test_a_roles_baseline_is_read_before_it_is_updated() -> None:
    first = estimate([game({"a": (0.0, 1.0), "b": (-1.0, 0.0)})], "role")
    assert first.advantages[TurnKey(0, "a", 0)] == 1.0
    assert first.advantages[TurnKey(0, "b", 1)] == -1.0
    assert first.state == pytest.approx({"a": 0.05, "b": -0.05})
    second = estimate([game({"a": (0.0, 1.0)})], "role", state=first.state)
    assert second.advantages[TurnKey(0, "a", 1)] == pytest.approx(0.95)
    assert second.state == pytest.approx({"a": 0.95 * 0.05 + 0.05, "b": -0.05})


def test_a_roles_baseline_moves_as_single_updates_do_on_average() -> None:
    from itertools import permutations

    paid, start = (1.0, -2.0, 4.0), 0.5
    ends = []
    for order in permutations(paid):
        baseline = start
        for reward in order:
            baseline = 0.95 * baseline + 0.05 * reward
        ends.append(baseline)
    found = estimate([game({"a": (r,)}, sample=i) for i, r in enumerate(paid)], "role", state={"a": start})
    assert found.state["a"] == pytest.approx(np.mean(ends))
    assert set(found.advantages.values()) == {r - start for r in paid}


def test_leaving_one_out_compares_with_the_mean_of_the_others() -> None:
    paid = (1.0, 0.0, 5.0)
    found = estimate([game({"a": (0.0, r)}, sample=i) for i, r in enumerate(paid)], "loo").advantages
    for i, mine in enumerate(paid):
        others = [r for j, r in enumerate(paid) if j != i]
        assert found[TurnKey(i, "a", 0)] == pytest.approx(mine - np.mean(others))


def test_only_the_first_turn_of_a_branch_learns() -> None:
    episodes = [game({"a": (0.0, 1.0, 0.0), "b": (3.0, 0.0, 0.0)}), game({"a": (0.0,) * 3, "b": (0.0,) * 3}, sample=1)]
    found = estimate(episodes, AgentTurnCredit(scale=False)).advantages
    assert [found[TurnKey(0, "a", i)] for i in range(3)] == [0.5, 0.0, 0.0]
    assert [found[TurnKey(1, "b", i)] for i in range(3)] == [-1.5, 0.0, 0.0]


def plain(kind: type[Any], **changes: Any) -> Any:
    return kind(normalise="none", **changes)


def test_gae_by_hand() -> None:
    values = {TurnKey(0, "a", i): v for i, v in enumerate((0.5, -1.0, 2.0))}
    episodes = [game({"a": (1.0, 0.0, 3.0)})]
    found = estimate(episodes, plain(GAECredit, gamma=0.9, lam=0.5), values=values)
    errors = (1.0 + 0.9 * -1.0 - 0.5, 0.0 + 0.9 * 2.0 + 1.0, 3.0 - 2.0)
    last = errors[2]
    middle = errors[1] + 0.45 * last
    expected = (errors[0] + 0.45 * middle, middle, last)
    assert [found.advantages[TurnKey(0, "a", i)] for i in range(3)] == pytest.approx(expected)
    assert found.returns is not None
    targets = [found.returns[TurnKey(0, "a", i)] for i in range(3)]
    assert targets == pytest.approx([a + v for a, v in zip(expected, (0.5, -1.0, 2.0), strict=True)])


def test_chained_gae_by_hand() -> None:
    """V(0,a) → V(0,b) → V(1,a) → V(1,b) → end; the team's rewards, 2 and −1, fall due after b."""
    episodes = [game({"a": (4.0, 0.0), "b": (0.0, -2.0)})]
    chain = ((0, "a", 0.5, 0.0), (0, "b", 1.0, 2.0), (1, "a", -0.5, 0.0), (1, "b", 0.25, -1.0))
    values = {TurnKey(0, agent, step): value for step, agent, value, _ in chain}
    gamma, lam = 0.9, 0.8
    found = estimate(episodes, plain(ChainedGAECredit, gamma=gamma, lam=lam), values=values)
    running, following = 0.0, 0.0
    for step, agent, value, reward in reversed(chain):
        running = reward + gamma * following - value + gamma * lam * running
        following = value
        assert found.advantages[TurnKey(0, agent, step)] == pytest.approx(running)
        assert found.returns is not None
        assert found.returns[TurnKey(0, agent, step)] == pytest.approx(running + value)


def test_chained_gae_of_tokens_by_hand() -> None:
    """a's two tokens, then b's two, then the reward."""
    episodes = [game({"a": (1.0,), "b": (3.0,)})]
    values = {TurnKey(0, "a", 0): np.array([0.1, 0.2]), TurnKey(0, "b", 0): np.array([-0.4, 0.7])}
    gamma, lam = 0.9, 0.5
    found = estimate(episodes, plain(ChainedGAECredit, level="token", gamma=gamma, lam=lam), values=values)
    line, rewards = [0.1, 0.2, -0.4, 0.7, 0.0], [0.0, 0.0, 0.0, 2.0]
    expected, running = [0.0] * 4, 0.0
    for t in (3, 2, 1, 0):
        running = rewards[t] + gamma * line[t + 1] - line[t] + gamma * lam * running
        expected[t] = running
    assert list(np.asarray(found.advantages[TurnKey(0, "a", 0)])) == pytest.approx(expected[:2])
    assert list(np.asarray(found.advantages[TurnKey(0, "b", 0)])) == pytest.approx(expected[2:])


@pytest.mark.parametrize("estimator", [
    GAECredit(gamma=1, lam=1, normalise=Normalise.NONE),
    GAECredit(gamma=1, lam=1, normalise=Normalise.NONE, level="token"),
    ChainedGAECredit(gamma=1, lam=1, normalise=Normalise.NONE),
    ChainedGAECredit(gamma=1, lam=1, normalise=Normalise.NONE, level="token"),
], ids=repr)  # fmt: skip
def test_gae_telescopes_to_the_return_less_the_value(estimator: GAECredit | ChainedGAECredit) -> None:
    rng = np.random.default_rng(0)
    episodes = [game({a: rng.normal(size=4).tolist() for a in AGENTS}, sample=i) for i in range(3)]
    values = values_of(episodes)
    found = estimate(episodes, estimator, values=values)
    assert found.returns is not None
    for key, advantage in found.advantages.items():
        own = {a: [t.reward for t in tr.turns] for a, tr in episodes[key.episode].trajectories.items()}
        team = estimator.type == "chained-gae"
        rewards = np.mean(list(own.values()), axis=0) if team else np.array(own[key.agent])
        value = np.asarray(values[key]) if estimator.level == "token" else np.asarray(values[key])[0]
        monte_carlo = rewards[key.index :].sum()
        assert np.allclose(advantage, monte_carlo - value)
        assert np.allclose(found.returns[key], monte_carlo)


def test_scripted_players_are_no_link_of_the_chain() -> None:
    spoken = [turn("a", i, reward=1.0) for i in range(2)]
    silent = [turn("b", i, reward=1.0, completion_ids=(), sampled=(), logprobs=()) for i in range(2)]
    values = {TurnKey(0, "a", 0): 0.5, TurnKey(0, "a", 1): 0.25}
    found = estimate([episode({"a": spoken, "b": silent})], plain(ChainedGAECredit, lam=0), values=values)
    assert [found.advantages[TurnKey(0, "a", i)] for i in (0, 1)] == [0.75, 0.75]
    assert [found.advantages[TurnKey(0, "b", i)] for i in (0, 1)] == [0.0, 0.0]
    with pytest.raises(TrainingError, match="no value for turn 1 of 'a'"):
        estimate([episode({"a": spoken})], GAECredit(), values={TurnKey(0, "a", 0): 0.5})
    with pytest.raises(TrainingError, match="one per turn"):
        estimate([episode({"a": spoken})], GAECredit(level="token"), values=values)
    with pytest.raises(TrainingError, match="no values for 'a'"):
        estimate([episode({"a": spoken})], GAECredit())
    with pytest.raises(TrainingError, match="3 values for the 2 tokens"):
        estimate([episode({"a": spoken})], GAECredit(), values={**values, TurnKey(0, "a", 1): np.zeros(3)})


@pytest.mark.parametrize("kind", [GAECredit, ChainedGAECredit])
def test_an_agents_scale_does_not_drown_another(kind: Any) -> None:
    rng = np.random.default_rng(0)
    sizes = {"a": 100.0, "b": 0.01}
    episodes = [game({a: rng.normal(0, size, 3).tolist() for a, size in sizes.items()}, sample=i) for i in range(20)]
    values = {key: np.asarray(value) * sizes[key.agent] for key, value in values_of(episodes, 1.0).items()}
    spread = {}
    for normalise in ("agent", "global"):
        found = estimate(episodes, kind(normalise=normalise), values=values).advantages
        spread[normalise] = {a: np.std([v for key, v in found.items() if key.agent == a]) for a in "ab"}
    assert spread["agent"] == pytest.approx({"a": 1.0, "b": 1.0}, rel=0.05)
    if kind is GAECredit:
        assert spread["global"]["b"] < 0.01 * spread["global"]["a"]


def test_alignment_by_hand() -> None:
    """Three turns, two games: the base is half the difference of the returns-to-go."""
    one, other = {"a": (1.0, 0.0, 2.0), "b": (0.0, 3.0, -1.0)}, {"a": (0.0, 0.0, 0.0), "b": (1.0, 0.0, 0.0)}
    found = estimate([game(one), game(other, sample=1)], AlignedCredit(beta=0.5, gamma=0.9)).advantages
    better = {a: [mine - theirs for mine, theirs in zip(one[a], other[a], strict=True)] for a in "ab"}
    base = {a: [sum(0.9 ** (k - t) * better[a][k] for k in range(t, 3)) / 2 for t in range(3)] for a in "ab"}
    for mine, theirs in (("a", "b"), ("b", "a")):
        for t in range(3):
            past = sum(0.9 ** (t - k) * base[mine][k] for k in range(t))
            expected = base[mine][t] + 0.5 * past * base[theirs][t]
            assert found[TurnKey(0, mine, t)] == pytest.approx(expected)
    alone = estimate([game(one), game(other, sample=1)], AlignedCredit(beta=0.0, gamma=0.9)).advantages
    assert alone == pytest.approx(
        estimate([game(one), game(other, sample=1)], TurnCredit(per_index=True, gamma=0.9)).advantages
    )


# ---- rewards


def test_rewards_are_shaped_before_and_the_episodes_stay() -> None:
    episodes = [game({"a": (1.0, 0.0), "b": (0.0, 4.0)})]

    def shaped(**changes: Any) -> dict[str, list[float]]:
        (one,) = ledger_of(episodes, RewardSettings(**changes))
        return {agent: strand.rewards.tolist() for agent, strand in one.strands.items()}

    assert shaped() == {"a": [1.0, 0.0], "b": [0.0, 4.0]}
    assert shaped(mode="joint") == {"a": [0.5, 2.0], "b": [0.5, 2.0]}
    assert shaped(mode="mixed", weight=0.5) == {"a": [0.75, 1.0], "b": [0.25, 3.0]}
    assert shaped(scale={"b": 0.5}, token_cost=0.25) == {"a": [0.5, -0.5], "b": [-0.5, 1.5]}
    assert shaped(mode="mixed", weight=1.0, scale={"a": 2.0}) == shaped(mode="joint", scale={"a": 2.0})
    assert [t.reward for t in episodes[0].trajectories["b"].turns] == [0.0, 4.0]


def test_forced_tokens_cost_nothing() -> None:
    played = replace(game({"a": (1.0,)}).trajectories["a"].turns[0], sampled=(True, False))
    (one,) = ledger_of([episode({"a": [played]})], RewardSettings(token_cost=0.25))
    assert one.strands["a"].rewards.tolist() == [0.75]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mode": "mixed"}, "mode mixed needs a weight"),
        ({"weight": 0.5}, "mode individual takes no weight, and 0.5 is given"),
        ({"scale": {"a": float("nan")}}, "finite number"),
        ({"token_cost": -1}, "greater than or equal to 0"),
    ],
)
def test_rewards_that_make_no_sense_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RewardSettings(**wrong)


def test_a_factor_for_nobody_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown agent 'agnt_0'; did you mean 'agent_0'"):
        RewardSettings(scale={"agnt_0": 2.0}).check(["agent_0", "agent_1"])
    uneven = [episode({"a": [turn("a", 0)], "b": [turn("b", 0), turn("b", 1)]})]
    with pytest.raises(TrainingError, match="a 1, b 2"):
        ledger_of(uneven, RewardSettings(mode=RewardMode.JOINT))


# ---- settings


@pytest.mark.parametrize("name", ESTIMATORS)
def test_names_and_mappings_mean_the_same(name: str) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(CreditSettings)
    found = adapter.validate_python(name)
    assert found == ESTIMATORS[name] == adapter.validate_python(SHORT.get(name, {"type": name}))
    assert adapter.validate_json(adapter.dump_json(found)) == found


def test_unknown_estimators_are_errors() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'agent'"):
        estimate([], "agnt")


def test_no_game_gives_no_credit() -> None:
    for estimator in VARIANTS.values():
        assert not estimator.estimate([]).advantages


def test_a_role_is_carried_along() -> None:
    found = RoleCredit(decay=0.5).estimate(ledger_of([game({"a": (2.0,)})]), {"b": 3.0})
    assert found.state == {"a": 1.0, "b": 3.0}
