"""Multi-agent GRPO on TRL's trainer: one low-rank adapter per agent on one shared base.

TRL owns the loop, the buffering, the epochs over a rollout, loss types, clipping, logging, checkpoints and Accelerate.
This file holds every override, and nothing else relies on TRL's insides:

* `_generate_and_score_completions` is replaced whole by a rollout (`RolloutSource`);
* `_compute_loss` opens the per-row adapter route, adds the cross-entropy to the hindsight targets, and leaves the
  policy loss to TRL; the route stays open until after backward (`training_step`), for activation checkpointing;
* `_get_per_token_logps_and_entropies` takes probabilities under the grammar's mask, as they were sampled;
* `create_optimizer` makes exactly the trainable adapters require gradients;
* checkpoints hold every adapter and end with a marker, so that a torn one is never resumed from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from preconcert.core import Episode, TrainingError
from preconcert.models import AdapterRoute, add_constrained_head
from preconcert.training.batch import collate
from preconcert.training.credit import Number, TurnKey
from preconcert.training.rows import GrammarTable, Row

MARKER = "complete.json"
"""Last file written into a checkpoint."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """What one iteration trains on."""

    rows: Sequence[Row]
    metrics: Mapping[str, float]
    """Logged with the step."""
    policy_tokens: int
    """The policy loss's denominator: its tokens, those of rows left out for want of an advantage included."""
    episodes: Sequence[Episode] = ()
    """What was played."""
    returns: Mapping[TurnKey, Number] | None = None
    """What a critic should have said about `episodes`, where the credit estimator works with one."""


class RolloutSource(Protocol):
    """Plays and rewards; called once per iteration."""

    def collect(self, iteration: int) -> Rollout:
        """This process's share of the rollout, groups kept whole."""
        ...


class MultiAgentGRPOTrainer(GRPOTrainer):
    """GRPO for a team.

    Args:
        model: a peft model with every adapter that rows refer to.
        tokenizer: the model's tokenizer.
        args: TRL's config. One iteration is `steps_per_generation × num_iterations` steps; `max_steps` counts those.
        source: plays the episodes.
        trainable: adapters that learn; all others stay bit-identical.
        table: the grammar table that rows refer to.
        hindsight_weight: factor of the supervised loss.
        reference: adapter whose distribution the KL term (`args.beta`) refers to; None for the bare base.
        callbacks: as in transformers.

    Raises:
        TrainingError: an adapter to be trained does not exist.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        args: GRPOConfig,
        source: RolloutSource,
        trainable: Sequence[str],
        table: GrammarTable,
        hindsight_weight: float = 0.0,
        reference: str | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.adapter_names = sorted(model.peft_config)
        for name in trainable:
            if name not in self.adapter_names:
                raise TrainingError(f"cannot train adapter {name!r}: the model has {', '.join(self.adapter_names)}")
        self.trainable = tuple(trainable)
        self.source = source
        self.table = table
        self.hindsight_weight = hindsight_weight
        self.reference = reference
        self._route: AdapterRoute | None = None
        self._present: dict[str, Any] | None = None
        self._logps: torch.Tensor | None = None
        self._table_tensors: tuple[int, torch.Tensor, torch.Tensor] | None = None
        set_trainable(model, self.trainable)
        rows = args.generation_batch_size
        assert rows is not None
        # With a beta, TRL would look for an adapter named "default" to copy; the reference here is a route.
        beta, args.beta = args.beta, 0.0
        super().__init__(
            model=model,
            reward_funcs=_no_reward,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [""] * rows}),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        args.beta = self.beta = beta
        add_constrained_head(self.model.get_base_model())
        set_trainable(self.model, self.trainable)

    @property
    def steps_per_iteration(self) -> int:
        """Optimiser steps between two rollouts."""
        forward_passes = self.args.steps_per_generation * self.num_iterations
        return max(1, forward_passes // self.args.gradient_accumulation_steps)

    # ---- hooks of GRPOTrainer

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        del inputs  # the dataset only paces TRL's loop
        rollout = self.source.collect(self.state.global_step // self.steps_per_iteration)
        if not rollout.rows:
            raise TrainingError("the rollout has no row to train on; is every agent frozen?")
        device = self.accelerator.device
        # TRL gathers one figure per row from all processes.
        most = self.accelerator.gather(torch.tensor(len(rollout.rows), device=device)).max()
        batch: dict[str, Any] = {
            key: value.to(device)
            for key, value in collate(
                rollout.rows,
                self.adapter_names,
                self._tokenizer.pad_token_id,
                self.args.steps_per_generation,
                at_least=int(most),
            ).items()
        }
        batch["num_items_in_batch"] = self.accelerator.gather(
            torch.tensor(rollout.policy_tokens, device=device)
        ).sum()
        batch["hindsight_items"] = self.accelerator.gather((batch["target_ids"] >= 0).sum()).sum()
        if self.beta != 0.0:
            batch["ref_per_token_logps"] = self._reference_logps(batch)
        for name, value in rollout.metrics.items():
            self._metrics["train"][name].append(value)
        self.state.num_input_tokens_seen += int(batch["completion_mask"].sum())
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._present = inputs
        self._open_route([self.adapter_names[i] for i in inputs["adapter"].tolist()])
        loss = super()._compute_loss(model, inputs)
        if self.loss_type in ("grpo", "dr_grpo"):
            # These are means over rows, and a row without a policy token is none.
            counted = inputs["tool_mask"].any(dim=1).sum().clamp(min=1)
            loss = loss * (len(inputs["tool_mask"]) / counted)
        if self.hindsight_weight:
            mask = inputs["target_ids"] >= 0
            assert self._logps is not None
            cross_entropy = -(self._logps * mask).sum()
            items = inputs["hindsight_items"].clamp(min=1.0) / self.accelerator.num_processes
            parts = self.args.steps_per_generation / self.current_gradient_accumulation_steps
            loss = loss + self.hindsight_weight * cross_entropy * parts / items
            if mask.any():
                self._metrics["train"]["hindsight_loss"].append((cross_entropy / mask.sum()).item())
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        present = self._present
        if present is None:
            raise TrainingError("log-probabilities were asked for outside of the loss")
        tokens, allowed = self._grammar(input_ids.device)
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            constrained_head=True,
            logits_to_keep=logits_to_keep,
            completion_ids=input_ids[:, -logits_to_keep:],
            allowed_index=present["allowed"],
            table_tokens=tokens,
            table_allowed=allowed,
            temperature=self.temperature,
            target_ids=present["target_ids"] if self.hindsight_weight else None,
        )
        self._logps = output.target_logprobs
        return output.logprobs, output.entropy, None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass; the adapter route is closed after the backward pass."""
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._close_route()
            self._present = self._logps = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """An optimiser over exactly the trainable adapters."""
        set_trainable(self.model, self.trainable)
        return super().create_optimizer(model)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: a run describes itself elsewhere."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.state.global_step % self.steps_per_iteration:
            raise TrainingError(
                f"step {self.state.global_step} is inside an iteration of {self.steps_per_iteration} steps; "
                "a checkpoint there could not be resumed exactly"
            )
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            write_marker(folder, self.state.global_step, self.state.global_step // self.steps_per_iteration)

    # ---- own parts

    def _open_route(self, names: Sequence[str | None]) -> None:
        self._close_route()
        self._route = AdapterRoute(self.accelerator.unwrap_model(self.model), names)

    def _close_route(self) -> None:
        if self._route is not None:
            self._route.close()
            self._route = None

    def _grammar(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if self._table_tensors is None or self._table_tensors[0] != self.table.rows:
            tokens, allowed = self.table.arrays()
            self._table_tensors = (
                self.table.rows,
                torch.from_numpy(tokens).to(device),
                torch.from_numpy(allowed).to(device),
            )
        return self._table_tensors[1], self._table_tensors[2]

    @torch.no_grad()
    def _reference_logps(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities of the batch under the reference, in slices of one training step."""
        total = len(batch["adapter"])
        size = max(1, total // self.args.steps_per_generation)
        parts: list[torch.Tensor] = []
        try:
            for start in range(0, total, size):
                piece = {k: v[start : start + size] for k, v in batch.items() if v.ndim > 0}
                self._present = piece
                self._open_route([self.reference] * len(piece["adapter"]))
                ids = torch.cat([piece["prompt_ids"], piece["completion_ids"]], dim=1)
                mask = torch.cat([piece["prompt_mask"], piece["completion_mask"]], dim=1)
                width = piece["completion_ids"].shape[1]
                parts.append(self._get_per_token_logps_and_entropies(self.model, ids, mask, width)[0])
        finally:
            self._close_route()
            self._present = self._logps = None
        return torch.cat(parts)


def set_trainable(model: PeftModel, adapters: Sequence[str]) -> None:
    """Let exactly these adapters' parameters require gradients."""
    wanted = {id(p) for name in adapters for p in adapter_parameters(model, name)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)


def adapter_parameters(model: PeftModel, adapter: str) -> list[torch.nn.Parameter]:
    """The parameters of one adapter, in the model's order."""
    return [p for name, p in model.named_parameters() if f".{adapter}." in name and "lora_" in name]


def write_marker(folder: Path, step: int, iteration: int) -> None:
    """Declare a checkpoint folder complete."""
    beside = folder / (MARKER + ".new")
    beside.write_text(json.dumps({"step": step, "iteration": iteration}))
    with open(beside) as file:
        os.fsync(file.fileno())
    os.replace(beside, folder / MARKER)


def latest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint of a run and the iteration to go on with; None where there is none."""
    found: list[tuple[int, int, Path]] = []
    for marker in folder.glob(f"checkpoint-*/{MARKER}"):
        content = json.loads(marker.read_text())
        found.append((content["step"], content["iteration"], marker.parent))
    if not found:
        return None
    _, iteration, path = max(found)
    return path, iteration


def _no_reward(**_: Any) -> list[float]:
    raise TrainingError("rewards come from the rollout, not from a reward function")
