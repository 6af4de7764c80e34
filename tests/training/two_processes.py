"""What each of two processes does: `torchrun --nproc_per_node 2 -m tests.training.two_processes CHECKPOINT OUT`.

First a whole run (OUT/run), warm start included; then some bare training steps, after which every process leaves its
adapters and what it trained on under OUT/RANK.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file

from preconcert.agents import ChannelSettings
from preconcert.core import Episode, derive_seed
from preconcert.models import TransformersModel
from preconcert.training.grpo import MultiAgentGRPOTrainer, Rollout
from preconcert.training.recipe import Recipe
from preconcert.training.rollout import EpisodeSpec, rollout
from preconcert.training.rows import GrammarTable, worth_training
from preconcert.training.run import grpo_config, train
from tests.training.teams import AGENTS, PARAMS, TASK, load, recipe_of, rows_of, team_on, weights_of

SEEDS, GROUP, ITERATIONS = 4, 3, 2


class SharedOut:
    """Plays this process's part of the task seeds. An untrained team earns nothing, so each turn's words are scored."""

    def __init__(self, model: TransformersModel, table: GrammarTable, rank: int, world: int) -> None:
        self.model, self.table, self.rank, self.world = model, table, rank, world
        self.seeds: list[int] = []
        self.rows = 0

    def collect(self, iteration: int) -> Rollout:
        """Whole groups; later one process drops most of its rows, so that the batches differ in size."""
        mine = [seed for seed in range(SEEDS) if seed % self.world == self.rank]
        specs = [EpisodeSpec(TASK, PARAMS, seed, "train", k, iteration) for seed in mine for k in range(GROUP)]
        team = team_on(self.model)
        episodes = rollout(specs, team, ChannelSettings(drop=0.3), derive_seed(0, iteration))
        self.seeds += [episode.seed for episode in episodes]
        scores = [self._score(e) for e in episodes for t in e.trajectories.values() for _ in t.turns]
        rows, _ = rows_of(team, episodes, lambda number: scores[number], hindsight=True, table=self.table)
        kept, policy_tokens = worth_training(rows, 0.0 if iteration else 1.0, np.random.default_rng(0))
        self.rows += len(kept)
        return Rollout(kept, {}, policy_tokens)

    def _score(self, episode: Episode) -> float:
        words: Sequence[int] = episode.trajectories[AGENTS[0]].turns[0].completion_ids
        return 0.0 if episode.seed % 2 and episode.sample else sum(words) % 7 - 3.5


def run(checkpoint: Path, out: Path, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Two iterations of two epochs each; the adapters afterwards."""
    model = load(checkpoint)
    table = GrammarTable()
    source = SharedOut(model, table, rank, world)
    recipe = recipe_of(iterations=ITERATIONS, epochs=2, minibatches=1, lr=0.01, hindsight_weight=0.5)
    assert isinstance(model.model, PeftModel)
    trainer = MultiAgentGRPOTrainer(
        model.model, model.tokenizer, grpo_config(recipe, out / f"trainer-{rank}", world), source, AGENTS, table,
        recipe.grpo.hindsight_weight,
    )  # fmt: skip
    # Without momentum, so that a difference in the last digit of a gradient stays one.
    trainer.optimizer = torch.optim.SGD([p for p in model.model.parameters() if p.requires_grad], lr=0.1)
    trainer.train()
    folder = out / str(rank)
    folder.mkdir(parents=True, exist_ok=True)
    weights = weights_of(model)
    save_file(weights, folder / "adapters.safetensors")
    found = {"seeds": source.seeds, "rows": source.rows, "world": trainer.accelerator.num_processes}
    (folder / "found.json").write_text(json.dumps(found))
    return weights


def whole_recipe() -> Recipe:
    """Three iterations; what an untrained team learns from is its own hindsight."""
    return recipe_of(
        iterations=3, seeds=4, group=3, epochs=1, minibatches=1, lr=1e-3, hindsight_weight=0.5, hindsight_fraction=1.0
    )


if __name__ == "__main__":
    train(whole_recipe(), Path(sys.argv[2]) / "run")
    run(Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
