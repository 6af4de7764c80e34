"""Warm start: supervised fine-tuning on scripted play, its predictions filled from hindsight, through TRL.

Scripted players supply what is said and done; `hindsight` supplies what was intended and foreseen. The result is an
imitator that knows the grammar, the world's dynamics and, roughly, what messages are for; reinforcement learning
sharpens it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from preconcert.agents import AgentSettings
from preconcert.core import Episode
from preconcert.prompts import TurnFormat
from preconcert.training.hindsight import hindsight_content
from preconcert.training.optimizer import MuonAdamW


class WarmStartMethod(StrEnum):
    """Which weights the supervised phase changes."""

    FULL = "full"
    """Every weight of the base."""
    LORA = "lora"
    """One adapter, of which every agent's own then starts as a copy."""


class WarmStartSettings(BaseModel):
    """Supervised fine-tuning before reinforcement learning."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    episodes: int = Field(3000, ge=0)
    """Scripted episodes to imitate; 0 skips the phase."""
    player: str = "scripted"
    """Who plays them: `scripted`, `expert` or `random`."""
    steps: int = Field(600, ge=1)
    """Optimiser steps."""
    batch: int = Field(128, ge=1)
    """Turns per step."""
    muon_lr: float = Field(0.02, gt=0)
    """Learning rate of hidden matrices (method `full`)."""
    lr: float = Field(3e-3, gt=0)
    """AdamW's learning rate: embeddings and norms under `full`, the adapter under `lora`."""
    weight_decay: float = Field(0.01, ge=0)
    """Of both optimisers."""
    method: WarmStartMethod = WarmStartMethod.FULL
    """All weights (`full`), or one adapter (`lora`), which is the default for a pretrained checkpoint."""


def supervised_examples(
    episodes: Sequence[Episode], turn_format: TurnFormat, settings: AgentSettings
) -> list[dict[str, list[int]]]:
    """One `input_ids`/`labels` pair per turn; only the turn itself carries loss (label -100 elsewhere).

    Where decoding is constrained, the tokens that the grammar forces carry none either.
    """
    examples: list[dict[str, list[int]]] = []
    for episode in episodes:
        for agent, trajectory in episode.trajectories.items():
            others = tuple(other for other in episode.trajectories if other != agent)
            done: list[str] = []
            for index, turn in enumerate(trajectory.turns):
                prompt = turn_format.prompt_ids(agent, turn.observation, turn.inbox, others, done)
                content = hindsight_content(
                    episode, agent, index, turn_format.language, settings.spans, turn_format.speech
                )
                written = turn_format.write(content, others, turn.observation.legal_actions)
                examples.append(
                    {
                        "input_ids": [*prompt, *written.ids],
                        "labels": [-100] * len(prompt)
                        + [
                            token if chosen or not settings.constrained else -100
                            for token, chosen in zip(written.ids, written.chosen, strict=True)
                        ],
                    }
                )
                done.append(turn.action)
    return examples


def fine_tune(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, list[int]]],
    settings: WarmStartSettings,
    folder: Path,
    seed: int,
    callbacks: list[TrainerCallback] | None = None,
) -> list[dict[str, float]]:
    """Train the model's trainable weights on the examples.

    Args:
        model: a causal language model, or a peft model with one trainable adapter.
        tokenizer: for padding.
        examples: from `supervised_examples`.
        settings: lengths and rates.
        folder: scratch space of the trainer.
        seed: order of the examples.

    Returns:
        The trainer's log.
    """
    full = settings.method is WarmStartMethod.FULL
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
        warmup_steps=max(1, settings.steps // 20),
        max_grad_norm=1.0,
        logging_steps=max(1, settings.steps // 60),
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        seed=seed % 2**31,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=0,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    optimizer = MuonAdamW(model, settings.muon_lr, settings.lr, settings.weight_decay) if full else None
    trainer = _QuietSFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(list(examples)),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class _QuietSFTTrainer(SFTTrainer):
    """Keeps its metrics to the log."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: a run describes itself elsewhere."""


