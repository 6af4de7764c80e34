"""What the trainer's own step does to the adapters, against losses written down by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preconcert.agents import Context
from preconcert.core import TrainingError
from preconcert.models import UNCONSTRAINED, ScoreRequest, TransformersModel
from preconcert.training.batch import collate
from preconcert.training.rows import GrammarTable, Row, worth_training
from tests.training.teams import (
    AGENTS,
    FixedSource,
    gradients_of,
    largest_difference,
    load,
    play,
    rows_of,
    settings_of,
    team_on,
    trainer_on,
    weights_of,
)

CASES = [(context, constrained) for context in Context for constrained in (True, False)]


def uneven(number: int) -> float:
    """Advantages of both signs, some of them 0."""
    return (0.7, -1.3, 0.0, 1.9, -0.4)[number % 5]


def by_hand(
    model: TransformersModel, rows: Sequence[Row], table: GrammarTable, hindsight_weight: float = 0.0
) -> dict[str, torch.Tensor]:
    """Gradients of the same loss, one row at a time, without padding, routes, masks in the head, or TRL.

    The policy is the one that sampled, so the ratio is 1 and no clip is active: the loss of a token is −ratio · A.
    """
    tokens, allowed = table.arrays()
    policy_items = sum(int(row.policy.sum()) for row in rows)
    hindsight_items = max(1, sum(int((row.targets >= 0).sum()) for row in rows))
    peft = model.model
    wanted = {key: value.requires_grad for key, value in peft.named_parameters()}
    total = {key: torch.zeros_like(value) for key, value in weights_of(model).items()}
    for row in rows:
        peft.set_adapter(row.adapter)
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        logits = peft(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
        for place, state in enumerate(row.allowed):
            if state != UNCONSTRAINED:
                ban = torch.ones(logits.shape[1], dtype=torch.bool)
                ban[tokens[allowed[state]]] = False
                logits = logits.index_put((torch.tensor(place),), logits[place].masked_fill(ban, -1e9))
        everything = logits.log_softmax(-1)
        logps = everything.gather(1, ids[0, len(row.prompt_ids) :, None])[:, 0]
        ratio = (logps - torch.from_numpy(row.logprobs)).exp()
        policy = -(ratio * torch.from_numpy(row.advantages * row.policy)).sum() / policy_items
        known = torch.from_numpy(row.targets).clamp(min=0)[:, None]
        true = everything.gather(1, known)[:, 0] * torch.from_numpy((row.targets >= 0).astype(np.float32))
        supervised = -true.sum() / hindsight_items
        (policy + hindsight_weight * supervised).backward()
        for key, value in model.adapter_parameters(row.adapter).items():
            assert value.grad is not None
            total[f"{row.adapter} {key}"] += value.grad
        peft.zero_grad()
    for key, value in peft.named_parameters():
        value.requires_grad_(wanted[key])
    return total


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("context", "constrained"), CASES)
def test_mixed_adapters_equal_rows_by_hand(
    starter: TransformersModel, tmp_path: Path, context: Context, constrained: bool, checkpointing: bool
) -> None:
    team = team_on(starter, settings_of(context, constrained))
    rows, table = rows_of(team, play(team), uneven, hindsight=True)
    assert len({row.adapter for row in rows}) == 2
    assert any((row.targets >= 0).any() for row in rows) or not constrained
    expected = by_hand(starter, rows, table, hindsight_weight=0.5)
    trainer = trainer_on(
        starter, FixedSource(rows), table, tmp_path, hindsight_weight=0.5, gradient_checkpointing=checkpointing
    )
    found = gradients_of(trainer, starter)
    assert starter.base.is_gradient_checkpointing == checkpointing
    size = max(float(value.abs().max()) for value in expected.values())
    assert size > 1e-3
    assert largest_difference(found, expected) < 2e-5 * max(1.0, size)
    assert all(p.grad is None for name, p in starter.model.named_parameters() if "lora_" not in name)


def test_gradients_do_not_depend_on_the_parts_of_a_batch(starter: TransformersModel, tmp_path: Path) -> None:
    """Rows that do not divide into the parts are neither lost nor counted twice."""
    team = team_on(starter)
    rows, table = rows_of(team, play(team), uneven, hindsight=True)
    rows = rows[: len(rows) // 4 * 4 - 1]
    whole, parts = (
        gradients_of(
            trainer_on(
                starter, FixedSource(rows), table, tmp_path, hindsight_weight=0.5, minibatches=n, accumulate=n
            ),
            starter,
        )
        for n in (1, 4)
    )
    assert largest_difference(whole, parts) < 1e-6
    assert max(float(value.abs().max()) for value in whole.values()) > 1e-3


@pytest.mark.parametrize("loss", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_masked_rows_change_no_gradient(starter: TransformersModel, tmp_path: Path, loss: str) -> None:
    team = team_on(starter)
    rows, table = rows_of(team, play(team), uneven)
    trainer = trainer_on(starter, FixedSource(rows), table, tmp_path, loss=loss, epochs=2)
    plain = gradients_of(trainer, starter)

    def pad(batch: dict[str, Any]) -> None:
        padded = collate(rows, trainer.adapter_names, 0, len(rows) + 5)
        assert len(padded["adapter"]) == len(rows) + 5
        batch.update(padded)

    assert largest_difference(plain, gradients_of(trainer, starter, pad)) < 1e-6
    assert max(float(value.abs().max()) for value in plain.values()) > 1e-4


@pytest.mark.parametrize(("weight", "fraction"), [(0.0, 0.0), (0.5, 1.0)])
def test_rows_worth_training_give_the_gradient_of_all(
    starter: TransformersModel, tmp_path: Path, weight: float, fraction: float
) -> None:
    """The policy's gradient always; with every target kept, the whole gradient."""
    team = team_on(starter)
    rows, table = rows_of(team, play(team), uneven, hindsight=weight > 0)
    kept, policy_tokens = worth_training(rows, fraction, 0)
    assert len(kept) < len(rows) or fraction
    everything, some = (
        gradients_of(trainer_on(starter, source, table, tmp_path, hindsight_weight=weight), starter)
        for source in (FixedSource(rows), FixedSource(kept, policy_tokens))
    )
    assert largest_difference(everything, some) < 1e-6
    assert max(float(value.abs().max()) for value in everything.values()) > 1e-3


@pytest.mark.parametrize(("context", "constrained"), CASES)
def test_only_sampled_tokens_carry_the_policy_loss(
    starter: TransformersModel, tmp_path: Path, context: Context, constrained: bool
) -> None:
    """Advantages put anywhere else change no bit; put on a token that counts, they change the gradient."""
    team = team_on(starter, settings_of(context, constrained))
    episodes = play(team)
    rows, table = rows_of(team, episodes, uneven)
    trainer = trainer_on(starter, FixedSource(rows), table, tmp_path, epochs=2)
    plain = gradients_of(trainer, starter, lambda batch: None)

    def elsewhere(batch: dict[str, Any]) -> None:
        silent = batch["tool_mask"] * batch["completion_mask"] == 0
        assert silent.any()
        batch["advantages"][silent] = 50.0
        batch["old_per_token_logps"][silent] = -3.0

    assert largest_difference(plain, gradients_of(trainer, starter, elsewhere)) == 0.0
    counted = {(i, int(t)) for i, row in enumerate(rows) for t in np.flatnonzero(row.policy)}
    assert counted == set(sampled_places(rows, episodes, context))
    for i, t in sorted(counted)[:: max(1, len(counted) // 12)]:

        def here(batch: dict[str, Any], i: int = i, t: int = t) -> None:
            batch["advantages"][i, t] += 30.0

        assert largest_difference(plain, gradients_of(trainer, starter, here)) > 1e-5, (i, t)


def sampled_places(rows: Sequence[Row], episodes: Sequence[Any], context: Context) -> list[tuple[int, int]]:
    """Where the rows hold what the agents sampled, found from the turns alone."""
    places: list[tuple[int, int]] = []
    number = 0
    for episode in episodes:
        for trajectory in episode.trajectories.values():
            first = trajectory.turns[0]
            for turn in trajectory.turns:
                offset = len(turn.prompt_ids) - len(first.prompt_ids) if context is Context.TRANSCRIPT else 0
                ids = rows[number].completion_ids[offset : offset + len(turn.completion_ids)]
                assert ids == turn.completion_ids
                # The announced next action is hindsight's to teach, not the task's reward.
                announced = {t for s in turn.spans if s.slot == "next" for t in range(s.start, s.end)}
                chosen = [t for t, free in enumerate(turn.sampled) if free and t not in announced]
                places += [(number, offset + t) for t in chosen]
                number += context is Context.TURN
            number += context is Context.TRANSCRIPT
    assert number == len(rows)
    return places


def test_the_last_sampled_token_and_a_sampled_end_count(starter: TransformersModel) -> None:
    free = team_on(starter, settings_of(constrained=False))
    rows, _ = rows_of(free, play(free, seeds=6, group=4), uneven)
    end = free.format.eos
    ended = [row for row in rows if row.completion_ids[-1] == end]
    assert ended
    assert all(row.policy.all() for row in rows)
    bound = team_on(starter)
    rows, _ = rows_of(bound, play(bound), uneven)
    for row in rows:
        # The grammar forces the end, so it was no choice; the action right before it was one.
        assert row.completion_ids[-1] == end
        assert not row.policy[-1]
        assert row.policy[-2]


def test_no_variance_means_no_change(starter: TransformersModel, tmp_path: Path) -> None:
    """An untrained team earns nothing: every return is equal, and a step changes no bit."""
    team = team_on(starter)
    episodes = play(team)
    assert {t.total_reward for e in episodes for t in e.trajectories.values()} == {0.0}
    rows, table = rows_of(team, episodes)
    before = weights_of(starter)
    trainer = trainer_on(starter, FixedSource(rows), table, tmp_path, epochs=2, minibatches=2)
    assert all(not value.any() for value in gradients_of(trainer, starter).values())
    trainer._step = 0
    trainer.train()
    assert trainer.state.global_step == 4
    assert largest_difference(before, weights_of(starter)) == 0.0


def test_one_agents_variance_moves_no_other(starter: TransformersModel, tmp_path: Path) -> None:
    team = team_on(starter)
    rows, table = rows_of(team, play(team), uneven)
    rows = [
        row if row.adapter == AGENTS[0] else replace(row, advantages=np.zeros_like(row.advantages)) for row in rows
    ]
    before = weights_of(starter)
    trainer_on(starter, FixedSource(rows), table, tmp_path).train()
    after = weights_of(starter)
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert moved == {key for key in after if key.startswith(AGENTS[0])}


@pytest.mark.parametrize("frozen", AGENTS)
def test_a_frozen_agent_stays_as_it_is(starter: TransformersModel, tmp_path: Path, frozen: str) -> None:
    """Even if rows of it come by: they are played, never learned from."""
    team = team_on(starter)
    rows, table = rows_of(team, play(team), uneven, hindsight=True)
    (other,) = set(AGENTS) - {frozen}
    before = weights_of(starter)
    trainer = trainer_on(
        starter, FixedSource(rows), table, tmp_path, trainable=[other], iterations=3, hindsight_weight=0.5
    )
    trainer.train()
    after = weights_of(starter)
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith(frozen))
    assert all(not torch.equal(before[key], after[key]) for key in before if key.startswith(other))


def test_an_unknown_trainable_adapter_is_an_error(starter: TransformersModel, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="agent_9"):
        trainer_on(starter, FixedSource([]), GrammarTable(), tmp_path, trainable=["agent_9"])


def test_a_rollout_without_rows_is_an_error(starter: TransformersModel, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no row"):
        trainer_on(starter, FixedSource([]), GrammarTable(), tmp_path).train()


@pytest.mark.parametrize("minibatches", [1, 3])
def test_reference_logprobs_are_the_bases(starter: TransformersModel, tmp_path: Path, minibatches: int) -> None:
    team = team_on(starter)
    rows, table = rows_of(team, play(team), uneven, hindsight=True)
    trainer = trainer_on(starter, FixedSource(rows), table, tmp_path, beta=0.1, minibatches=minibatches)
    batch = trainer._generate_and_score_completions(None)
    automata = [automaton for automaton, _ in table.automata.values()]
    assert len(automata) == 2  # one per agent, since each foretells the other
    for i, row in enumerate(rows):
        automaton = next(a for a, start in table.automata.values() if start <= row.allowed[0] < start + a.size)
        (expected,) = starter.score([ScoreRequest(row.prompt_ids, row.completion_ids, None, automaton)])
        counted = row.policy | (row.targets >= 0)
        found = batch["ref_per_token_logps"][i, : len(counted)].numpy()
        assert np.abs(found - np.array(expected))[counted].max() < 1e-5


def test_kl_is_zero_at_first_and_then_pulls_back(
    checkpoint: Callable[[str], Path], starter: TransformersModel, tmp_path: Path
) -> None:
    fresh = load(checkpoint("starter"), deviation=0.0)
    for model, zero in ((fresh, True), (starter, False)):
        team = team_on(model)
        rows, table = rows_of(team, play(team), lambda number: 0.0)
        trainer = trainer_on(model, FixedSource(rows), table, tmp_path, beta=0.1)
        pull = gradients_of(trainer, model)
        (kl,) = trainer._metrics["train"]["kl"]
        size = max(float(value.abs().max()) for value in pull.values())
        assert (abs(kl) < 1e-9 and size < 1e-7) if zero else (kl > 1e-4 and size > 1e-4), (kl, size)


def test_a_named_reference_counts_instead_of_the_base(starter: TransformersModel, tmp_path: Path) -> None:
    starter.add_adapter("reference", 0, AGENTS[0])
    team = team_on(starter)
    rows, table = rows_of(team, play(team), lambda number: 0.0)
    rows = [row for row in rows if row.adapter == AGENTS[0]]
    trainer = trainer_on(starter, FixedSource(rows), table, tmp_path, beta=0.1, reference="reference")
    gradients_of(trainer, starter)
    assert abs(trainer._metrics["train"]["kl"][0]) < 1e-9
