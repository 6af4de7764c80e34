"""Tiny real teams for the tests: a two-agent rendezvous on a starter or a chat checkpoint, with adapters that matter.

Parts: checkpoints (`starter_checkpoint`, `chat_checkpoint`), `team_on`, `play`, `trainer_on`, and `FixedSource`, a
rollout source that hands out rows made beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from preconcert.agents import AgentSettings, ChannelSettings, Context, GenerativeTeam
from preconcert.core import Episode, SpanKind
from preconcert.envs import make_env
from preconcert.models import LoraSettings, StarterSettings, TransformersModel, build_starter
from preconcert.prompts import SpanSettings, starter_words
from preconcert.training.credit import estimate
from preconcert.training.grpo import MultiAgentGRPOTrainer
from preconcert.training.grpo_rollout import Rollout
from preconcert.training.recipe import GateSettings, GRPOSettings, Recipe
from preconcert.training.rollout import EpisodeSpec, rollout
from preconcert.training.rows import GrammarTable, Row, SpeechGradient, build_rows
from preconcert.training.run import grpo_config
from preconcert.training.source import GameSource
from preconcert.training.update import UpdateSettings
from preconcert.training.warm_start import WarmStartSettings
from tests.models.checkpoints import build_chat_model, build_chat_tokenizer

TASK = "rendezvous"
PARAMS: dict[str, Any] = {"size": 3, "landmarks": 2, "horizon": 3}
SHAPE = StarterSettings(layers=1, width=32, heads=2, kv_heads=2, ffn=48, max_context=256)
LORA = LoraSettings(r=2, alpha=4)
AGENTS = ("agent_0", "agent_1")
ALL_SPANS = frozenset(SpanKind)


def starter_checkpoint(folder: Path, task: str = TASK, params: Mapping[str, Any] = PARAMS) -> Path:
    """A random starter model that knows the task's words."""
    env = make_env(task, params, 0)
    words = starter_words(env.words, env.language, env.agents)  # type: ignore[attr-defined]
    return build_starter(words, folder, seed=3, settings=SHAPE)


def chat_checkpoint(folder: Path, kind: str) -> Path:
    """A random chat model with a context long enough for the labelled prompts."""
    tokenizer = build_chat_tokenizer()
    tokenizer.model_max_length = 4096
    model = build_chat_model(len(tokenizer), kind, seed=5)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, adapters: Sequence[str] = AGENTS, deviation: float = 0.1) -> TransformersModel:
    """A model with adapters that differ from the base and from each other; `deviation=0` leaves them fresh."""
    model = TransformersModel.load(folder, LORA)
    for seed, name in enumerate(adapters):
        model.add_adapter(name, seed)
        generator = torch.Generator().manual_seed(100 + seed)
        with torch.no_grad():
            for key, value in model.adapter_parameters(name).items():
                if "lora_B" in key and deviation:
                    value.normal_(0, deviation, generator=generator)
    return model


def settings_of(context: Context = Context.TURN, constrained: bool = True, **spans: Any) -> AgentSettings:
    """Agent settings; turns that are sampled freely are cut after a few tokens."""
    return AgentSettings(
        spans=SpanSettings(**spans), context=context, constrained=constrained, max_tokens=96 if constrained else 12
    )


def team_on(model: TransformersModel, settings: AgentSettings | None = None, **options: Any) -> GenerativeTeam:
    """Both agents of the small rendezvous, each with the adapter of its name if there is one."""
    env = make_env(TASK, PARAMS, 0)
    assignment = {agent: agent if agent in model.adapters else model.adapters[0] for agent in AGENTS}
    return GenerativeTeam(model, env.language, settings or AgentSettings(), assignment, **options)


def specs(seeds: int, group: int, iteration: int = 0) -> list[EpisodeSpec]:
    """`group` episodes on each of `seeds` layouts."""
    return [
        EpisodeSpec(TASK, PARAMS, seed, "train", sample, iteration) for seed in range(seeds) for sample in range(group)
    ]


def play(team: GenerativeTeam, seeds: int = 2, group: int = 3, seed: int = 0) -> list[Episode]:
    """A small rollout with messages."""
    return rollout(specs(seeds, group), team, ChannelSettings(), seed)


def rows_of(
    team: GenerativeTeam,
    episodes: Sequence[Episode],
    advantage: Callable[[int], float] | None = None,
    hindsight: bool = False,
    policy_spans: frozenset[SpanKind] = ALL_SPANS,
    trainable: frozenset[str] = frozenset(AGENTS),
    table: GrammarTable | None = None,
    speech: SpeechGradient = SpeechGradient.SCORE,
) -> tuple[list[Row], GrammarTable]:
    """The rows of a rollout; `advantage` says each turn's by its number, since an untrained team earns nothing."""
    table = GrammarTable() if table is None else table
    credit = estimate(episodes).advantages
    if advantage is not None:
        credit = {key: advantage(number) for number, key in enumerate(credit)}
    settings = GameSource(recipe_of(), team, table, trainable, None).settings
    settings = replace(settings, policy_spans=policy_spans, hindsight=hindsight, speech=speech)
    return build_rows(episodes, credit, team, table, settings), table


class FixedSource:
    """Gives the same rows in every iteration."""

    def __init__(self, rows: Sequence[Row], policy_tokens: int | None = None) -> None:
        self.rows = rows
        self.policy_tokens = sum(int(row.policy.sum()) for row in rows) if policy_tokens is None else policy_tokens

    def collect(self, iteration: int) -> Rollout:
        """The rows, whatever the iteration."""
        return Rollout(self.rows, {}, self.policy_tokens)


def recipe_of(**grpo: Any) -> Recipe:
    """A recipe whose reinforcement learning is one plain step unless told otherwise."""
    plain: dict[str, Any] = {
        "iterations": 1, "seeds": 2, "group": 2, "epochs": 1, "minibatches": 1, "hindsight_weight": 0.0,
        "warmup_iterations": 0, "checkpoint_every": 1000, "max_grad_norm": 1e9,
    }  # fmt: skip
    return Recipe(
        task=TASK,
        params=PARAMS,
        starter=SHAPE,
        lora=LORA,
        warm_start=WarmStartSettings(episodes=8, steps=4, batch=16),
        gate=GateSettings(min_gap=0.0, episodes=4),
        grpo=GRPOSettings(**{**plain, **grpo}),
        seed=7,
    )


def trainer_on(
    model: TransformersModel,
    source: Any,
    table: GrammarTable,
    folder: Path,
    trainable: Sequence[str] = AGENTS,
    reference: str | None = None,
    callbacks: Any = None,
    update: UpdateSettings | None = None,
    agents: Sequence[str] = (),
    **grpo: Any,
) -> MultiAgentGRPOTrainer:
    """The real trainer with the real configuration of a recipe."""
    recipe = recipe_of(**grpo)
    assert isinstance(model.model, PeftModel)
    return MultiAgentGRPOTrainer(
        model.model,
        model.tokenizer,
        grpo_config(recipe, folder),
        source,
        trainable,
        table,
        recipe.grpo.hindsight_weight,
        reference,
        callbacks,
        update,
        agents,
    )


def gradients_of(
    trainer: MultiAgentGRPOTrainer,
    model: TransformersModel,
    change: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, torch.Tensor]:
    """The gradients that the trainer's own training steps leave after one pass, by adapter and parameter.

    Args:
        trainer: made with `accumulate` equal to `minibatches`, so that nothing is stepped in between.
        model: whose adapters' gradients are read.
        change: is given the collated batch first; needs one minibatch and two epochs.
    """
    steps = trainer.args.steps_per_generation
    trainer.current_gradient_accumulation_steps = steps
    model.model.train()
    model.model.zero_grad()
    trainer._step = 0
    if trainer.args.activation_checkpointing:  # the Trainer does this at the start of `train`
        model.base.gradient_checkpointing_enable(trainer.args.activation_checkpointing_kwargs)
    if change is not None:
        batch = trainer._generate_and_score_completions(None)
        change(batch)
        trainer._buffered_inputs, trainer._step = [batch], 1
    for _ in range(steps):
        trainer.training_step(trainer.model, [{}], None)
    found: dict[str, torch.Tensor] = {}
    for name in model.adapters:
        for key, value in parameters_of(model, name).items():
            found[f"{name} {key}"] = torch.zeros_like(value) if value.grad is None else value.grad.clone()
    model.model.zero_grad()
    return found


def parameters_of(model: TransformersModel, adapter: str) -> dict[str, torch.nn.Parameter]:
    """An adapter's tensors, its codec's among them."""
    found = dict(model.adapter_parameters(adapter))
    if adapter in model.codecs:
        found |= {f"codec.{key}": value for key, value in model.codecs[adapter].named_parameters()}
    return found


def weights_of(model: TransformersModel) -> dict[str, torch.Tensor]:
    """A copy of every adapter's weights."""
    return {
        f"{name} {key}": value.detach().clone()
        for name in model.adapters
        for key, value in parameters_of(model, name).items()
    }


def largest_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The largest absolute difference between two sets of tensors with the same names."""
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)
