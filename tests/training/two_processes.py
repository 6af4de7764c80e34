"""What each of two processes does: `torchrun --nproc_per_node 2 -m tests.training.two_processes CHECKPOINT OUT GAME`.

First a whole run (OUT/run), warm start included; then some bare training steps, after which every process leaves its
adapters and what it trained on under OUT/RANK; then a team with a critic and credit over the whole rollout, once with
all agents at a time and once one after the other, whose findings are under OUT/RANK/ORDER.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file

from preconcert.agents import ChannelSettings, GenerativeTeam
from preconcert.core import Episode, derive_seed
from preconcert.envs import make_env
from preconcert.models import TransformersModel
from preconcert.training.grpo import MultiAgentGRPOTrainer
from preconcert.training.grpo_rollout import Rollout
from preconcert.training.ppo import MultiAgentPPOTrainer
from preconcert.training.recipe import Algorithm, Recipe
from preconcert.training.rollout import EpisodeSpec, rollout
from preconcert.training.rows import GrammarTable, worth_training
from preconcert.training.run import grpo_config, make_critic, train
from preconcert.training.source import GameSource
from preconcert.training.update import Order
from tests.training.teams import AGENTS, LORA, PARAMS, SHAPE, TASK, load, recipe_of, rows_of, team_on, weights_of

SEEDS, GROUP, ITERATIONS = 4, 3, 2
GAME = {"game": "penalty", "rounds": 2}


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
        kept, policy_tokens = worth_training(rows, 0.0 if iteration else 1.0, 0)
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
    """Three iterations; what an untrained team learns from is its own hindsight, and what its predictions are paid."""
    return recipe_of(
        iterations=3, seeds=4, group=3, epochs=1, minibatches=1, lr=1e-3, hindsight_weight=0.5, hindsight_fraction=1.0,
        prediction={"announcement": 1.0, "scale": True},
        imagination={"model": "oracle", "ratio": 0.5, "group": 2, "horizon": 2},
    )  # fmt: skip


class Noted(GameSource):
    """Remembers every advantage by the name of its row."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.advantages: list[dict[str, float]] = []

    def collect(self, iteration: int) -> Rollout:
        """As ever."""
        rollout = super().collect(iteration)
        self.advantages.append(
            {row.name: float(row.advantages[row.policy][0]) for row in rollout.rows if row.policy.any()}
        )
        return rollout


def game_recipe(order: Order, credit: Any) -> Recipe:
    """A matrix game, which pays an untrained team."""
    return Recipe(
        task="matrix", params=GAME, starter=SHAPE, lora=LORA, algorithm=Algorithm.PPO if credit == "gae" else "grpo",
        critic={"minibatches": 3, "warmup_iterations": 0},
        update={"order": order, "kl_stop": 1e-7 if order is Order.SIMULTANEOUS else None},
        grpo={
            "iterations": 2, "seeds": 3, "group": 4, "epochs": 2, "credit": credit, "hindsight_weight": 0.5,
            "hindsight_fraction": 0.5, "minibatches": 1 if order is Order.SIMULTANEOUS else 2, "max_grad_norm": 1e9,
            "warmup_iterations": 0,
        },
        seed=3,
    )  # fmt: skip


def play_games(checkpoint: Path, out: Path, rank: int, world: int, order: Order) -> dict[str, torch.Tensor]:
    """Two iterations of PPO; adapters, critic included, and the critic's head afterwards. Three groups for two."""
    recipe = game_recipe(order, "gae")
    model = load(checkpoint)
    env = make_env(recipe.task, recipe.params, 0)
    team = GenerativeTeam(model, env.language, recipe.agent, {agent: agent for agent in AGENTS})
    critic = make_critic(recipe, checkpoint, model, env)
    # Without momentum, so that a difference in the last digit of a gradient stays one.
    critic.optimizer = torch.optim.SGD([*critic.encoder.parameters().values(), *critic.head.parameters()], lr=0.1)
    table = GrammarTable()
    source = Noted(recipe, team, table, frozenset(AGENTS), None, rank, world, values=critic.values)
    assert isinstance(model.model, PeftModel)
    trainer = MultiAgentPPOTrainer(
        model.model, model.tokenizer, grpo_config(recipe, out / f"{order}-{rank}", world), source, AGENTS, table,
        recipe.grpo.hindsight_weight, critic=critic, update=recipe.update, agents=AGENTS,
    )  # fmt: skip
    trainer.optimizer = torch.optim.SGD([p for p in model.model.parameters() if p.requires_grad], lr=0.3)
    trainer.train()
    named = ("approx_kl", "skipped_steps", "value_loss", "explained_variance", "trained_tokens/act", "sampler_mismatch")
    found: dict[str, Any] = {
        name: [line[name] for line in trainer.state.log_history if name in line] for name in named
    }
    found["advantages"] = source.advantages
    found["rows"] = [len(one) for one in source.advantages]
    roles = Noted(game_recipe(order, "role"), team, table, frozenset(AGENTS), None, rank, world)
    for iteration in range(2):
        roles.collect(iteration)
    found["roles"], found["baselines"] = roles.advantages, roles.credit_state
    folder = out / str(rank) / order
    folder.mkdir(parents=True, exist_ok=True)
    weights = {**weights_of(model), **{f"head {key}": value.float() for key, value in critic.head.state_dict().items()}}
    save_file(weights, folder / "weights.safetensors")
    (folder / "found.json").write_text(json.dumps(found))
    return weights


if __name__ == "__main__":
    train(whole_recipe(), Path(sys.argv[2]) / "run")
    process = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    run(Path(sys.argv[1]), Path(sys.argv[2]), *process)
    for each in Order:
        play_games(Path(sys.argv[3]), Path(sys.argv[2]), *process, each)
