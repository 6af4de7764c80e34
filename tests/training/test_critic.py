"""The critic: what it reads, how it is normalised, what it learns, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preconcert.core import Episode, TrainingError
from preconcert.models import TransformersModel
from preconcert.training.credit import TurnKey
from preconcert.training.critic import ADAPTER, Alone, Critic, value_losses
from preconcert.training.critic_reader import CriticReader
from preconcert.training.critic_settings import CriticContext, CriticModel, CriticSettings
from preconcert.training.value_head import ValueHead
from tests.training import episodes as made
from tests.training.teams import (
    AGENTS,
    FixedSource,
    largest_difference,
    load,
    play,
    rows_of,
    team_on,
    trainer_on,
    weights_of,
)

WORDS = {"north": -1.0, "south": 0.0, "east": 0.5, "stay": 2.0}
"""What a state is worth, by the one word that differs."""
SCALE = {"agent_0": 1.0, "agent_1": 100.0}


def critic_on(
    base: TransformersModel, random: bool = True, path: Path | None = None, options: Any = None, **settings: Any
) -> Critic:
    """A critic whose values differ from 0 from the start."""
    critic = Critic(base, AGENTS, CriticSettings(**settings), 5, path, **(options or {}))
    if random:
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            critic.head.linear.weight.normal_(0, 0.3, generator=generator)
            for key, value in critic.encoder.parameters().items():
                if "lora_B" in key:
                    value.normal_(0, 0.1, generator=generator)
    return critic


def truths(values: dict[TurnKey, Any], seed: int = 0) -> dict[TurnKey, Any]:
    """Returns of any size for every value."""
    rng = np.random.default_rng(seed)
    return {key: np.asarray(value) * 0 + rng.normal(1.0, 2.0, np.shape(value)) for key, value in values.items()}


def everything_of(critic: Critic) -> dict[str, torch.Tensor]:
    parts = {**critic.encoder.parameters(), **dict(critic.head.state_dict())}
    return {key: value.detach().clone() for key, value in parts.items()}


def policy_of(model: TransformersModel) -> dict[str, torch.Tensor]:
    """All weights but the critic's."""
    return {
        key: value.detach().clone() for key, value in model.model.state_dict().items() if f".{ADAPTER}." not in key
    }


# ---- the normaliser


def follow(head: ValueHead, returns: Sequence[Sequence[float]], memory: float) -> None:
    """One rollout's returns by agent."""
    numbers = [torch.tensor(list(mine), dtype=torch.float64) for mine in returns]
    head.follow(
        torch.tensor([float(len(n)) for n in numbers], dtype=torch.float64),
        torch.stack([n.sum() for n in numbers]),
        torch.stack([(n**2).sum() for n in numbers]),
        memory,
    )


def raw_values(head: ValueHead, hidden: torch.Tensor) -> torch.Tensor:
    normal = head(hidden)
    return torch.stack(
        [head.raw(normal[:, c], torch.full((len(hidden),), c)) for c in range(normal.shape[1])], dim=1
    ).detach()


def random_head(agents: int) -> tuple[ValueHead, torch.Tensor]:
    torch.manual_seed(0)
    head = ValueHead(16, agents)
    torch.nn.init.normal_(head.linear.weight, 0, 0.3)
    torch.nn.init.normal_(head.linear.bias, 0, 0.3)
    return head, torch.randn(64, 16)


def test_new_moments_change_no_raw_value() -> None:
    head, hidden = random_head(3)
    before = raw_values(head, hidden)
    rng = np.random.default_rng(0)
    for round_ in range(6):
        follow(head, [rng.normal(5, 3, 40), rng.normal(-700, 100, 10), rng.normal(0, 0.1, 20 * (round_ % 2))], 0.9)
    moved = float((raw_values(head, hidden) - before).abs().max())
    print(f"after six rollouts of new moments: largest change of a raw value {moved:.1e}")
    assert head.mean[0] > 3
    assert head.deviation[1] > 50
    assert moved < 1e-6 * max(1.0, float(head.mean.abs().max()))
    small, hidden = random_head(1)
    before = raw_values(small, hidden)
    follow(small, [rng.normal(0.5, 0.4, 64)], 0.9)
    assert float((raw_values(small, hidden) - before).abs().max()) < 1e-6


def test_moments_are_the_debiased_moving_ones() -> None:
    head, memory = ValueHead(4, 1), 0.7
    rollouts = [[1.0, 3.0], [10.0], [-2.0, 0.0, 5.0]]
    for returns in rollouts:
        follow(head, [returns], memory)
    weights = np.array([memory**2, memory, 1.0])
    weights /= weights.sum()
    mean = sum(w * np.mean(r) for w, r in zip(weights, rollouts, strict=True))
    square = sum(w * np.mean(np.square(r)) for w, r in zip(weights, rollouts, strict=True))
    assert float(head.mean) == pytest.approx(mean, abs=1e-12)
    assert float(head.deviation) == pytest.approx(np.sqrt(square - mean**2), abs=1e-12)


def test_first_rollout_counts_in_full_and_equal_returns_do_no_harm() -> None:
    head = ValueHead(4, 2)
    follow(head, [[2.0, 4.0], [7.0, 7.0, 7.0]], 0.9)
    assert head.mean.tolist() == pytest.approx([3.0, 7.0])
    assert float(head.deviation[0]) == pytest.approx(1.0)
    assert 0 < float(head.deviation[1]) < 0.1
    assert torch.isfinite(head.linear.weight).all()


def test_agents_are_normalised_apart() -> None:
    (one, _), (other, _) = random_head(3), random_head(3)
    follow(one, [[1.0, 2.0], [5.0, 9.0], [0.0, 1.0]], 0.9)
    follow(other, [[1.0, 2.0], [5e6, -9e6], [0.0, 1.0]], 0.9)
    for column in (0, 2):
        assert one.mean[column] == other.mean[column]
        assert one.deviation[column] == other.deviation[column]
        assert torch.equal(one.linear.weight[column], other.linear.weight[column])
    assert one.mean[1] != other.mean[1]


def test_an_agent_without_returns_keeps_its_moments() -> None:
    head, _ = random_head(2)
    follow(head, [[1.0, 2.0], [5.0, 9.0]], 0.9)
    mean, deviation, weight = head.mean[1].clone(), head.deviation[1].clone(), head.linear.weight[1].clone()
    follow(head, [[8.0, 9.0], []], 0.9)
    assert (head.mean[1], head.deviation[1]) == (mean, deviation)
    assert torch.equal(head.linear.weight[1], weight)


# ---- learning


def test_the_clipped_loss_is_that_of_the_paper() -> None:
    value = torch.tensor([1.0, 0.1, -1.0, 0.5], requires_grad=True)
    old = torch.tensor([0.0, 0.0, 0.0, 0.5])
    target = torch.tensor([2.0, 2.0, 2.0, 0.5])
    losses = value_losses(value, old, target, 0.2)
    # Moved too far towards the target: the clipped value counts and nothing pulls. Moved away: the true one does.
    assert losses.tolist() == pytest.approx([0.5 * 1.8**2, 0.5 * 1.9**2, 0.5 * 3.0**2, 0.0])
    losses.sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == pytest.approx([0.0, -1.9, -3.0, 0.0])
    assert value_losses(value, old, target, None).tolist() == pytest.approx([0.5, 0.5 * 1.9**2, 4.5, 0.0])


def test_the_first_loss_and_the_variance_explained_are_those_by_hand(starter: TransformersModel) -> None:
    critic = critic_on(starter, epochs=1, minibatches=1)
    values = critic.values(play(team_on(starter)))
    returns = truths(values)
    found = critic.fit(returns, 0)
    squares, explained = [], {}
    for agent in AGENTS:
        v = np.array([values[key] for key in values if key.agent == agent], dtype=float)
        r = np.array([returns[key] for key in values if key.agent == agent], dtype=float)
        squares += list(((v - r.mean()) / r.std() - (r - r.mean()) / r.std()) ** 2)
        explained[agent] = 1 - np.var(r - v) / np.var(r)
        assert found[f"explained_variance/{agent}"] == pytest.approx(explained[agent], abs=1e-6)
    assert found["explained_variance"] == pytest.approx(np.mean(list(explained.values())), abs=1e-6)
    assert found["value_loss"] == pytest.approx(0.5 * np.mean(squares), rel=1e-5)


def words(model: TransformersModel, number: int, seed: int) -> list[Episode]:
    """Two steps each; what follows a state depends on one word of it."""
    rng = np.random.default_rng(seed)
    rounds = []
    for sample in range(number):
        episode = made.episode({a: [made.turn(a, s) for s in range(2)] for a in AGENTS}, sample=sample)
        chosen = rng.choice(list(WORDS), size=2)
        rounds.append(replace(episode, states=(*(f"left 1 {word} a" for word in chosen), "left")))
    unknown = model.tokenizer.unk_token_id
    assert all(unknown not in model.tokenizer(text)["input_ids"] for e in rounds for text in e.states)
    return rounds


@pytest.mark.parametrize("where", CriticModel)
def test_rewards_of_any_scale_are_learned_alike(
    checkpoint: Callable[[str], Path], starter: TransformersModel, where: CriticModel
) -> None:
    critic = critic_on(starter, random=False, path=checkpoint("starter"), model=where)
    curve: list[dict[str, float]] = []
    for iteration in range(16):
        rollout = words(starter, 32, iteration)
        returns = {
            key: SCALE[key.agent] * WORDS[rollout[key.episode].states[key.index].split()[2]]
            for key in critic.values(rollout)
        }
        curve.append(critic.fit(returns, iteration))
    for agent in AGENTS:
        explained = [found[f"explained_variance/{agent}"] for found in curve]
        print(f"{where.value}, returns × {SCALE[agent]:g}: " + " ".join(f"{value:.2f}" for value in explained))
        assert explained[-1] > 0.9
        assert abs(explained[0]) < 0.1


@pytest.mark.parametrize("where", CriticModel)
def test_learning_values_leaves_the_policy_as_it_is(
    checkpoint: Callable[[str], Path], starter: TransformersModel, where: CriticModel
) -> None:
    critic = critic_on(starter, path=checkpoint("starter"), model=where)
    wanted = {key: value.requires_grad for key, value in starter.model.named_parameters()}
    before, critics = policy_of(starter), everything_of(critic)
    starter.model.train()
    critic.fit(truths(critic.values(play(team_on(starter)))), 0)
    assert all(module.training for module in starter.model.modules())
    after = policy_of(starter)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None for p in starter.model.parameters())
    assert {key: value.requires_grad for key, value in starter.model.named_parameters()} == wanted
    now = everything_of(critic)
    assert sum(not torch.equal(now[key], critics[key]) for key in now) > 0.9 * len(now)


def test_learning_a_policy_leaves_the_critic_as_it_is(starter: TransformersModel, tmp_path: Path) -> None:
    critic = critic_on(starter)
    team = team_on(starter)
    rows, table = rows_of(team, play(team), lambda number: float(number % 3) - 1.0)
    before, policy = everything_of(critic), weights_of(starter)
    trainer_on(starter, FixedSource(rows), table, tmp_path, iterations=2, epochs=2, lr=0.01).train()
    after = everything_of(critic)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert largest_difference(policy, weights_of(starter)) > 1e-3


def test_activation_checkpointing_changes_nothing(checkpoint: Callable[[str], Path]) -> None:
    """The forward pass is run a second time in the backward pass, and must go through the critic's adapter again."""
    fitted = []
    for checkpointing in (False, True):
        model = load(checkpoint("starter"))
        critic = critic_on(model, epochs=2, minibatches=2)
        values = critic.values(play(team_on(model)))
        if checkpointing:
            model.base.gradient_checkpointing_enable({"use_reentrant": False})
        model.model.train()
        critic.fit(truths(values), 0)
        fitted.append(everything_of(critic))
    assert largest_difference(*fitted) < 1e-6


def test_dropout_is_off_while_values_are_read(checkpoint: Callable[[str], Path]) -> None:
    from preconcert.models import LoraSettings

    model = TransformersModel.load(checkpoint("starter"), LoraSettings(r=2, alpha=4, dropout=0.5))
    for agent in AGENTS:
        model.add_adapter(agent, 0)
    critic = critic_on(model)
    episodes = play(team_on(model), seeds=1)
    model.model.train()
    state = torch.random.get_rng_state()
    assert critic.values(episodes) == critic.values(episodes)
    assert torch.equal(state, torch.random.get_rng_state())


def test_minibatches_do_not_depend_on_the_division_of_the_work(starter: TransformersModel) -> None:
    critic = critic_on(starter, minibatches=3)
    episodes = play(team_on(starter), seeds=4)

    def named(mine: Sequence[Episode], gather: Callable[[torch.Tensor], torch.Tensor]) -> list[set[str]]:
        critic.values(mine)
        assert critic._batch is not None
        team: Any = Alone()
        team.gather = gather
        names = [reading.name for reading in critic._batch.readings]
        return [{names[i] for i in part} for part in critic._minibatches(critic._batch, (4, 0), team)]

    drawn: list[torch.Tensor] = []
    for half in (episodes[:6], episodes[6:]):
        named(half, lambda numbers: (drawn.append(numbers), numbers)[1])
    whole = named(episodes, lambda numbers: numbers)
    parts = [named(half, lambda numbers: torch.cat(drawn)) for half in (episodes[:6], episodes[6:])]
    assert [one | two for one, two in zip(*parts, strict=True)] == whole
    sizes = [len(part) for part in whole]
    assert max(sizes) - min(sizes) <= 1
    assert len(set.union(*whole)) == sum(sizes) == sum(e.steps for e in episodes)
    critic.values(episodes)
    assert critic._batch is not None
    other = critic._minibatches(critic._batch, (4, 1), Alone())
    names = [reading.name for reading in critic._batch.readings]
    assert [{names[i] for i in part} for part in other] != whole


def test_a_critic_is_put_back_exactly(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    models = [load(checkpoint("starter")) for _ in range(2)]
    episodes = play(team_on(models[0]))
    first, second = (critic_on(model, random=number == 0) for number, model in enumerate(models))
    first.fit(truths(first.values(episodes)), 0)
    torch.save(first.state_dict(), tmp_path / "critic.pt")
    second.load_state_dict(torch.load(tmp_path / "critic.pt", weights_only=True))
    for critic in (first, second):
        critic.fit(truths(critic.values(episodes), seed=1), 1)
    one, two = everything_of(first), everything_of(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_errors_say_what_is_wrong(starter: TransformersModel) -> None:
    critic = critic_on(starter)
    with pytest.raises(TrainingError, match="no rollout"):
        critic.fit({}, 0)
    critic.values(play(team_on(starter), seeds=1))
    with pytest.raises(TrainingError, match="no return for"):
        critic.fit({}, 0)
    with pytest.raises(TrainingError, match="'critic'"):
        critic_on(starter)
    with pytest.raises(TrainingError, match="separate critic needs"):
        critic_on(starter, model=CriticModel.SEPARATE)
    other = made.episode({"agent_1": [made.turn("agent_1", 0)], "agent_0": [made.turn("agent_0", 0)]})
    with pytest.raises(TrainingError, match="knows the agents"):
        critic.values([other])
    nothing = made.episode({agent: [made.turn(agent, 0)] for agent in AGENTS})
    with pytest.raises(TrainingError, match="nothing to read"):
        critic.values([replace(nothing, states=("", ""))])


# ---- what is read


def one_episode(**states: str) -> Episode:
    """Two agents, two steps, messages at the second."""
    said = made.message("agent_0", 0, ["agent_1"], payload="a north")
    turns = {
        "agent_0": [made.turn("agent_0", 0, "north"), made.turn("agent_0", 1, "south", prompt_ids=(7, 8))],
        "agent_1": [made.turn("agent_1", 0, "stay"), made.turn("agent_1", 1, "east", inbox=(said,))],
    }
    return replace(made.episode(turns), states=("left 2 open a", "left 1 open b", "left 0"))


def with_turn(episode: Episode, agent: str, index: int, **changes: Any) -> Episode:
    trajectory = episode.trajectories[agent]
    turns = list(trajectory.turns)
    turns[index] = replace(turns[index], **changes)
    return replace(
        episode, trajectories={**episode.trajectories, agent: replace(trajectory, turns=tuple(turns))}
    )


def moved(critic: Critic, before: Episode, after: Episode) -> set[tuple[str, int]]:
    """The turns whose value differs."""
    one, two = critic.values([before]), critic.values([after])
    return {(key.agent, key.index) for key in one if not np.array_equal(one[key], two[key])}


def test_the_central_critic_reads_the_truth_and_what_was_said(starter: TransformersModel) -> None:
    critic = critic_on(starter)
    episode = one_episode()
    state = replace(episode, states=("left 2 open a", "left 1 open c", "left 0"))
    assert moved(critic, episode, state) == {("agent_0", 1), ("agent_1", 1)}
    other = made.message("agent_0", 0, ["agent_1"], payload="a south")
    said = with_turn(episode, "agent_1", 1, inbox=(other,))
    assert moved(critic, episode, said) == {("agent_0", 1), ("agent_1", 1)}
    assert moved(critic, episode, with_turn(episode, "agent_0", 0, prompt_ids=(3, 9))) == set()
    assert moved(critic, episode, with_turn(episode, "agent_0", 0, action="west")) == set()
    one, two = (critic.values([episode])[TurnKey(0, agent, 0)] for agent in AGENTS)
    assert one != two, "both agents have the same column"


def test_a_message_to_several_is_read_once(starter: TransformersModel) -> None:
    said = made.message("agent_0", 0, AGENTS)
    turns = {agent: [made.turn(agent, 0, inbox=(said,))] for agent in AGENTS}
    (reading,) = CriticReader(starter.tokenizer, AGENTS, CriticContext.CENTRAL).read([made.episode(turns)])
    assert list(reading.ids) == starter.tokenizer("s agent_0 a stay")["input_ids"]
    assert [column for _, column, _, _ in reading.places] == [0, 1]


def test_the_own_context_critic_reads_the_prompt_and_nothing_else(starter: TransformersModel) -> None:
    critic = critic_on(starter, context="own")
    episode = one_episode()
    assert moved(critic, episode, replace(episode, states=("left 0", "left 0 a", "left"))) == set()
    assert moved(critic, episode, with_turn(episode, "agent_1", 1, inbox=())) == set()
    assert moved(critic, episode, with_turn(episode, "agent_0", 1, completion_ids=(6, 6))) == set()
    assert moved(critic, episode, with_turn(episode, "agent_0", 1, prompt_ids=(7, 9))) == {("agent_0", 1)}


def test_the_agent_central_critic_reads_the_truth_and_then_the_own_prompt(starter: TransformersModel) -> None:
    critic = critic_on(starter, context="agent-central")
    episode = one_episode()
    assert moved(critic, episode, replace(episode, states=("left 0", *episode.states[1:]))) == {
        ("agent_0", 0), ("agent_1", 0),
    }  # fmt: skip
    assert moved(critic, episode, with_turn(episode, "agent_0", 1, prompt_ids=(7, 9))) == {("agent_0", 1)}
    assert moved(critic, episode, with_turn(episode, "agent_0", 1, completion_ids=(6, 6))) == set()
    contexts = (CriticContext.CENTRAL, CriticContext.OWN, CriticContext.AGENT_CENTRAL)
    truths, prompts, both = (CriticReader(starter.tokenizer, AGENTS, each).read([episode]) for each in contexts)
    assert [r.ids for r in both] == [truths[n // 2].ids + prompts[n].ids for n in range(len(prompts))]


def test_chained_values_read_exactly_the_earlier_agents_actions(starter: TransformersModel) -> None:
    agents = ("agent_0", "agent_1", "agent_2")
    turns = {a: [made.turn(a, s, made.ACTIONS[(n + s) % 3]) for s in range(2)] for n, a in enumerate(agents)}
    episode = replace(made.episode(turns), states=("left 2", "left 1", "left 0"))
    reader = CriticReader(starter.tokenizer, agents, CriticContext.CENTRAL, acted=True)
    readings = reader.read([episode])
    expected = []
    for step in range(2):
        for number in range(3):
            done = " ".join(f"{a} {turns[a][step].action}" for a in agents[:number])
            expected.append(starter.tokenizer(f"{episode.states[step]} {done}")["input_ids"])
    assert [list(reading.ids) for reading in readings] == expected
    assert [reading.places[0][1:3] for reading in readings] == [
        (number, TurnKey(0, agent, step)) for step in range(2) for number, agent in enumerate(agents)
    ]
    critic = critic_on(starter, options={"acted": True})
    pair = one_episode()
    assert moved(critic, pair, with_turn(pair, "agent_0", 0, action="west")) == {("agent_1", 0)}
    assert moved(critic, pair, with_turn(pair, "agent_1", 1, action="west")) == set()


@pytest.mark.parametrize("context", CriticContext)
def test_values_per_token_know_only_the_tokens_before(starter: TransformersModel, context: CriticContext) -> None:
    critic = critic_on(starter, options={"per_token": True}, context=context)
    episode = one_episode()
    for agent in AGENTS:
        for index in range(2):
            episode = with_turn(episode, agent, index, completion_ids=(4, 5, 6, 7, 8), sampled=(True,) * 5)
    before = critic.values([episode])
    key = TurnKey(0, "agent_1", 1)
    assert np.shape(before[key]) == (5,)
    for place in range(5):
        ids = [4, 5, 6, 7, 8]
        ids[place] = 10
        after = critic.values([with_turn(episode, "agent_1", 1, completion_ids=tuple(ids))])
        same = np.isclose(before[key], after[key], rtol=0, atol=1e-6)
        assert same.tolist() == [token <= place for token in range(5)], place
        assert all(np.allclose(before[k], after[k], rtol=0, atol=1e-6) for k in before if k != key)
    # The value before token j is the value at the end of what had been written until then.
    whole = CriticReader(starter.tokenizer, AGENTS, context, per_token=True).read([episode])[-1]
    for token, _, turn, place in whole.places:
        assert turn == key
        cut = replace(whole, ids=whole.ids[: token + 1], places=((token, 1, key, 0),))
        with torch.no_grad(), critic.encoder.open(1):
            value, column = critic._forward([cut])
        expected = float(critic.head.raw(value, column))
        assert np.asarray(before[key])[place] == pytest.approx(expected, abs=1e-6)
        assert len(cut.ids) == len(whole.ids) - (4 - place)


@pytest.mark.parametrize("context", CriticContext)
def test_players_that_do_not_learn_need_no_value(starter: TransformersModel, context: CriticContext) -> None:
    episode = one_episode()
    for index in range(2):
        episode = with_turn(
            episode, "agent_0", index, completion_ids=(), prompt_ids=(), sampled=(), logprobs=(), adapter=None
        )
    values = critic_on(starter, context=context).values([episode])
    assert set(values) == {TurnKey(0, "agent_1", 0), TurnKey(0, "agent_1", 1)}
    reader = CriticReader(starter.tokenizer, AGENTS, context, learners={"agent_0"})
    assert {place[2].agent for reading in reader.read([one_episode()]) for place in reading.places} == {"agent_0"}
    assert not reader.read([episode])
