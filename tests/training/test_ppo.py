"""PPO on a matrix game: advantages are those of the critic's values, and a run is resumed with its critic."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from preconcert.agents import GenerativeTeam
from preconcert.core import TrainingError
from preconcert.envs import make_env
from preconcert.models import TransformersModel
from preconcert.training.credit import TurnKey
from preconcert.training.critic import Critic
from preconcert.training.ppo import CRITIC_STATE, MultiAgentPPOTrainer
from preconcert.training.recipe import Algorithm, GRPOSettings, Recipe
from preconcert.training.rows import GrammarTable
from preconcert.training.run import grpo_config, make_critic, train
from preconcert.training.source import GameSource
from preconcert.training.update import Order
from preconcert.training.warm_start import WarmStartSettings
from tests.training.teams import AGENTS, LORA, SHAPE, load, starter_checkpoint, weights_of

TASK, PARAMS = "matrix", {"game": "penalty", "rounds": 3}
EPSILON = 1e-4


def recipe(credit: Any = "gae", critic: Mapping[str, Any] | None = None, **grpo: Any) -> Recipe:
    """A team that is paid from its first move on, so that credit is about something."""
    plain: dict[str, Any] = {
        "iterations": 1, "seeds": 3, "group": 4, "epochs": 1, "minibatches": 1, "hindsight_weight": 0.0,
        "warmup_iterations": 0, "checkpoint_every": 1000, "max_grad_norm": 1e9, "credit": credit, "lr": 0.02,
    }  # fmt: skip
    return Recipe(
        task=TASK, params=PARAMS, starter=SHAPE, lora=LORA, algorithm=Algorithm.PPO,
        warm_start=WarmStartSettings(episodes=8, steps=4, batch=16), critic=dict(critic or {}),
        grpo=GRPOSettings(**{**plain, **grpo}), seed=7,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return starter_checkpoint(tmp_path_factory.mktemp("matrix") / "starter", TASK, PARAMS)


def trainer_on(
    folder: Path, settings: Recipe, out: Path, random: bool = True
) -> tuple[MultiAgentPPOTrainer, GameSource, Critic, TransformersModel]:
    """Everything as a run puts it together; the critic's values differ from 0 from the start."""
    model = load(folder)
    env = make_env(TASK, PARAMS, 0)
    team = GenerativeTeam(model, env.language, settings.agent, {agent: agent for agent in AGENTS})
    critic = make_critic(settings, folder, model, env)
    if random:
        with torch.no_grad():
            critic.head.linear.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(3))
    table = GrammarTable()
    source = GameSource(settings, team, table, frozenset(AGENTS), None, values=critic.values)
    trainer = MultiAgentPPOTrainer(
        model.model, model.tokenizer, grpo_config(settings, out), source, AGENTS, table,
        settings.grpo.hindsight_weight, critic=critic, update=settings.update, agents=AGENTS,
    )  # fmt: skip
    return trainer, source, critic, model


def by_hand(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> list[float]:
    """A_t = Σ_k (γλ)^k (r_{t+k} + γ V_{t+k+1} − V_{t+k}), summed term by term."""
    following = [*values[1:], 0.0]
    errors = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [
        sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(errors))) for t in range(len(errors))
    ]


def normalised(found: dict[TurnKey, float]) -> dict[TurnKey, float]:
    """Each agent's, over the rollout."""
    normal: dict[TurnKey, float] = {}
    for agent in AGENTS:
        mine = [value for key, value in found.items() if key.agent == agent]
        spread = np.std(mine, ddof=1) + EPSILON
        normal |= {key: float((v - np.mean(mine)) / spread) for key, v in found.items() if key.agent == agent}
    return normal


@pytest.mark.parametrize("chained", [False, True])
def test_advantages_are_those_of_the_critics_values(folder: Path, tmp_path: Path, chained: bool) -> None:
    settings = recipe({"type": "chained-gae" if chained else "gae", "gamma": 0.9, "lam": 0.8})
    _, source, critic, _ = trainer_on(folder, settings, tmp_path)
    assert critic.reader.acted == chained
    rollout = source.collect(0)
    values: Any = critic.values(rollout.episodes)
    assert len(set(values.values())) > 10
    raw: dict[TurnKey, float] = {}
    for position, episode in enumerate(rollout.episodes):
        paid = {a: [turn.reward for turn in episode.trajectories[a].turns] for a in AGENTS}
        keys = [[TurnKey(position, agent, t) for t in range(3)] for agent in AGENTS]
        chains = [(keys[n], paid[agent]) for n, agent in enumerate(AGENTS)]
        if chained:
            team = np.mean([paid[agent] for agent in AGENTS], axis=0)
            links = [key for pair in zip(*keys, strict=True) for key in pair]
            chains = [(links, [float(x) for reward in team for x in (0.0, reward)])]
        for chain, rewards in chains:
            raw |= zip(chain, by_hand(rewards, [values[key] for key in chain], 0.9, 0.8), strict=True)
    assert rollout.returns is not None
    assert rollout.returns.keys() == raw.keys()
    for key, advantage in raw.items():
        assert rollout.returns[key] == pytest.approx(advantage + values[key], abs=1e-9)
    normal = normalised(raw)
    rows = {row.name: row for row in rollout.rows}
    assert len(rows) == len(raw) == 12 * 3 * 2
    for key, advantage in normal.items():
        episode = rollout.episodes[key.episode]
        row = rows[f"{episode.group}:0:{episode.sample}:{key.agent}:{key.index}"]
        assert row.policy.any()
        assert np.abs(row.advantages[row.policy] - advantage).max() < 1e-5
        assert not row.advantages[~row.policy].any()


def test_values_per_token_become_advantages_per_token(folder: Path, tmp_path: Path) -> None:
    settings = recipe({"type": "gae", "level": "token", "lam": 0.9, "normalise": "none"})
    _, source, critic, _ = trainer_on(folder, settings, tmp_path)
    rollout = source.collect(0)
    values: Any = critic.values(rollout.episodes)
    rows = {row.name: row for row in rollout.rows}
    for position, episode in enumerate(rollout.episodes[:3]):
        for agent in AGENTS:
            turns = episode.trajectories[agent].turns
            v = np.concatenate([values[TurnKey(position, agent, t)] for t in range(3)])
            rewards = np.concatenate([[0.0] * (len(turn.completion_ids) - 1) + [turn.reward] for turn in turns])
            expected = by_hand(rewards.tolist(), v.tolist(), 1.0, 0.9)
            mine = [rows[f"{episode.group}:0:{episode.sample}:{agent}:{t}"] for t in range(3)]
            found = np.concatenate([row.advantages for row in mine])
            policy = np.concatenate([row.policy for row in mine])
            assert np.abs(found - expected)[policy].max() < 1e-4


def test_in_the_warm_up_only_the_critic_learns(folder: Path, tmp_path: Path) -> None:
    settings = recipe(critic={"warmup_iterations": 2}, iterations=3, epochs=2)
    trainer, _, _, model = trainer_on(folder, settings, tmp_path)
    before = weights_of(model)
    ends: list[dict[str, torch.Tensor]] = []
    collected: list[bool] = []
    inner = trainer._collect

    def collect(iteration: int) -> Any:
        ends.append(weights_of(model))
        rollout = inner(iteration)
        collected.append(any(row.advantages.any() for row in rollout.rows))
        return rollout

    trainer._collect = collect  # type: ignore[method-assign]
    trainer.train()
    assert collected == [False, False, True]
    policy = [key for key in before if not key.startswith("critic")]
    for iteration in (1, 2):
        assert all(torch.equal(before[key], ends[iteration][key]) for key in policy)
        assert any(not torch.equal(ends[iteration - 1][k], ends[iteration][k]) for k in before if k not in policy)
    after = weights_of(model)
    assert all(not torch.equal(before[key], after[key]) for key in policy if "lora_A" in key)
    lines = [line for line in trainer.state.log_history if "explained_variance" in line]
    assert len(lines) == 3
    for name in ("value_loss", "critic_grad_norm", *(f"explained_variance/{agent}" for agent in AGENTS)):
        assert all(np.isfinite(line[name]) for line in lines), name
    assert lines[0]["trained_tokens/act"] == 0 < lines[2]["trained_tokens/act"]


def test_the_variance_explained_is_that_before_learning(folder: Path, tmp_path: Path) -> None:
    trainer, source, critic, _ = trainer_on(folder, recipe(critic={"lr": 0.05}), tmp_path)
    rollout = source.collect(0)
    values: Any = critic.values(rollout.episodes)
    trainer.train()
    assert rollout.returns is not None
    returns: Any = rollout.returns
    (line,) = [line for line in trainer.state.log_history if "explained_variance" in line]
    for agent in AGENTS:
        v = np.array([values[key] for key in returns if key.agent == agent])
        r = np.array([returns[key] for key in returns if key.agent == agent])
        assert line[f"explained_variance/{agent}"] == pytest.approx(1 - np.var(r - v) / np.var(r), abs=1e-4)


def test_credit_without_values_is_no_credit_for_ppo(folder: Path, tmp_path: Path) -> None:
    trainer, source, _, _ = trainer_on(folder, recipe(), tmp_path)
    object.__setattr__(source, "recipe", source.recipe.model_copy(
        update={"grpo": GRPOSettings(seeds=1, group=2, hindsight_weight=0.0)}
    ))  # fmt: skip
    with pytest.raises(TrainingError, match="no returns for the critic"):
        trainer._collect(0)
    with pytest.raises(TrainingError, match="not a checkpoint of PPO"):
        trainer._load_own(tmp_path)


# ---- resuming


class Stop(Exception):
    """Power cut."""


class Stopper:
    """A reporter that ends the run when so many iterations are over."""

    def __init__(self, count: int) -> None:
        self.count, self.now = count, ""

    def stage(self, name: str, total: int) -> None:
        """Remembered."""
        self.now = name

    def advance(self, done: int, note: str = "") -> None:
        """The moment, if it is this one."""
        if self.now == "reinforcement learning" and done == self.count:
            raise Stop

    def say(self, text: str) -> None:
        """Ignored."""


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit, however nested."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


@pytest.mark.parametrize("options", [{}, {"critic.model": "separate", "order": "sequential"}])
def test_ppo_is_resumed_to_the_bit(tmp_path: Path, options: dict[str, str]) -> None:
    """Critic, its optimiser and its normaliser included."""
    order = options.get("order", "simultaneous")
    wanted = recipe(
        critic={"warmup_iterations": 1, "model": options.get("critic.model", "shared")}, iterations=5, epochs=2,
        minibatches=2, checkpoint_every=3, hindsight_weight=0.3,
    ).model_copy(update={"update": recipe().update.model_copy(update={"order": Order(order)})})  # fmt: skip
    wanted = Recipe.model_validate(wanted.model_dump())
    whole = train(wanted, tmp_path / "whole")
    out = tmp_path / "cut"
    for count in (2, 4):  # before there is a checkpoint, and after one that is older than the cut
        with pytest.raises(Stop):
            train(wanted, out, resume=count > 2, reporter=Stopper(count))
    train(wanted, out, resume=True)
    for agent in AGENTS:
        found, expected, warm = (
            load_file(run / agent / "adapter_model.safetensors")
            for run in (out / "adapters", whole / "adapters", whole / "warm")
        )
        assert same(found, expected)
        assert not same(expected, warm)
    last, expected = (
        torch.load(sorted(run.glob(f"checkpoints/checkpoint-*/{CRITIC_STATE}"))[-1], weights_only=True)
        for run in (out, whole)
    )
    assert same(last, expected)
    assert float(expected["head"]["weight_seen"].min()) > 0.2
    assert expected["optimizer"]["state"]
    times = ("_s", "_time", "_runtime", "_per_second")
    logs = [
        [
            {key: value for key, value in json.loads(line).items() if not key.endswith(times)}
            for line in (run / "log.jsonl").read_text().splitlines()
        ]
        for run in (out, whole)
    ]
    assert logs[0] == logs[1]
    assert [line["iteration"] for line in logs[0]] == list(range(5))
    print(f"{options}: five iterations cut twice equal five in one go, to the bit")
