"""With one adapter, free sampling and one agent, our trainer is TRL's own GRPO to the last digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from preconcert.agents import GenerativeTeam
from preconcert.core import Episode, Trajectory
from preconcert.models import TransformersModel
from preconcert.training.credit import estimate
from preconcert.training.grpo import MultiAgentGRPOTrainer
from preconcert.training.grpo_rollout import Rollout
from preconcert.training.rows import GrammarTable, Row
from tests.training.teams import largest_difference, load, play, rows_of, settings_of, team_on, weights_of

ITERATIONS, PROMPTS, GROUP = 2, 4, 4


def score(completion_ids: Sequence[int]) -> float:
    """A reward that differs between the completions of a prompt."""
    return (sum(completion_ids) % 11) / 10 + len(completion_ids) / 50


def one_agent(episode: Episode) -> Episode:
    """The first turn of the first agent as an episode of its own, rewarded by `score`."""
    trajectory: Trajectory = episode.trajectories["agent_0"]
    turn = trajectory.turns[0]
    rewarded = replace(turn, reward=score(turn.completion_ids))
    return replace(episode, trajectories={"agent_0": replace(trajectory, turns=(rewarded,))})


class Playing:
    """Samples with the present weights and remembers the rows."""

    def __init__(self, team: GenerativeTeam, table: GrammarTable, credit: str) -> None:
        self.team, self.table, self.credit = team, table, credit
        self.rows: list[Row] = []

    def collect(self, iteration: int) -> Rollout:
        """Four groups of four one-turn episodes."""
        episodes = [one_agent(e) for e in play(self.team, PROMPTS, GROUP, seed=iteration)]
        credit = list(estimate(episodes, self.credit).advantages.values())
        rows, _ = rows_of(self.team, episodes, lambda number: credit[number], trainable=frozenset(["solo"]))
        self.rows += rows
        return Rollout(rows, {}, sum(int(row.policy.sum()) for row in rows))


class Stock(GRPOTrainer):
    """TRL's trainer as it is, given completions instead of sampling them."""

    given: list[tuple[list[int], list[int]]]

    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        take, self.given = self.given[: len(prompt_ids)], self.given[len(prompt_ids) :]
        assert [list(prompt) for prompt in prompt_ids] == [prompt for prompt, _ in take]
        return [completion for _, completion in take], None


class Record(TrainerCallback):
    """Keeps each step's gradients."""

    def __init__(self, model: TransformersModel) -> None:
        self.model = model
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After accumulation and clipping."""
        parameters = self.model.adapter_parameters("solo")
        self.gradients.append({key: p.grad.clone() for key, p in parameters.items() if p.grad is not None})


def config(folder: Path, loss: str, accumulate: int, optimizer: str) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=PROMPTS * GROUP // 4, steps_per_generation=4,
        num_generations=GROUP, num_iterations=2, gradient_accumulation_steps=accumulate, loss_type=loss,
        max_steps=ITERATIONS * 2 * 4 // accumulate, learning_rate=0.1 if optimizer == "sgd" else 2e-3,
        lr_scheduler_type="linear", max_grad_norm=0.5, epsilon=0.2, epsilon_high=0.28, beta=0.0, temperature=1.0,
        max_completion_length=12, optim=optimizer, logging_steps=1, save_strategy="no", report_to="none", bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, remove_unused_columns=False, shuffle_dataset=False, seed=11,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("credit", "loss", "accumulate", "optimizer"),
    [("agent", "dapo", 1, "adamw_torch"), ("global", "dapo", 2, "sgd"), ("agent", "grpo", 1, "sgd"),
     ("agent", "dr_grpo", 1, "sgd")],
)  # fmt: skip
def test_one_adapter_equals_the_stock_trainer(
    checkpoint: Callable[[str], Path], tmp_path: Path, credit: str, loss: str, accumulate: int, optimizer: str
) -> None:
    ours = load(checkpoint("starter"), ["solo"])
    team, table = team_on(ours, settings_of(constrained=False)), GrammarTable()
    source = Playing(team, table, credit)
    our_record = Record(ours)
    trainer = MultiAgentGRPOTrainer(
        ours.model, ours.tokenizer, config(tmp_path, loss, accumulate, optimizer), source, ["solo"], table,
        callbacks=[our_record],
    )  # fmt: skip
    start = weights_of(ours)
    trainer.train()

    theirs = load(checkpoint("starter"), ["solo"])
    their_record = Record(theirs)
    given = [(list(row.prompt_ids), list(row.completion_ids)) for row in source.rows]
    prompts = [theirs.tokenizer.decode(prompt) for prompt, _ in given[::GROUP]]
    stock = Stock(
        model=theirs.model,
        reward_funcs=lambda completion_ids, **_: [score(ids) for ids in completion_ids],
        args=config(tmp_path, loss, accumulate, optimizer),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=theirs.tokenizer,
        callbacks=[their_record],
    )
    stock.given = given
    stock.train()

    assert not stock.given
    assert len({len(completion) for _, completion in given}) > 1, "completions of one length test no padding"
    moved = largest_difference(weights_of(ours), start)
    weights = largest_difference(weights_of(ours), weights_of(theirs))
    gradients = max(
        largest_difference(mine, other)
        for mine, other in zip(our_record.gradients, their_record.gradients, strict=True)
    )
    steps = [
        (mine["loss"] - other["loss"], mine["grad_norm"] - other["grad_norm"])
        for mine, other in zip(trainer.state.log_history, stock.state.log_history, strict=True)
        if "loss" in mine
    ]
    losses = max(abs(difference) for difference, _ in steps)
    print(f"{loss}: moved {moved:.1e}; largest difference: weights {weights:.1e}, gradients {gradients:.1e}, "
          f"losses {losses:.1e}")  # fmt: skip
    assert len(steps) == ITERATIONS * 2 * 4 // accumulate
    assert moved > 1e-3
    assert weights < 1e-6
    assert gradients < 1e-6
    assert losses < 1e-6
