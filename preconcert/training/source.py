"""The rollout source of a run: task seeds, play, record, credit, rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from preconcert.agents import GenerativeTeam
from preconcert.core import Episode, append_episodes, derive_seed
from preconcert.training.credit import ESTIMATORS
from preconcert.training.grpo import Rollout
from preconcert.training.measures import measure
from preconcert.training.recipe import Recipe
from preconcert.training.rollout import EpisodeSpec, rollout
from preconcert.training.rows import GrammarTable, RowSettings, build_rows, worth_training

EPISODES = "episodes.jsonl"


class GameSource:
    """Plays groups of episodes with the present adapters and turns them into rows.

    Everything random follows from the recipe's seed and the iteration's number, so an iteration that is played again
    after a crash is the same.

    Args:
        recipe: what to play.
        team: whose turns are trained; its version is set to the iteration.
        table: shared with the trainer.
        trainable: adapters that learn.
        folder: `episodes.jsonl` is appended to there (per process); None keeps no record.
        rank: this process.
        world: number of processes; each plays whole groups.
        on_rollout: called with (iteration, episodes, metrics).
    """

    def __init__(
        self,
        recipe: Recipe,
        team: GenerativeTeam,
        table: GrammarTable,
        trainable: frozenset[str],
        folder: Path | None,
        rank: int = 0,
        world: int = 1,
        on_rollout: Callable[[int, list[Episode], dict[str, float]], None] | None = None,
    ) -> None:
        self.recipe = recipe
        self.team = team
        self.table = table
        self.folder = folder
        self.rank, self.world = rank, world
        self.on_rollout = on_rollout
        self.settings = RowSettings(
            policy_spans=frozenset(recipe.grpo.policy_spans),
            hindsight=recipe.grpo.hindsight_weight > 0,
            bind_action=recipe.grpo.bind_action,
            trainable=trainable,
        )

    def specs(self, iteration: int) -> list[EpisodeSpec]:
        """The episodes that this process plays."""
        recipe = self.recipe
        return [
            EpisodeSpec(
                recipe.task,
                recipe.params,
                derive_seed(recipe.seed, "train", iteration, number) % 2**31,
                "train",
                sample,
                iteration,
            )
            for number in range(recipe.grpo.seeds)
            if number % self.world == self.rank
            for sample in range(recipe.grpo.group)
        ]

    def collect(self, iteration: int) -> Rollout:
        """Play and build one iteration."""
        recipe = self.recipe
        started = time.perf_counter()
        self.team.version = iteration
        self.team.temperature = recipe.grpo.temperature
        episodes = rollout(
            self.specs(iteration), self.team, recipe.channel, derive_seed(recipe.seed, "play", iteration)
        )
        played = time.perf_counter()
        if self.folder is not None:
            append_episodes(self.folder / record_name(self.rank), episodes)
        stored = time.perf_counter()
        advantages = ESTIMATORS[recipe.grpo.credit](episodes)
        rows = build_rows(episodes, advantages, self.team, self.table, self.settings)
        policy_tokens = sum(int(row.policy.sum()) for row in rows)
        if recipe.grpo.beta == 0.0 and recipe.grpo.loss == "dapo":
            rng = np.random.default_rng(derive_seed(recipe.seed, "rows", iteration, self.rank))
            rows, policy_tokens = worth_training(rows, recipe.grpo.hindsight_fraction, rng)
        found = measure(episodes, self.team.language, recipe.agent.spans)
        metrics: dict[str, float] = {
            name: float(value)
            for name, value in {
                "success": found.success_rate,
                "return": found.return_mean,
                "malformed": found.malformed_rate,
                "intention_accuracy": found.intention_accuracy,
                "forecast_exact_match": found.forecast_exact_match,
                "message_bits_per_turn": found.message_bits_per_turn,
                "generated_tokens": found.generated_tokens,
                "episode_steps": found.steps_mean,
                "rollout_s": played - started,
                "record_s": stored - played,
                "credit_s": time.perf_counter() - stored,
            }.items()
            if value is not None
        }
        if self.on_rollout is not None:
            self.on_rollout(iteration, episodes, metrics)
        return Rollout(rows, metrics, policy_tokens)


def record_name(rank: int) -> str:
    """The episode file of a process."""
    return EPISODES if rank == 0 else f"episodes-{rank}.jsonl"
