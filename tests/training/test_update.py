"""From advantages to steps: ratios per turn, one agent after the other, corrections, limits, whose gradient it is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import TrainerCallback

from preconcert.agents import Context
from preconcert.core import TrainingError
from preconcert.envs.normal_form import GAMES
from preconcert.models import UNCONSTRAINED, LoraSettings, TransformersModel
from preconcert.training.grpo import MultiAgentGRPOTrainer
from preconcert.training.rows import GrammarTable, Row, trained_tokens, worth_training
from preconcert.training.run import grpo_config
from preconcert.training.update import (
    Order,
    RatioLevel,
    UpdateSettings,
    agent_order,
    approximate_kl,
    compounding,
    importance_weights,
    turn_level,
    turn_weights,
)
from tests.training.teams import (
    AGENTS,
    FixedSource,
    gradients_of,
    largest_difference,
    load,
    play,
    recipe_of,
    rows_of,
    settings_of,
    team_on,
    trainer_on,
    weights_of,
)

LOW, HIGH = 0.2, 0.28
SEQUENTIAL = UpdateSettings(order=Order.SEQUENTIAL)


def uneven(number: int) -> float:
    """Advantages of both signs, some of them 0."""
    return (0.7, -1.3, 0.0, 1.9, -0.4)[number % 5]


def stale(rows: Sequence[Row], size: float = 0.4) -> list[Row]:
    """As if another policy had sampled: most ratios are no longer 1, and some are clipped."""
    rng = np.random.default_rng(3)
    return [
        replace(
            row, logprobs=(row.logprobs + row.policy * rng.normal(0.1, size, len(row.policy))).astype(np.float32)
        )
        for row in rows
    ]


def ragged(rows: Sequence[Row]) -> list[Row]:
    """Turns of different lengths: some tokens, never a turn's first, are taken out of the policy loss."""
    rng = np.random.default_rng(5)
    found = []
    for row in rows:
        keep = rng.random(len(row.policy)) < 0.6
        for places in turns_of(row):
            keep[places[0]] = True
        policy = row.policy & keep
        found.append(replace(row, policy=policy, logprobs=row.logprobs * policy, advantages=row.advantages * policy))
    return found


def logps_by_hand(model: TransformersModel, row: Row, table: GrammarTable) -> torch.Tensor:
    """Of one row alone, under its adapter, with gradients: no padding, no route, no TRL."""
    tokens, allowed = table.arrays()
    model.model.set_adapter(row.adapter)
    ids = torch.tensor([row.prompt_ids + row.completion_ids])
    logits = model.model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
    for place, state in enumerate(row.allowed):
        if state != UNCONSTRAINED:
            ban = torch.ones(logits.shape[1], dtype=torch.bool)
            ban[tokens[allowed[state]]] = False
            logits = logits.index_put((torch.tensor(place),), logits[place].masked_fill(ban, -1e9))
    return logits.log_softmax(-1).gather(1, ids[0, len(row.prompt_ids) :, None])[:, 0]


def surrogate(ratio: torch.Tensor, advantage: Any, dual: float | None = None) -> torch.Tensor:
    """PPO's clipped objective; below an advantage of 0, not lower than `dual` times it."""
    best = torch.minimum(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)
    if dual is None:
        return best
    advantage = torch.as_tensor(advantage)
    return torch.where(advantage < 0, torch.maximum(best, dual * advantage), best)


def turns_of(row: Row) -> list[np.ndarray]:
    """The places of each turn's policy tokens."""
    return [np.flatnonzero(row.policy & (row.joint == step)) for step in np.unique(row.joint[row.policy])]


def gradient_by_hand(
    model: TransformersModel,
    rows: Sequence[Row],
    table: GrammarTable,
    objective: Callable[[Row, torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Of −Σ over rows of objective(row, log-ratio per token)."""
    wanted = {key: value.requires_grad for key, value in model.model.named_parameters()}
    active = model.model.active_adapter
    total = {key: torch.zeros_like(value) for key, value in weights_of(model).items()}
    for row in rows:
        change = logps_by_hand(model, row, table) - torch.from_numpy(row.logprobs)
        (-objective(row, change)).backward()
        for key, value in model.adapter_parameters(row.adapter).items():
            if value.grad is not None:
                total[f"{row.adapter} {key}"] += value.grad
        model.model.zero_grad()
    model.model.set_adapter(active)
    for key, value in model.model.named_parameters():
        value.requires_grad_(wanted[key])
    return total


def close(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], name: str) -> None:
    size = max(float(value.abs().max()) for value in expected.values())
    difference = largest_difference(found, expected)
    print(f"{name}: gradients up to {size:.1e}, largest difference {difference:.1e}")
    assert size > 1e-3
    assert difference < 2e-5 * max(1.0, size)


# ---- the level of the ratio


def test_turn_level_is_the_mean_of_the_turn() -> None:
    old = torch.tensor([[-1.0, -2.0, -3.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.0, -1.0]])
    change = torch.tensor([[0.1, 0.3, 9.0, -0.5, 9.0], [1.0, 2.0, 3.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False, True, False], [True, True, True, False, False]])
    joint = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, -1, -1]])
    found = turn_level(old + change, old, mask, joint) - old
    expected = torch.tensor([[0.2, 0.2, 9.0, -0.5, 9.0], [2.0, 2.0, 2.0, 9.0, 9.0]])
    assert torch.allclose(found, expected, atol=1e-6)
    weights = turn_weights(mask, joint)
    assert torch.allclose(weights[0], torch.tensor([0.75, 0.75, 1.0, 1.5, 1.0]))
    assert torch.equal(weights[1], torch.ones(5))
    assert torch.equal(turn_weights(torch.zeros_like(mask), joint), torch.ones(2, 5))


@pytest.mark.parametrize("loss", ["dapo", "grpo"])
@pytest.mark.parametrize("context", Context)
def test_turn_ratios_give_the_gradient_by_hand(
    starter: TransformersModel, tmp_path: Path, context: Context, loss: str
) -> None:
    """A turn has one ratio, clipped once. Under loss=grpo a row is the mean of its turns, however long they are."""
    team = team_on(starter, settings_of(context))
    rows, table = rows_of(team, play(team, seeds=1), uneven)
    rows = stale(ragged(rows))
    assert len({len(places) for row in rows for places in turns_of(row)}) > 2
    assert max(len(turns_of(row)) for row in rows) == (1 if context is Context.TURN else 3)
    tokens = sum(int(row.policy.sum()) for row in rows)
    clipped = [0, 0]

    def objective(row: Row, change: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        turns = turns_of(row)
        for places in turns:
            ratio = change[places].mean().exp()
            clipped[int(not 1 - LOW < ratio < 1 + HIGH)] += 1
            one = surrogate(ratio, float(row.advantages[places[0]]))
            total = total + one * (len(places) / tokens if loss == "dapo" else 1 / len(turns) / len(rows))
        return total

    expected = gradient_by_hand(starter, rows, table, objective)
    assert min(clipped) > 0, clipped
    trainer = trainer_on(
        starter, FixedSource(rows), table, tmp_path, loss=loss, update=UpdateSettings(ratio=RatioLevel.TURN)
    )
    close(gradients_of(trainer, starter), expected, f"turn ratio, {context.value}, {loss}")


def test_a_long_turn_weighs_as_much_as_a_short_one() -> None:
    """Two turns in one row, of 1 and 40 tokens, each with its own advantage: the same pull on each turn's ratio."""
    mask, joint = torch.ones(1, 41, dtype=torch.bool), torch.tensor([[0] + [1] * 40])
    logps = torch.zeros(1, 41, requires_grad=True)
    found = turn_level(logps, torch.zeros(1, 41), mask, joint).exp()
    (found * turn_weights(mask, joint)).mean().backward()
    assert logps.grad is not None
    one, many = float(logps.grad[0, 0]), float(logps.grad[0, 1:].sum())
    print(f"pull on the ratio of the turn of 1 token {one:.3f}, of 40 tokens {many:.3f}")
    assert one == pytest.approx(0.5)
    assert many == pytest.approx(0.5)


@pytest.mark.parametrize("context", Context)
def test_on_the_sampling_policy_turn_and_token_ratios_agree(
    starter: TransformersModel, tmp_path: Path, context: Context
) -> None:
    """All ratios are 1 there, and a turn's ratio moves with the mean of its tokens', counted once per token."""
    team = team_on(starter, settings_of(context))
    rows, table = rows_of(team, play(team, seeds=1), uneven)
    token, turn = (
        gradients_of(
            trainer_on(starter, FixedSource(rows), table, tmp_path, update=UpdateSettings(ratio=level)), starter
        )
        for level in (RatioLevel.TOKEN, RatioLevel.TURN)
    )
    assert largest_difference(token, turn) < 1e-6
    assert max(float(value.abs().max()) for value in token.values()) > 1e-3


def test_sequence_ratios_are_those_of_trl(starter: TransformersModel, tmp_path: Path) -> None:
    team = team_on(starter)
    rows, table = rows_of(team, play(team, seeds=1), uneven)
    rows = stale(rows)
    sequence = UpdateSettings(ratio=RatioLevel.SEQUENCE)
    found = gradients_of(trainer_on(starter, FixedSource(rows), table, tmp_path, update=sequence), starter)
    config = grpo_config(recipe_of(), tmp_path)
    config.importance_sampling_level = "sequence"
    stock = MultiAgentGRPOTrainer(starter.model, starter.tokenizer, config, FixedSource(rows), AGENTS, table)
    assert largest_difference(found, gradients_of(stock, starter)) == 0.0
    tokens = sum(int(row.policy.sum()) for row in rows)

    def objective(row: Row, change: torch.Tensor) -> torch.Tensor:
        places = np.flatnonzero(row.policy)
        return surrogate(change[places].mean().exp(), float(row.advantages[places[0]])) * len(places) / tokens

    close(found, gradient_by_hand(starter, rows, table, objective), "sequence ratio")


# ---- corrections and limits


def test_dual_clip_bounds_the_ratio_of_bad_actions(starter: TransformersModel, tmp_path: Path) -> None:
    team = team_on(starter)
    rows, table = rows_of(team, play(team, seeds=1), uneven)
    rows = stale(rows, size=1.5)
    tokens = sum(int(row.policy.sum()) for row in rows)
    bounded = 0

    def objective(row: Row, change: torch.Tensor) -> torch.Tensor:
        nonlocal bounded
        ratio = change[row.policy].exp()
        bounded += int(((ratio > 1.5) & torch.from_numpy(row.advantages[row.policy] < 0)).sum())
        return surrogate(ratio, torch.from_numpy(row.advantages[row.policy]), 1.5).sum() / tokens

    expected = gradient_by_hand(starter, rows, table, objective)
    assert bounded > 5
    trainer = trainer_on(starter, FixedSource(rows), table, tmp_path, update=UpdateSettings(dual_clip=1.5))
    close(gradients_of(trainer, starter), expected, f"dual clip, {bounded} tokens beyond it")
    with pytest.raises(TrainingError, match=r"dual_clip=1\.1"):
        trainer_on(starter, FixedSource(rows), table, tmp_path, update=UpdateSettings(dual_clip=1.1))


def test_importance_weights_are_truncated() -> None:
    trainer, sampler = torch.log(torch.tensor([[0.5, 0.9, 0.1, 0.4]])), torch.log(torch.tensor([[0.4, 0.1, 0.4, 0.1]]))
    mask = torch.tensor([[True, True, True, False]])
    assert importance_weights(trainer, sampler, mask, 2.0).tolist() == [pytest.approx([1.25, 2.0, 0.25, 1.0])]
    total, tokens = approximate_kl(trainer, sampler, mask)
    ratios = [1.25, 9.0, 0.25]
    assert float(total) == pytest.approx(sum(r - 1 - math.log(r) for r in ratios), rel=1e-5)
    assert float(tokens) == 3


def test_a_sampler_that_differs_is_corrected(starter: TransformersModel, tmp_path: Path) -> None:
    team = team_on(starter)
    rows, table = rows_of(team, play(team, seeds=1), uneven)
    perturbed = stale(rows, size=0.6)
    cap = 1.4
    trainer = trainer_on(starter, FixedSource(perturbed), table, tmp_path, update=UpdateSettings(correction=cap))
    batch = trainer._generate_and_score_completions(None)
    weights, differences = [], []
    for i, (row, sampled) in enumerate(zip(rows, perturbed, strict=True)):
        n = len(row.policy)
        with torch.no_grad():
            mine = logps_by_hand(starter, row, table).numpy()
        expected = np.where(row.policy, np.minimum(np.exp(mine - sampled.logprobs), cap), 1.0)
        assert np.abs(batch["advantages"][i, :n].numpy() - row.advantages * expected).max() < 1e-5
        assert np.abs(batch["old_per_token_logps"][i, :n].numpy() - mine)[row.policy].max() < 1e-5
        weights += list(expected[row.policy])
        differences += list(np.abs(mine - sampled.logprobs)[row.policy])
    assert max(weights) == cap
    assert min(weights) < 0.8
    assert trainer._metrics["train"]["sampler_mismatch"] == [pytest.approx(np.mean(differences), rel=1e-4)]
    assert trainer._metrics["train"]["sampler_weight"] == [pytest.approx(np.mean(weights), rel=1e-4)]


@pytest.mark.parametrize("correction", [None, 2.0])
def test_the_backend_samples_what_the_trainer_computes(
    starter: TransformersModel, tmp_path: Path, correction: float | None
) -> None:
    team = team_on(starter)
    rows, table = rows_of(team, play(team, seeds=1), uneven)
    update = UpdateSettings(correction=correction)
    trainer = trainer_on(starter, FixedSource(rows), table, tmp_path, update=update)
    gradients_of(trainer, starter)
    (mismatch,) = trainer._metrics["train"]["sampler_mismatch"]
    print(f"correction={correction}: sampler mismatch {mismatch:.1e} nats")
    assert mismatch < 1e-5
    assert trainer._metrics["train"]["approx_kl"][0] < 1e-8


class Steps(TrainerCallback):
    """Weights and Adam's state after every step, and which adapters had gradients before it."""

    def __init__(self, model: TransformersModel) -> None:
        self.model = model
        self.weights: list[dict[str, torch.Tensor]] = [weights_of(model)]
        self.moments: list[dict[str, torch.Tensor]] = []
        self.driven: list[set[str]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the backward pass."""
        self.driven.append(
            {n for n in AGENTS if n in self.model.adapters
             and any(p.grad is not None for p in self.model.adapter_parameters(n).values())}
        )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """After the optimiser."""
        self.weights.append(weights_of(self.model))
        held = getattr(optimizer, "optimizer", optimizer).state
        self.moments.append(
            {f"{i} {key}": value.clone() for i, s in enumerate(held.values()) for key, value in s.items()}
        )

    def moved(self, step: int) -> set[str]:
        """The adapters that a step, counted from 0, changed."""
        before, after = self.weights[step], self.weights[step + 1]
        return {key.split()[0] for key in before if not torch.equal(before[key], after[key])}


def logged(trainer: MultiAgentGRPOTrainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def test_far_from_the_sampler_the_rest_of_an_iteration_is_skipped(starter: TransformersModel, tmp_path: Path) -> None:
    team = team_on(starter)
    rows, table = rows_of(team, play(team, seeds=1), uneven)
    steps = Steps(starter)
    trainer = trainer_on(
        starter, FixedSource(rows), table, tmp_path, callbacks=[steps], iterations=2, epochs=2, minibatches=2, lr=0.05,
        update=UpdateSettings(kl_stop=1e-3),
    )  # fmt: skip
    trainer.train()
    # The first step finds nothing amiss. What it does is too much, so the other three of the iteration stand still;
    # the second iteration has the first one's rows, so that it stands still from the start.
    assert steps.moved(0) == set(AGENTS)
    assert [steps.moved(step) for step in range(1, 8)] == [set()] * 7
    first = steps.moments[0]
    assert first
    assert all(torch.equal(first[key], later[key]) for later in steps.moments[1:] for key in first)
    assert logged(trainer, "skipped_steps") == [3.0, 4.0]
    assert trainer.state.global_step == 8
    free = trainer_on(
        starter, FixedSource(rows), table, tmp_path, epochs=2,
        update=UpdateSettings(kl_stop=1e9),
    )  # fmt: skip
    free.train()
    assert logged(free, "skipped_steps") == [0.0]


def test_skipping_inside_an_accumulated_step_skips_all_of_it(starter: TransformersModel, tmp_path: Path) -> None:
    team = team_on(starter)
    rows, table = rows_of(team, play(team, seeds=1), uneven)
    steps = Steps(starter)
    trainer = trainer_on(
        starter, FixedSource(rows), table, tmp_path, callbacks=[steps], epochs=2, minibatches=4, accumulate=2, lr=0.05,
        update=UpdateSettings(kl_stop=1e-3),
    )  # fmt: skip
    trainer.train()
    assert [steps.moved(step) for step in range(4)] == [set(AGENTS), set(), set(), set()]
    assert logged(trainer, "skipped_steps") == [3.0]


# ---- one agent after the other


def sequential(
    model: TransformersModel, rows: Sequence[Row], table: GrammarTable, folder: Path, **options: Any
) -> MultiAgentGRPOTrainer:
    plain: dict[str, Any] = {"minibatches": 2, "lr": 0.05, "update": SEQUENTIAL, "agents": AGENTS}
    return trainer_on(model, FixedSource(rows), table, folder, **{**plain, **options})


def log_ratios(model: TransformersModel, rows: Sequence[Row], table: GrammarTable) -> dict[int, float]:
    """By joint step, the sum over an agent's policy tokens of log π_now − log π_then."""
    found: dict[int, float] = defaultdict(float)
    for row in rows:
        with torch.no_grad():
            change = logps_by_hand(model, row, table).numpy() - row.logprobs
        for place in np.flatnonzero(row.policy):
            found[int(row.joint[place])] += float(change[place])
    return found


def test_compounding_multiplies_ratios() -> None:
    old = torch.log(torch.tensor([[0.5, 0.5], [0.2, 0.4]]))
    new = torch.log(torch.tensor([[0.25, 1.0], [0.4, 0.1]]))
    mask, joint = torch.tensor([[True, True], [True, False]]), torch.tensor([[0, 1], [1, 1]])
    start = torch.log(torch.tensor([3.0, 1.0, 7.0], dtype=torch.float64))
    found = compounding(start, new, old, mask, joint).exp()
    assert found.tolist() == pytest.approx([1.5, 4.0, 7.0])
    assert start.exp().tolist() == pytest.approx([3.0, 1.0, 7.0])


@pytest.mark.parametrize("context", Context)
def test_later_agents_advantages_carry_the_earlier_ones_ratios(
    starter: TransformersModel, tmp_path: Path, context: Context
) -> None:
    team = team_on(starter, settings_of(context))
    rows, table = rows_of(team, play(team, seeds=1), uneven)
    trainer = sequential(starter, rows, table, tmp_path, minibatches=4, epochs=2, lr=0.002)
    trainer.train()
    first, second = agent_order(AGENTS, trainer.args.seed, 0)
    # The first agent's adapter is left alone from its slot's end on, so its weights now are those of the hand-over.
    by_hand = log_ratios(starter, [row for row in rows if row.agent == first], table)
    factor = {step: math.exp(min(max(value, -math.log(2)), math.log(2))) for step, value in by_hand.items()}
    found = {step: float(value) for step, value in enumerate(trainer._schedule.log_factor)}
    assert max(abs(found[step] - by_hand[step]) for step in by_hand) < 1e-4
    assert len({round(value, 3) for value in factor.values()}) > 3
    assert max(abs(math.log(value)) for value in factor.values()) > 0.05
    plain = {(row.name, t): row for row in rows if row.agent == second for t in range(len(row.policy))}
    expected = sorted(
        row.advantages[t] * factor[int(row.joint[t])] for (_, t), row in plain.items() if row.policy[t]
    )
    pieces = trainer._schedule.pieces(second)
    mine = sorted(
        float(a) for p in pieces for a in p["advantages"][(p["tool_mask"] * p["completion_mask"]).bool()]
    )
    assert len({round(value, 4) for value in mine}) > 6, "the same number everywhere would compare anything"
    difference = max(abs(a - b) for a, b in zip(mine, expected, strict=True))
    print(f"{context.value}: factors {min(factor.values()):.2f} to {max(factor.values()):.2f}, "
          f"advantages differ by at most {difference:.1e}")  # fmt: skip
    assert difference < 1e-3
    assert logged(trainer, "compound_factor") == [pytest.approx(np.mean(list(factor.values())), rel=1e-3)]


def test_agents_move_in_their_own_slots_alone(starter: TransformersModel, tmp_path: Path) -> None:
    """Also where a slot has more minibatches than rows: Adam's momentum must not move who is not there."""
    team = team_on(starter)
    rows, table = rows_of(team, play(team, seeds=1), uneven, hindsight=True)
    few = [row for row in rows if row.agent == AGENTS[1]][:2]
    rows = [row for row in rows if row.agent == AGENTS[0]] + few
    steps = Steps(starter)
    trainer = sequential(
        starter, rows, table, tmp_path, callbacks=[steps], iterations=6, minibatches=8, hindsight_weight=0.5
    )
    trainer.train()
    orders = [agent_order(AGENTS, trainer.args.seed, iteration) for iteration in range(6)]
    assert len(set(orders)) == 2
    slots = [{agent} for order in orders for agent in order for _ in range(4)]
    assert [driven <= slot for driven, slot in zip(steps.driven, slots, strict=True)] == [True] * len(slots)
    assert [steps.moved(step) <= slot for step, slot in enumerate(slots)] == [True] * len(slots)
    assert all(steps.moved(step) for step in range(0, len(slots), 4))


@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_the_first_agent_is_updated_as_if_it_were_alone(
    checkpoint: Callable[[str], Path], tmp_path: Path, loss: str
) -> None:
    model = load(checkpoint("starter"))
    team = team_on(model)
    rows, table = rows_of(team, play(team, seeds=1), uneven, hindsight=True)
    shorter = [row for i, row in enumerate(rows) if row.agent == AGENTS[0] or i % 2]  # unequal shares of the tokens
    trainers = []
    for together in (True, False):
        model = load(checkpoint("starter"))
        first = agent_order(AGENTS, grpo_config(recipe_of(), tmp_path).seed, 0)[0]
        mine = shorter if together else [row for row in shorter if row.agent == first]
        options: dict[str, Any] = {"epochs": 2, "loss": loss, "hindsight_weight": 0.5}
        if together:
            trainer = sequential(model, mine, table, tmp_path, **options)
        else:
            trainer = trainer_on(model, FixedSource(mine), table, tmp_path, **options)
        trainer.optimizer = torch.optim.SGD([p for p in model.model.parameters() if p.requires_grad], lr=0.3)
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda _: 1.0)
        trainer.train()
        trainers.append({key: value for key, value in weights_of(model).items() if key.startswith(first)})
    start = {key: value for key, value in weights_of(load(checkpoint("starter"))).items() if key in trainers[0]}
    moved, difference = largest_difference(trainers[0], start), largest_difference(*trainers)
    print(f"{loss}: the first agent moved {moved:.1e}, alone by {difference:.1e} differently")
    assert moved > 1e-3
    assert difference < 1e-6


def test_a_frozen_agent_stays_as_it_is(starter: TransformersModel, tmp_path: Path) -> None:
    team = team_on(starter)
    rows, table = rows_of(team, play(team, seeds=1), uneven, trainable=frozenset([AGENTS[1]]))
    before = weights_of(starter)
    sequential(starter, rows, table, tmp_path, trainable=[AGENTS[1]], agents=[AGENTS[1]], iterations=2).train()
    after = weights_of(starter)
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith(AGENTS[0]))
    assert all(not torch.equal(before[key], after[key]) for key in before if key.startswith(AGENTS[1]))


def test_the_order_is_random_and_reproducible() -> None:
    agents = ("a", "b", "c")
    orders = [agent_order(agents, 5, iteration) for iteration in range(200)]
    assert orders == [agent_order(agents, 5, iteration) for iteration in range(200)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert min(counts) > 15
    assert orders != [agent_order(agents, 6, iteration) for iteration in range(200)]


def test_a_sequential_update_is_resumed_exactly(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(checkpoint("starter"))
    team = team_on(model)
    rows, table = rows_of(team, play(team, seeds=1), uneven, hindsight=True)
    options: dict[str, Any] = {
        "iterations": 4, "minibatches": 4, "epochs": 2, "checkpoint_every": 3, "hindsight_weight": 0.5,
        "update": UpdateSettings(order=Order.SEQUENTIAL, kl_stop=0.5),
    }  # fmt: skip
    sequential(model, rows, table, tmp_path / "run", **options).train()
    whole = weights_of(model)
    again = load(checkpoint("starter"))
    trainer = sequential(again, rows, table, tmp_path / "run", **options)
    held = tmp_path / "run" / "checkpoint-24"
    assert (held / "complete.json").is_file()
    trainer.train(resume_from_checkpoint=str(held))
    found = weights_of(again)
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    assert largest_difference(found, weights_of(load(checkpoint("starter")))) > 1e-3


def test_kl_stop_ends_one_agents_slot_and_not_the_next(starter: TransformersModel, tmp_path: Path) -> None:
    team = team_on(starter)
    rows, table = rows_of(team, play(team, seeds=1), uneven)
    steps = Steps(starter)
    trainer = sequential(
        starter, rows, table, tmp_path, callbacks=[steps], minibatches=4, epochs=2,
        update=UpdateSettings(order=Order.SEQUENTIAL, kl_stop=1e-3),
    )  # fmt: skip
    trainer.train()
    first, second = agent_order(AGENTS, trainer.args.seed, 0)
    expected = [{first}, set(), set(), set(), {second}, set(), set(), set()]
    assert [steps.moved(step) for step in range(8)] == expected
    assert logged(trainer, "skipped_steps") == [6.0]


def test_settings_that_do_not_fit_are_refused(starter: TransformersModel, tmp_path: Path) -> None:
    source, table = FixedSource([]), GrammarTable()
    with pytest.raises(TrainingError, match="names of the agents"):
        trainer_on(starter, source, table, tmp_path, update=SEQUENTIAL)
    with pytest.raises(TrainingError, match="multiple of 2"):
        trainer_on(starter, source, table, tmp_path, update=SEQUENTIAL, agents=AGENTS, minibatches=3)
    with pytest.raises(TrainingError, match="accumulate=1"):
        trainer_on(starter, source, table, tmp_path, update=SEQUENTIAL, agents=AGENTS, minibatches=2, accumulate=2)
    with pytest.raises(TrainingError, match="beta"):
        trainer_on(starter, source, table, tmp_path, update=UpdateSettings(ratio=RatioLevel.TURN), beta=0.1)
    with pytest.raises(ValidationError):
        UpdateSettings(compound_clip=0.5)


# ---- rows


def test_left_out_rows_are_chosen_by_name(starter: TransformersModel) -> None:
    """Whoever holds a row, it is chosen alike; in a sequential update all rows stay, some without their targets."""
    team = team_on(starter)
    rows, _ = rows_of(team, play(team, seeds=6), lambda number: 0.0 if number % 3 else 1.0, hindsight=True)
    assert len({row.name for row in rows}) == len(rows)
    kept, tokens = worth_training(rows, 0.4, 11)
    names = {row.name for row in kept}
    halves = [worth_training(half, 0.4, 11)[0] for half in (rows[::2], rows[1::2])]
    assert {row.name for half in halves for row in half} == names
    assert {row.name for row in worth_training(rows, 0.4, 12)[0]} != names
    assert tokens == sum(int(row.policy.sum()) for row in rows)
    silent = [row for row in rows if not row.advantages.any() and (row.targets >= 0).any()]
    share = sum(row.name in names for row in silent) / len(silent)
    print(f"{share:.2f} of {len(silent)} rows without an advantage kept, 0.40 wanted")
    assert 0.2 < share < 0.6
    everything, _ = worth_training(rows, 0.4, 11, keep=True)
    assert [row.name for row in everything] == [row.name for row in rows]
    assert [bool((row.targets >= 0).any()) for row in everything] == [
        row.name in names and bool((row.targets >= 0).any()) for row in rows
    ]
    (last,), _ = worth_training(silent, 0.0, 11)
    assert (last.targets == -1).all(), "a row that is kept only to have one must teach nothing"
    assert worth_training([], 0.5, 0) == ([], 0)


def test_trained_tokens_are_counted_by_span(starter: TransformersModel, tmp_path: Path) -> None:
    team = team_on(starter)
    episodes = play(team, seeds=1)
    rows, table = rows_of(team, episodes, lambda number: 0.0 if number % 3 else 1.0, hindsight=True)
    expected: dict[str, int] = dict.fromkeys(("intend", "foresee", "say", "act", "other"), 0)
    number = 0
    for episode in episodes:
        for trajectory in episode.trajectories.values():
            for turn in trajectory.turns:
                for span in turn.spans if number % 3 == 0 else ():
                    expected[span.kind.value] += int(rows[number].policy[span.start : span.end].sum())
                number += 1
    counts = trained_tokens(rows)
    assert counts == {**expected, "hindsight": sum(int((row.targets >= 0).sum()) for row in rows)}
    assert min(counts["foresee"], counts["say"], counts["act"], counts["hindsight"]) > 0
    trainer = trainer_on(starter, FixedSource(rows), table, tmp_path, hindsight_weight=0.5)
    trainer.train()
    for name, count in counts.items():
        assert logged(trainer, f"trained_tokens/{name}") == [count]


# ---- whose gradient


def test_shares_of_the_gradient_sum_to_one(starter: TransformersModel, tmp_path: Path) -> None:
    team = team_on(starter)
    rows, table = rows_of(team, play(team, seeds=1), lambda number: uneven(number) * (3 if number % 2 else 1))
    trainer = trainer_on(starter, FixedSource(rows), table, tmp_path, iterations=2, minibatches=2, lr=1e-3)
    trainer.train()
    shares = [logged(trainer, f"gradient_share/{agent}") for agent in AGENTS]
    assert [sum(pair) for pair in zip(*shares, strict=True)] == [pytest.approx(1.0)] * 2
    assert abs(shares[0][0] - 0.5) > 1e-3


def shared_model(folder: Path, dropout: float = 0.0) -> TransformersModel:
    model = TransformersModel.load(folder, LoraSettings(r=2, alpha=4, dropout=dropout))
    model.add_adapter("team", 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in model.adapter_parameters("team").items():
            if "lora_B" in key:
                value.normal_(0, 0.1, generator=generator)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_taking_a_shared_gradient_apart_changes_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path, checkpointing: bool
) -> None:
    """Bit for bit, with dropout drawing random numbers in every pass."""
    ends, logs = [], []
    for every in (0, 2):
        model = shared_model(checkpoint("starter"), dropout=0.2)
        team = team_on(model)
        rows, table = rows_of(
            team, play(team, seeds=1), uneven, hindsight=True, trainable=frozenset(["team"])
        )
        trainer = trainer_on(
            model, FixedSource(rows), table, tmp_path / str(every), trainable=["team"], agents=AGENTS, iterations=3,
            epochs=2, minibatches=2, lr=0.01, hindsight_weight=0.5, gradient_checkpointing=checkpointing,
            update=UpdateSettings(share_every=every),
        )  # fmt: skip
        trainer.train()
        ends.append(weights_of(model))
        logs.append(trainer.state.log_history)
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    times = ("_time", "_runtime", "_per_second")
    found = [
        [
            {k: v for k, v in line.items() if not k.endswith(times) and not k.startswith("gradient_share/agent_")}
            for line in log
        ]
        for log in logs
    ]
    assert found[0] == found[1]
    shares = [[line.get(f"gradient_share/{agent}") for agent in AGENTS] for line in logs[1] if "loss" in line]
    print(f"shares of the agents by iteration: {shares}")
    assert [pair[0] is None for pair in shares] == [False, True, False]
    assert sum(shares[0]) == pytest.approx(1.0)
    assert not any(f"gradient_share/{agent}" in line for agent in AGENTS for line in logs[0])


@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_shares_of_a_shared_adapter_are_those_of_its_agents_rows(
    checkpoint: Callable[[str], Path], tmp_path: Path, loss: str
) -> None:
    model = shared_model(checkpoint("starter"))
    team = team_on(model)
    rows, table = rows_of(
        team, play(team, seeds=1), lambda number: uneven(number) * (3 if number % 2 else 1),
        trainable=frozenset(["team"]),
    )  # fmt: skip
    tokens = sum(int(row.policy.sum()) for row in rows)
    squares = []
    for agent in AGENTS:
        gradient = gradient_by_hand(
            model, [row for row in rows if row.agent == agent], table,
            lambda row, change: (change[row.policy].exp() * torch.from_numpy(row.advantages[row.policy])).sum()
            / (tokens if loss == "dapo" else len(rows) * int(row.policy.sum())),
        )  # fmt: skip
        squares.append(sum(float(value.double().pow(2).sum()) for value in gradient.values()))
    trainer = trainer_on(
        model, FixedSource(rows), table, tmp_path, trainable=["team"], agents=AGENTS, loss=loss, lr=1e-3
    )
    trainer.train()
    found = [logged(trainer, f"gradient_share/{agent}")[0] for agent in AGENTS]
    expected = [square / sum(squares) for square in squares]
    print(f"{loss}: shares {found[0]:.4f} {found[1]:.4f}, by hand {expected[0]:.4f} {expected[1]:.4f}")
    assert found == pytest.approx(expected, abs=1e-4)
    assert abs(expected[0] - 0.5) > 0.01


def test_a_sequential_update_knows_the_shares_of_a_shared_adapter(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = shared_model(checkpoint("starter"))
    team = team_on(model)
    rows, table = rows_of(team, play(team, seeds=1), uneven, trainable=frozenset(["team"]))
    trainer = sequential(model, rows, table, tmp_path, trainable=["team"], iterations=2, lr=1e-3)
    trainer.train()
    shares = [logged(trainer, f"gradient_share/{agent}") for agent in AGENTS]
    assert [sum(pair) for pair in zip(*shares, strict=True)] == [pytest.approx(1.0)] * 2
    assert logged(trainer, "gradient_share/team") == [1.0, 1.0]


# ---- why: what simultaneous updates do to a team's return


def returns_of(
    game: str, order: Order, seed: int, clip: float, rate: float, iterations: int, mirrored: bool
) -> list[float]:
    """Exact expected returns of two softmax policies under natural policy gradient, without sampling.

    Both start from the same policy but for a little noise, as from one warm start, or from mirror images of each other.

    Every joint action is one episode, weighted by its probability. An agent's step is to reweight its actions by
    exp(rate · its advantage); in a sequential update the second one's advantage carries the first one's ratio, as
    computed by `compounding`.
    """
    payoffs = torch.tensor(GAMES[game].payoffs[..., 0], dtype=torch.float64)
    rng = np.random.default_rng(seed)
    start = torch.tensor(rng.normal(0, 0.5, len(payoffs)))
    leans = (start, start.flip(0) if mirrored else start)
    logits = [lean + 0.01 * torch.tensor(rng.normal(size=len(payoffs))) for lean in leans]
    places = torch.cartesian_prod(*(torch.arange(size) for size in payoffs.shape))
    joint, mask = torch.arange(len(places))[:, None], torch.ones(len(places), 1, dtype=torch.bool)

    def logps(agent: int) -> torch.Tensor:
        return logits[agent].log_softmax(0)[places[:, agent]][:, None]

    found: list[float] = []
    for iteration in range(iterations):
        old = [logps(0), logps(1)]
        weight = (old[0] + old[1]).exp()[:, 0]
        reward = payoffs[places[:, 0], places[:, 1]]
        found.append(float((weight * reward).sum()))
        advantage = reward - found[-1]
        log_factor = torch.zeros(len(places), dtype=torch.float64)
        steps = []
        for name in agent_order(("0", "1"), seed, iteration):
            agent = int(name)
            limit = math.log(clip)
            mine = weight * log_factor.clamp(-limit, limit).exp() * advantage
            gradient = torch.zeros_like(logits[agent]).index_add(0, places[:, agent], mine)
            gradient = gradient / logits[agent].softmax(0)
            if order is Order.SIMULTANEOUS:
                steps.append((agent, gradient))
            else:
                logits[agent] = logits[agent] + rate * gradient
                log_factor = compounding(log_factor, logps(agent), old[agent], mask, joint)
        for agent, gradient in steps:
            logits[agent] = logits[agent] + rate * gradient
    return found


@pytest.mark.parametrize(("game", "rate", "mirrored"), [("xor", 6.0, False), ("penalty", 0.6, True)])
def test_sequential_updates_never_lower_the_joint_return(game: str, rate: float, mirrored: bool) -> None:
    """HAPPO's theorem where everything is exact; simultaneous updates of the same size break it in most runs."""
    falls: dict[str, list[float]] = {}
    for label, order, clip in (
        ("sequential", Order.SEQUENTIAL, math.inf),
        ("sequential, factor clipped at 2", Order.SEQUENTIAL, 2.0),
        ("simultaneous", Order.SIMULTANEOUS, 2.0),
    ):
        runs = [returns_of(game, order, seed, clip, rate, 30, mirrored) for seed in range(60)]
        falls[label] = [max(0.0, *(a - b for a, b in zip(run, run[1:], strict=False))) for run in runs]
        ends = np.mean([run[-1] for run in runs])
        print(f"{game}, {label}: falls by more than 0.01 in {np.mean(np.array(falls[label]) > 0.01):.0%} of runs, by "
              f"{max(falls[label]):.1e} at most; mean return at the end {ends:.2f}")  # fmt: skip
    span = float(np.ptp(GAMES[game].payoffs))
    assert max(falls["sequential"]) < 1e-9
    assert max(falls["sequential, factor clipped at 2"]) < 0.01 * span
    assert np.mean(np.array(falls["simultaneous"]) > 0.01 * span) > 0.5
