"""Training a token world model's adapter through TRL: a cross-entropy per part of the answer, each with its own
denominator and weight.

Parts: `span_losses` (the loss as a pure function), `train_world_model`, `refine` (a few steps beside another trainer),
and `heldout_report` (what the trained model says about play on other layouts). Rows come from `world_data.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from preconcert.core import Episode, Move, Outcome, UnknownNameError, derive_seed
from preconcert.models import TransformersModel, route_rows
from preconcert.models.constrained import HeadScale, head_scale
from preconcert.prompts import OWN_TEAM
from preconcert.training.world_data import WorldData, collate
from preconcert.training.world_rows import LOSSES, Step, world_steps
from preconcert.training.world_settings import WorldTraining, WorldWeights
from preconcert.world_models import TokenBelief, TokenWorldModel


def span_losses(
    logits: Float[Tensor, "tokens vocabulary"],
    targets: Int[Tensor, " tokens"],
    kinds: Int[Tensor, " tokens"],
    token_weights: Float[Tensor, " tokens"],
) -> dict[str, Float[Tensor, ""]]:
    """The mean cross-entropy in nats of every part that is there, each over the weights of its own tokens.

    Args:
        logits: that predict the targets.
        targets: token ids.
        kinds: what each counts towards, as numbers of `LOSSES` from 1; 0 counts nothing.
        token_weights: of each token within its part.
    """
    entropies = functional.cross_entropy(logits.float(), targets, reduction="none") * token_weights
    found: dict[str, Tensor] = {}
    for number, part in enumerate(LOSSES, start=1):
        mine = kinds == number
        total = token_weights[mine].sum()
        if float(total) > 0:
            found[part.value] = entropies[mine].sum() / total
    return found


def part_losses(model: Any, batch: Mapping[str, Tensor], scale: HeadScale) -> dict[str, Tensor]:
    """The losses of a batch from `collate`; only places that carry a loss are projected onto the vocabulary.

    Args:
        model: a causal language model, its adapters inside.
        batch: from `collate`.
        scale: what the architecture does to its logits.
    """
    hidden = model.base_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    kinds = batch["kinds"][:, 1:]
    counted = kinds > 0
    logits = scale.apply(model.get_output_embeddings()(hidden[:, :-1][counted]))
    token_weights = batch["row_weights"][:, None].expand(kinds.shape)[counted]
    return span_losses(logits, batch["input_ids"][:, 1:][counted], kinds[counted], token_weights)


def total_loss(parts: Mapping[str, Tensor], weights: WorldWeights) -> Tensor:
    """The weighted sum of the parts' losses."""
    return torch.stack([getattr(weights, name) * loss for name, loss in parts.items()]).sum()


class WorldTrainer(SFTTrainer):
    """TRL's supervised trainer on rows whose parts have losses of their own.

    Its dataset holds numbers of batches; the collator makes them, so that batches may follow from the present weights.
    """

    weights: WorldWeights
    scale: HeadScale

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the parts' losses; each part is logged as `loss_PART`."""
        core = self.accelerator.unwrap_model(model)
        parts = part_losses(core.get_base_model() if hasattr(core, "get_base_model") else core, inputs, self.scale)
        for name, loss in parts.items():
            self._metrics["train"][f"loss_{name}"].append(float(loss.detach()))
        loss = total_loss(parts, self.weights)
        return (loss, None) if return_outputs else loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: a run describes itself elsewhere."""


def train_world_model(
    model: TransformersModel,
    world: TokenWorldModel,
    sources: Mapping[str, Sequence[Episode]],
    settings: WorldTraining,
    seed: int,
    folder: Path,
    callbacks: list[TrainerCallback] | None = None,
) -> list[dict[str, float]]:
    """Train the adapter that a world model writes with; all else of the model stays as it is.

    Args:
        model: the backend of the world model.
        world: names the adapter.
        sources: episodes by the name of their source.
        settings: lengths, rates and weights.
        seed: everything random follows from it.
        folder: scratch space of the trainer.
        callbacks: of the trainer.

    Returns:
        The trainer's log: loss by part.

    Raises:
        UnknownNameError: the world model has no adapter, or a source is unknown.
    """
    if world.adapter is None:
        raise UnknownNameError("adapter", "None", model.adapters)
    data = WorldData(sources, world, settings, seed)
    wanted = {id(parameter) for parameter in model.adapter_parameters(world.adapter).values()}
    assert not isinstance(model.model, type(model.base))
    before = {parameter: parameter.requires_grad for parameter in model.model.parameters()}
    active = model.model.active_adapter
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        learning_rate=settings.lr,
        weight_decay=0.0,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
        warmup_steps=max(1, settings.steps // 20),
        max_grad_norm=settings.max_grad_norm,
        logging_steps=max(1, settings.steps // 60),
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available() and model.base.dtype == torch.bfloat16,
        gradient_checkpointing=False,
        seed=seed % 2**31,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=0,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    pad = model.tokenizer.pad_token_id
    numbers = iter(range(settings.steps))

    def rows_of(asked: list[dict[str, Any]]) -> dict[str, Tensor]:
        # Batches are made in their order; the loader asks for one too many at the end.
        return collate(data.batch(next(numbers, settings.steps - 1)), pad if pad is not None else 0)

    try:
        model.model.set_adapter(world.adapter)
        for parameter in model.model.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
        trainer = WorldTrainer(
            model=model.model,
            args=args,
            train_dataset=Dataset.from_list([{"input_ids": [n], "labels": [n]} for n in range(settings.steps)]),
            data_collator=rows_of,
            processing_class=model.tokenizer,
            callbacks=callbacks,
        )
        trainer.weights, trainer.scale = settings.weights, head_scale(model.base.config)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    finally:
        model.model.set_adapter(active)
        for parameter, wanted_grad in before.items():
            parameter.requires_grad_(wanted_grad)
        model.base.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def refine(
    model: TransformersModel,
    world: TokenWorldModel,
    sources: Mapping[str, Sequence[Episode]],
    settings: WorldTraining,
    seed: int,
) -> dict[str, float]:
    """A few steps of the same training without a trainer: nothing of the process's random state, of the active adapter
    or of other parameters is touched, so that it may happen while another trainer holds the model.

    Returns:
        The mean loss of every part.
    """
    assert world.adapter is not None
    data = WorldData(sources, world, settings, seed)
    parameters = list(model.adapter_parameters(world.adapter).values())
    before = [parameter.requires_grad for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr / 2, weight_decay=0.0)
    scale = head_scale(model.base.config)
    pad = model.tokenizer.pad_token_id
    sums: dict[str, list[float]] = {}
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for number in range(settings.steps):
            rows = data.batch(number)
            tensors = collate(rows, pad if pad is not None else 0)
            batch = {name: value.to(model.device) for name, value in tensors.items()}
            with route_rows(model.base, [world.adapter] * len(rows)):
                parts = part_losses(model.base, batch, scale)
                gradients = torch.autograd.grad(total_loss(parts, settings.weights), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            for parameter in parameters:
                parameter.grad = None
            for name, loss in parts.items():
                sums.setdefault(name, []).append(float(loss.detach()))
    finally:
        for parameter, wanted in zip(parameters, before, strict=True):
            parameter.requires_grad_(wanted)
    return {name: _mean(losses) for name, losses in sums.items()}


def heldout_report(
    world: TokenWorldModel,
    episodes: Sequence[Episode],
    seed: int,
    horizon: int = 5,
    rows: int = 1000,
    partners: str = OWN_TEAM,
) -> dict[str, float]:
    """How right the model is about play it has not learned from, the others' real actions given.

    Args:
        world: the model.
        episodes: real play.
        seed: of the samples.
        horizon: steps of the longest imagination.
        rows: transitions at the most, drawn at random.
        partners: who played, one of `PARTNERS`.

    Returns:
        Shares of right answers: whole views, views in their determined fields, single fields, rewards, ends, after one
        step and (for views) after `horizon` steps of going on from its own views; the share of malformed answers; the
        others' actions: accuracy and nats; nats per view.
    """
    spelling = world.format
    chains = [
        chain
        for episode in episodes
        for chain in world_steps(episode, spelling.turns.memory, partners, spelling.recall)
    ]
    places = [(chain, index) for chain in chains for index in range(len(chain))]
    # At random: at even distances they would all fall on the same steps of episodes of equal length.
    order = np.random.default_rng(derive_seed(seed, "rows")).permutation(len(places))[:rows]
    starts = [places[int(at)][0][places[int(at)][1]] for at in sorted(order)]
    steps = world.advance([s.belief for s in starts], [s.move for s in starts], _seeds(seed, 1, len(starts)))
    texts = [step.observation.text if step.observation is not None else None for step in steps]
    found = {f"one_step_{name}": share for name, share in _right(world, starts, texts).items()}
    malformed = sum(step.malformed for step in steps) / len(steps)
    found["malformed"] = malformed
    found["reward"] = _mean(
        [a.reward == _paid(world, b.reward) and not a.malformed for a, b in zip(steps, starts, strict=True)]
    )
    found["done"] = _mean([a.done == b.done and not a.malformed for a, b in zip(steps, starts, strict=True)])
    blind = [Move(s.move.action, s.move.message) for s in starts]
    outcomes = [
        Outcome(world.observe(s.belief, s.view), dict(s.move.others or {}), s.reward, s.done) for s in starts
    ]
    judged = world.judge([s.belief for s in starts], blind, outcomes)
    guesses = [
        (about[outcome.others[other]], max(about.values()))
        for judgement, outcome in zip(judged, outcomes, strict=True)
        if judgement is not None
        for other, about in judgement.others.items()
    ]
    found["view_nats"] = _mean([judgement.view_nll for judgement in judged if judgement is not None])
    if guesses:
        found["others_accuracy"] = _mean([real == best for real, best in guesses])
        found["others_nats"] = _mean([-math.log(max(real, 1e-12)) for real, _ in guesses])
    found |= {f"step_{horizon}_{name}": share for name, share in _drift(world, chains, seed, horizon).items()}
    return found


def _paid(world: TokenWorldModel, reward: float) -> float:
    """A reward as the task's language rounds it, where it has words for rewards."""
    word = world.format.reward_word(reward)
    return reward if word is None else float(word)


def _drift(
    world: TokenWorldModel, chains: Sequence[Sequence[Step]], seed: int, horizon: int
) -> dict[str, float]:
    """`_right` after so many steps of going on from imagined views; an imagination that broke off is wrong."""
    chains = [chain for chain in chains if len(chain) > horizon]
    beliefs: list[TokenBelief | None] = [chain[0].belief for chain in chains]
    for ahead in range(horizon):
        live = [place for place, belief in enumerate(beliefs) if belief is not None]
        asked = [belief for belief in beliefs if belief is not None]
        imagined = world.advance(asked, [chains[p][ahead].move for p in live], _seeds(seed, 2 + ahead, len(live)))
        for place, step in zip(live, imagined, strict=True):
            beliefs[place] = None if step.malformed or (step.done and ahead + 1 < horizon) else step.belief
    texts = [belief.observation.text if belief is not None else None for belief in beliefs]
    return _right(world, [chain[horizon - 1] for chain in chains], texts)


def _right(world: TokenWorldModel, real: Sequence[Step], texts: Sequence[str | None]) -> dict[str, float]:
    """Shares of right views, of views right in their determined fields, and of right fields; None is wrong."""
    view = world.format.language.view
    found = {"exact": _mean([text == step.view for step, text in zip(real, texts, strict=True)])}
    if view is not None:
        sure = [index for index, item in enumerate(view.fields) if item.determined]
        pairs = [
            (view.parse(step.view), view.parse(text) if text is not None else ("",) * len(view.fields))
            for step, text in zip(real, texts, strict=True)
        ]
        if sure:
            found["determined"] = _mean([all(one[i] == other[i] for i in sure) for one, other in pairs])
        found["fields"] = _mean([x == y for one, other in pairs for x, y in zip(one, other, strict=True)])
    return found


def _seeds(seed: int, part: int, count: int) -> list[int]:
    return [derive_seed(seed, part, number) for number in range(count)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
