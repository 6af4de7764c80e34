"""Multi-agent GRPO on TRL's trainer: one low-rank adapter per agent on one shared base.

TRL owns the loop, the buffering, the epochs over a rollout, loss types, clipping, logging, checkpoints and Accelerate.
This file holds every override. Besides it, only the shape of batches (`batch.py`) and their division by agent
(`sequential.py`) rely on TRL's insides:

* `_generate_and_score_completions` is replaced whole by a rollout (`RolloutSource`);
* `_compute_loss` opens the per-row adapter route, adds the cross-entropy to the hindsight targets, and leaves the
  policy loss to TRL; the route stays open until after backward (`training_step`), for activation checkpointing;
* `_get_per_token_logps_and_entropies` takes probabilities under the grammar's mask, as they were sampled;
* `_prepare_inputs` cuts a rollout by agent where agents are updated one after the other (`update.Order`);
* `create_optimizer` makes exactly the trainable adapters require gradients;
* checkpoints hold every adapter and the source's state, and end with a marker, so that a torn one is never resumed
  from.

What is logged besides TRL's figures: `approx_kl`, `sampler_mismatch`, `skipped_steps`, `trained_tokens/SPAN`, and for
every trained adapter `gradient_norm/NAME` and `gradient_share/NAME` (its share of the squared norm, summed over an
iteration's steps). Where agents share an adapter, `gradient_share/AGENT` says whose part of it that is.
`gradient_norm/largest` is the largest gradient of an iteration's steps, before it is clipped.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from preconcert.core import TrainingError
from preconcert.models import AdapterRoute, Fills, add_constrained_head
from preconcert.models.latents import CODECS, load_codec, save_codec
from preconcert.training.batch import collate
from preconcert.training.checkpoint_marker import write_marker
from preconcert.training.gradient_shares import GradientShares, adapter_parameters, set_trainable
from preconcert.training.grpo_rollout import Rollout, RolloutSource
from preconcert.training.rows import GrammarTable, trained_tokens
from preconcert.training.sequential import Cut, Schedule
from preconcert.training.speech_loss import codecs_of, fills_of, pathwise_values, query_columns, speech_loss
from preconcert.training.update import (
    Order,
    RatioLevel,
    UpdateSettings,
    approximate_kl,
    importance_weights,
    policy_mask,
    turn_level,
    turn_weights,
)

SOURCE_STATE = "source.json"
"""What the rollout source remembers between iterations."""


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
        update: order of agents, level of the ratio, corrections and limits.
        agents: every agent whose rows may be trained; needed for a sequential update, and to tell apart the gradients
            of agents that share an adapter.
        entropy_end: what `args.entropy_coef` moves to, evenly, until the last iteration; None leaves it.
        speech_weight: factor of the loss on what was said in vectors.
        codec_lr: peak learning rate of codecs; None for that of the adapters.

    Raises:
        TrainingError: an adapter to be trained does not exist, or the update does not fit the other settings.
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
        update: UpdateSettings | None = None,
        agents: Sequence[str] = (),
        entropy_end: float | None = None,
        speech_weight: float = 1.0,
        codec_lr: float | None = None,
    ) -> None:
        self.update = update or UpdateSettings()
        self.speech_weight = speech_weight
        self.codec_lr = codec_lr
        self.agents = tuple(agents)
        self.entropy_end = entropy_end
        if self.update.ratio is RatioLevel.TURN and args.beta:
            raise TrainingError("a ratio per turn and a KL term (beta) do not go together: use ratio=token or sequence")
        if self.update.order is Order.SEQUENTIAL:
            if not self.agents:
                raise TrainingError("a sequential update needs the names of the agents")
            assert args.steps_per_generation is not None
            if args.steps_per_generation % len(self.agents):
                raise TrainingError(
                    f"a sequential update of {len(self.agents)} agents needs a multiple of {len(self.agents)} "
                    f"minibatches, not {args.steps_per_generation}"
                )
            if args.gradient_accumulation_steps > 1:
                raise TrainingError("a sequential update takes one optimiser step per minibatch: set accumulate=1")
        if self.update.ratio is RatioLevel.SEQUENCE:
            args.importance_sampling_level = "sequence"
        if self.update.dual_clip is not None and self.update.dual_clip <= 1 + args.epsilon_high:
            raise TrainingError(
                f"dual_clip={self.update.dual_clip:g} is not above the ratio's upper clip, {1 + args.epsilon_high:g}"
            )
        args.delta = self.update.dual_clip
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
        self._schedule = Schedule()
        self._stopped = False
        self._raw_logps: torch.Tensor | None = None
        self._states: torch.Tensor | None = None
        self._fills: Fills | None = None
        self._skipped: set[int] = set()
        self._gradients = GradientShares(trainable, agents)
        self._only: torch.Tensor | None = None
        self._to_take_apart: dict[str, Any] | None = None
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
        rollout = self._collect(self.iteration)
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
                agents=self.agents or None,
            ).items()
        }
        batch["num_items_in_batch"] = self.accelerator.gather(
            torch.tensor(rollout.policy_tokens, device=device)
        ).sum()
        batch["hindsight_items"] = self.accelerator.gather((batch["target_ids"] >= 0).sum()).sum()
        if self.beta != 0.0:
            batch["ref_per_token_logps"] = self._logps_of(batch, self.reference)
        if self.update.correction is not None:
            self._correct(batch, self.update.correction)
        if self.update.ratio is RatioLevel.TURN and self.loss_type == "grpo":
            # A mean over a row's tokens would let long turns dominate; every turn of a row counts the same.
            batch["advantages"] = batch["advantages"] * turn_weights(policy_mask(batch), batch["joint"])
        for name, value in rollout.metrics.items():
            self._metrics["train"][name].append(value)
        counts = trained_tokens(rollout.rows)
        totals = self.accelerator.reduce(torch.tensor(list(counts.values()), device=device), reduction="sum")
        for name, total in zip(counts, totals.tolist(), strict=True):
            self._metrics["train"][f"trained_tokens/{name}"].append(total)
        self.state.num_input_tokens_seen += int(batch["completion_mask"].sum())
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self._place == 0:
            self._stopped = False
        if self.update.order is Order.SIMULTANEOUS:
            return super()._prepare_inputs(generation_batch)
        place = self._place
        if place == 0 or not self._schedule.slots:
            self._plan(self._generate_and_score_completions(generation_batch))
        agent, piece = self._schedule.slots[place]
        if place and self._schedule.begins(place):
            self._hand_over(self._schedule.agent(place - 1), agent)
            self._stopped = False
        return piece

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self._only is None and self._due():
            self._to_take_apart = inputs
        self._present = inputs
        self._open_route([self.adapter_names[i] for i in inputs["adapter"].tolist()], inputs)
        loss = super()._compute_loss(model, inputs)
        if self._only is None:
            self._watch(inputs)
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
        if self._states is not None:
            loss = loss + self._speech_loss(inputs, self._states)
        return loss

    def _speech_loss(self, inputs: dict[str, Any], states: torch.Tensor) -> torch.Tensor:
        """The loss of latent messages: a mean over the policy's tokens, each vector being one, times its weight."""
        model = self.accelerator.unwrap_model(self.model)
        clip = (self.args.epsilon, self.args.epsilon_high)
        total, figures = speech_loss(
            inputs, states, codecs_of(model), self.adapter_names, clip, self._only, self.temperature
        )
        if self._only is None:
            for name, value in figures.items():
                self._metrics["train"][name].append(value)
        items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        parts = self.args.steps_per_generation / self.current_gradient_accumulation_steps
        return self.speech_weight * total * parts / items

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
            **({"state_columns": query_columns(present)} if "said_at" in present else {}),
        )
        self._states = output.states
        logps, entropy = self._own(output.logprobs), self._own(output.entropy)
        self._logps = None if output.target_logprobs is None else self._own(output.target_logprobs)
        self._raw_logps = logps
        if self.update.ratio is RatioLevel.TURN:
            logps = turn_level(logps, present["old_per_token_logps"], policy_mask(present), present["joint"])
        return logps, entropy, None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass; the adapter route is closed after the backward pass."""
        place = self._place
        if self._stopped and place and not self._schedule.begins(place):
            self._skipped.add(place // self.current_gradient_accumulation_steps)
            self._step += 1
            loss = torch.zeros((), device=self.accelerator.device)
        else:
            try:
                loss = super().training_step(model, inputs, num_items_in_batch)
                if self._to_take_apart is not None:
                    self._take_apart(self._to_take_apart)
            finally:
                self._close_route()
                self._present = self._logps = self._raw_logps = self._states = self._to_take_apart = None
            if self._stopped:
                # Without gradients the optimiser leaves every weight and every moment alone.
                self.model.zero_grad(set_to_none=True)
                self._skipped.add(place // self.current_gradient_accumulation_steps)
                loss = torch.zeros_like(loss)
            else:
                self._note_gradients(place)
        if self._place == 0:
            self._log_iteration()
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """An optimiser over exactly the trainable adapters, their codecs in groups of their own."""
        set_trainable(self.model, self.trainable)
        made = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if made or self.codec_lr is None:
            return optimizer
        codecs = {id(parameter) for codec in codecs_of(self.model).values() for parameter in codec.parameters()}
        for group in list(optimizer.param_groups):
            apart = [parameter for parameter in group["params"] if id(parameter) in codecs]
            if apart:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in codecs]
                optimizer.add_param_group({**group, "params": apart, "lr": self.codec_lr})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: a run describes itself elsewhere."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Adapters that came later are not this trainer's; a league keeps them itself."""
        configs = self.accelerator.unwrap_model(self.model).peft_config
        everything = dict(configs)
        for name in everything.keys() - set(self.adapter_names):
            del configs[name]
        try:
            super()._save(output_dir, state_dict)
        finally:
            configs.clear()
            configs.update(everything)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.state.global_step % self.steps_per_iteration:
            raise TrainingError(
                f"step {self.state.global_step} is inside an iteration of {self.steps_per_iteration} steps; "
                "a checkpoint there could not be resumed exactly"
            )
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            self._save_own(folder)
            write_marker(folder, self.state.global_step, self.state.global_step // self.steps_per_iteration)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_own(Path(resume_from_checkpoint))

    # ---- own parts

    @property
    def iteration(self) -> int:
        """Number of the present rollout, from 0."""
        return self.state.global_step // self.steps_per_iteration

    @property
    def _place(self) -> int:
        """Which forward pass of the iteration comes next."""
        return self._step % (self.args.steps_per_generation * self.num_iterations)

    def _collect(self, iteration: int) -> Rollout:
        """One rollout."""
        if self.entropy_end is not None:
            last = max(1, self.args.max_steps // self.steps_per_iteration - 1)
            done = min(1.0, iteration / last)
            self.entropy_coef = (1.0 - done) * self.args.entropy_coef + done * self.entropy_end
        rollout = self.source.collect(iteration)
        for name in rollout.restarted:
            for parameter in adapter_parameters(self.accelerator.unwrap_model(self.model), name):
                self.optimizer.state.pop(parameter, None)
        return rollout

    def _save_own(self, folder: Path) -> None:
        """What a checkpoint holds besides TRL's files."""
        state: dict[str, Any] = getattr(self.source, "state_dict", dict)()
        (folder / SOURCE_STATE).write_text(json.dumps(state))
        for name, codec in codecs_of(self.accelerator.unwrap_model(self.model)).items():
            (folder / CODECS / name).mkdir(parents=True, exist_ok=True)
            save_codec(codec, folder / CODECS / name)

    def _load_own(self, folder: Path) -> None:
        file = folder / SOURCE_STATE
        if file.is_file() and hasattr(self.source, "load_state_dict"):
            self.source.load_state_dict(json.loads(file.read_text()))
        for name, codec in codecs_of(self.accelerator.unwrap_model(self.model)).items():
            saved = load_codec(folder / CODECS / name, codec.width)
            codec.load_state_dict(saved.state_dict())

    def _plan(self, batch: dict[str, Any]) -> None:
        """Cut a rollout into the minibatches of one agent after the other."""
        parts = self.args.steps_per_generation // len(self.agents)
        cut = Cut(self.agents, tuple(self.adapter_names), self.args.seed, self.iteration, parts, self.num_iterations)
        self._schedule = Schedule.of(batch, cut, self.accelerator)

    def _hand_over(self, before: str, agent: str) -> None:
        """The next agent's advantages are multiplied by the ratios of those updated before it."""
        for piece in self._schedule.pieces(before):
            self._schedule.compound(piece, self._logps_of(piece, None, own=True))
        self._metrics["train"]["compound_factor"].append(self._schedule.hand_over(agent, self.update.compound_clip))

    @torch.no_grad()
    def _watch(self, inputs: dict[str, Any]) -> None:
        """How far the policy is from the one that sampled, before this step."""
        assert self._raw_logps is not None
        mask, old = policy_mask(inputs), inputs["old_per_token_logps"]
        totals = self.accelerator.reduce(torch.stack(approximate_kl(self._raw_logps, old, mask)), reduction="sum")
        kl = float(totals[0] / totals[1].clamp(min=1))
        self._metrics["train"]["approx_kl"].append(kl)
        if self._place == 0 and self.update.correction is None:
            self._metrics["train"]["sampler_mismatch"].append(self._mean_difference(self._raw_logps, old, mask))
        if self.update.kl_stop is not None and kl > self.update.kl_stop:
            self._stopped = True

    def _correct(self, batch: dict[str, Any], cap: float) -> None:
        """Truncated importance weights for what the sampler did differently; ratios then refer to the trainer."""
        mask, sampled = policy_mask(batch), batch["old_per_token_logps"]
        mine = torch.where(mask, self._logps_of(batch, None, own=True), torch.zeros_like(sampled))
        weights = importance_weights(mine, sampled, mask, cap)
        batch["advantages"] = batch["advantages"] * weights
        batch["old_per_token_logps"] = mine
        self._metrics["train"]["sampler_mismatch"].append(self._mean_difference(mine, sampled, mask))
        self._metrics["train"]["sampler_weight"].append(float(weights[mask].mean()) if mask.any() else 1.0)

    def _mean_difference(self, one: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> float:
        """Mean absolute difference over the tokens of all processes; 0 without any."""
        difference = torch.where(mask, (one - other).abs(), 0.0).sum()
        totals = self.accelerator.reduce(torch.stack([difference, mask.sum().to(difference.dtype)]), reduction="sum")
        return float(totals[0] / totals[1].clamp(min=1))

    def _note_gradients(self, place: int) -> None:
        """Their size, before clipping; in a sequential update, only the slot's own agent has any."""
        slot = self._schedule.agent(place) if self.update.order is Order.SEQUENTIAL else None
        model = self.accelerator.unwrap_model(self.model)
        if slot is not None:
            own = {id(p) for name in self._schedule.owned[slot] for p in adapter_parameters(model, name)}
            for parameter in model.parameters():
                if id(parameter) not in own:
                    # A gradient of zeros is no gradient, but Adam's momentum would go on moving the weights.
                    parameter.grad = None
        if self._step % self.current_gradient_accumulation_steps:
            return
        for name, norm in self._gradients.note(model, slot).items():
            self._metrics["train"][f"gradient_norm/{name}"].append(norm)

    def _log_iteration(self) -> None:
        """What is known only when the iteration's last step is over."""
        if self.update.kl_stop is not None:
            self._metrics["train"]["skipped_steps"].append(float(len(self._skipped)))
        self._skipped.clear()
        for name, value in self._gradients.take():
            self._metrics["train"][name].append(value)

    def _due(self) -> bool:
        """Is this the minibatch whose gradient is taken apart by agent?"""
        every = self.update.share_every
        wanted = self._gradients.shared and self.update.order is Order.SIMULTANEOUS and every > 0
        return wanted and self._place == 0 and self.iteration % every == 0

    def _own(self, numbers: torch.Tensor) -> torch.Tensor:
        """The same, with a gradient in the chosen rows only: over all choices, gradients sum to the whole."""
        if self._only is None:
            return numbers
        return torch.where(self._only[:, None], numbers, numbers.detach())

    def _take_apart(self, inputs: dict[str, Any]) -> None:
        """Each agent's part of the gradient, by a pass of its own that leaves gradients, metrics and randomness alone.

        The passes go through the bare model, so that processes' gradients are not averaged behind their backs.
        """
        parameters = [p for name in self.trainable for p in adapter_parameters(self.model, name)]
        held, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        try:
            with torch.random.fork_rng():
                for number, agent in enumerate(self.agents):
                    self._only = inputs["agent"] == number
                    with self.compute_loss_context_manager():
                        loss = self._compute_loss(self.model, inputs)
                    found = torch.autograd.grad(loss, parameters, allow_unused=True)
                    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
                    flat = self.accelerator.reduce(torch.cat([part.flatten() for part in parts]), reduction="sum")
                    self._gradients.note_agent(agent, flat)
        finally:
            self._only = None
            self._metrics["train"] = held

    def _open_route(self, names: Sequence[str | None], batch: Mapping[str, torch.Tensor]) -> None:
        """Rows go through these adapters, and latent messages stand in their places, until `_close_route`."""
        self._close_route()
        model = self.accelerator.unwrap_model(self.model)
        if "heard_at" in batch:
            base, codecs = model.get_base_model(), codecs_of(model)
            # The senders' pass is over before the rows' own route is opened: a layer follows one route at a time.
            clip = (self.args.epsilon, self.args.epsilon_high)
            values, outside = pathwise_values(base, batch, codecs, self.adapter_names, clip, self.temperature)
            if outside is not None and self._only is None:
                self._metrics["train"]["speech/path_clip_ratio"].append(outside)
            self._fills = Fills(base, fills_of(batch, codecs, self.adapter_names, values))
        self._route = AdapterRoute(model, names)

    def _close_route(self) -> None:
        if self._route is not None:
            self._route.close()
            self._route = None
        if self._fills is not None:
            self._fills.close()
            self._fills = None

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
    def _logps_of(self, batch: dict[str, Any], adapter: str | None, own: bool = False) -> torch.Tensor:
        """Log-probabilities of the batch under one adapter (None: the bare base) or each row's own, without gradients,
        in slices of one training step."""
        total = len(batch["adapter"])
        size = max(1, -(-total // self.args.steps_per_generation))
        parts: list[torch.Tensor] = []
        held, self._present = self._present, None
        training = self.model.training
        self.model.eval()
        try:
            for start in range(0, total, size):
                piece = {k: v[start : start + size] for k, v in batch.items() if v.ndim > 0}
                self._present = piece
                names = [self.adapter_names[i] for i in piece["adapter"].tolist()]
                self._open_route(names if own else [adapter] * len(names), piece)
                ids = torch.cat([piece["prompt_ids"], piece["completion_ids"]], dim=1)
                mask = torch.cat([piece["prompt_mask"], piece["completion_mask"]], dim=1)
                self._get_per_token_logps_and_entropies(self.model, ids, mask, piece["completion_ids"].shape[1])
                assert self._raw_logps is not None
                parts.append(self._raw_logps)
        finally:
            self.model.train(training)
            self._close_route()
            self._present, self._logps, self._raw_logps, self._states = held, None, None, None
        return torch.cat(parts)


def _no_reward(**_: Any) -> list[float]:
    raise TrainingError("rewards come from the rollout, not from a reward function")
