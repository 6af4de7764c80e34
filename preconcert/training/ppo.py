"""Multi-agent PPO on the GRPO trainer: the same rollouts, rows, loss and checkpoints, with a critic beside them.

The clipped surrogate is TRL's. Advantages come from a critic's values (`credit/gae.py`, `credit/chained_gae.py`), which
the source asks for. The critic's weights are disjoint from the policy's, so it learns in steps of its own, once per
rollout, after its values have been used. It is part of every checkpoint.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from preconcert.core import TrainingError
from preconcert.training.critic import Critic
from preconcert.training.grpo import MultiAgentGRPOTrainer
from preconcert.training.grpo_rollout import Rollout

CRITIC_STATE = "critic.pt"
"""The critic in a checkpoint."""


class _Together:
    """All processes of a run."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over all processes."""
        return self.accelerator.reduce(tensor, reduction="sum")

    def gather(self, numbers: torch.Tensor) -> torch.Tensor:
        """Everyone's, however many each has."""
        padded = self.accelerator.pad_across_processes(numbers, dim=0, pad_index=-1)
        found = self.accelerator.gather(padded)
        return found[found >= 0]


class MultiAgentPPOTrainer(MultiAgentGRPOTrainer):
    """PPO for a team.

    Args:
        critic: whose values the source uses.
        args: as `MultiAgentGRPOTrainer`.
        options: as `MultiAgentGRPOTrainer`.
    """

    def __init__(self, *args: Any, critic: Critic, **options: Any) -> None:
        self.critic = critic
        super().__init__(*args, **options)

    def _collect(self, iteration: int) -> Rollout:
        rollout = super()._collect(iteration)
        if rollout.returns is None:
            raise TrainingError("the rollout has no returns for the critic: its credit estimator uses no values")
        found = self.critic.fit(rollout.returns, iteration, _Together(self.accelerator))
        if iteration >= self.critic.settings.warmup_iterations:
            return replace(rollout, metrics={**rollout.metrics, **found})
        rows = [
            replace(row, advantages=np.zeros_like(row.advantages), said_advantage=0.0) for row in rollout.rows
        ]
        return replace(rollout, rows=rows, metrics={**rollout.metrics, **found})

    def _save_own(self, folder: Path) -> None:
        super()._save_own(folder)
        torch.save(self.critic.state_dict(), folder / CRITIC_STATE)

    def _load_own(self, folder: Path) -> None:
        super()._load_own(folder)
        file = folder / CRITIC_STATE
        if not file.is_file():
            raise TrainingError(f"{str(folder)!r} holds no critic: it is not a checkpoint of PPO")
        self.critic.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
