"""Latent messages under reinforcement learning: what rows heard and said as tensors, and the loss on what was said.

Parts: `speech_columns` (rows as tensors), `fills_of` (vectors in the place of embeddings, with gradients into the
receivers' codecs), `speech_loss` (the score function of the Gaussian that a message is drawn from), `pathwise_values`
(the gradient through the message itself).

A message is an action of its sender: vector j of a turn was drawn from N(mean_j, deviation²), quantised and sent. Its
loss is the clipped surrogate of the turn's advantage with the ratio of that density, one vector counting as one token.
Quantisation and channel are part of the world, so nothing has to be differentiable between sender and receiver. The
receiver's codec learns from the receiver's own loss, through the embeddings.

Where the channel is differentiable, that loss can go on into the sender: its pass is made a second time, and what
arrived becomes (what arrived) + sent(drawn + mean - stop(mean)) - stop(the same): the number is the one on record, its
gradient with respect to the mean that of the reparametrised draw, straight through the quantisation. The width of the
Gaussian gets none, and stays as it is where nothing else trains it. Receivers' ratios do not see how far a sender has
moved since it spoke, so its own ratio is the limit: a vector whose density has left the clip carries no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from preconcert.core import TrainingError
from preconcert.models import AdapterRoute, Fill, Fills, LatentCodec
from preconcert.models.latents import CODECS
from preconcert.training.rows import Row


def speech_columns(
    rows: Sequence[Row], total: int, prompt_width: int, adapters: Sequence[str]
) -> dict[str, Tensor]:
    """What rows heard and said; empty where none of them has to do with latent messages.

    Args:
        rows: of a rollout.
        total: rows of the batch; those beyond `rows` repeat the first and say nothing that counts.
        prompt_width: columns of the padded prompts.
        adapters: names in the order of adapter columns.

    Returns:
        `heard_at` (B, S), the column of the padded prompt where a message begins, -1 for none; `heard_values`
        (B, S, k, d); `heard_length` (B, S), its vectors; `said_at` (B,), the place among the completion's columns where
        the queries begin, -1 for none; `said_drawn` (B, k, d); `said_logps` (B, k); `said_advantages` (B, k).
        With sources on record those of `_source_columns`, too.
    """
    latents = [placed.latent for row in rows for placed in row.heard]
    latents += [row.said for row in rows if row.said is not None]
    if not latents:
        return {}
    tokens = max(len(latent.values) for latent in latents)
    dims = max((len(latent.values[0]) for latent in latents if latent.values), default=1)
    senders = max(1, max(len(row.heard) for row in rows))
    heard_at = np.full((total, senders), -1, dtype=np.int64)
    heard_length = np.zeros((total, senders), dtype=np.int64)
    heard_values = np.zeros((total, senders, tokens, dims), dtype=np.float32)
    said_at = np.full(total, -1, dtype=np.int64)
    said_drawn = np.zeros((total, tokens, dims), dtype=np.float32)
    said_logps = np.zeros((total, tokens), dtype=np.float32)
    said_advantages = np.zeros((total, tokens), dtype=np.float32)
    for index in range(total):
        row = rows[index if index < len(rows) else 0]
        for place, placed in enumerate(row.heard):
            count = len(placed.latent.values)
            if count:
                heard_at[index, place] = prompt_width - len(row.prompt_ids) + placed.start
                heard_length[index, place] = count
                heard_values[index, place, :count] = placed.latent.values
        if row.said is not None:
            if len(row.said.drawn) != tokens or len(row.said.logprobs) != tokens:
                raise TrainingError(f"row {row.name}: what was drawn for its message is not on record")
            if index < len(rows):
                said_at[index] = len(row.completion_ids)
                said_advantages[index] = row.said_advantage
            said_drawn[index], said_logps[index] = row.said.drawn, row.said.logprobs
    arrays = {
        "heard_at": heard_at,
        "heard_length": heard_length,
        "heard_values": heard_values,
        "said_at": said_at,
        "said_drawn": said_drawn,
        "said_logps": said_logps,
        "said_advantages": said_advantages,
    }
    if any(row.sources for row in rows):
        arrays |= _source_columns(rows, total, adapters, senders, tokens, dims)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _source_columns(
    rows: Sequence[Row], total: int, adapters: Sequence[str], senders: int, tokens: int, dims: int
) -> dict[str, NDArray[Any]]:
    """`from_ids` (B, S, L), `from_length` and `from_adapter` (B, S), and `from_heard_at`, `from_heard_length` and
    `from_heard_values` with one more axis for what the senders had heard; `from_drawn` (B, S, k, d) and `from_logps`
    (B, S, k)."""
    sources = [source for row in rows for source in row.sources]
    longest = max(len(source.ids) for source in sources)
    theirs = max(1, max(len(source.heard) for source in sources))
    ids = np.zeros((total, senders, longest), dtype=np.int64)
    length = np.zeros((total, senders), dtype=np.int64)
    adapter = np.full((total, senders), -1, dtype=np.int64)
    drawn = np.zeros((total, senders, tokens, dims), dtype=np.float32)
    logps = np.zeros((total, senders, tokens), dtype=np.float32)
    heard_at = np.full((total, senders, theirs), -1, dtype=np.int64)
    heard_length = np.zeros((total, senders, theirs), dtype=np.int64)
    heard_values = np.zeros((total, senders, theirs, tokens, dims), dtype=np.float32)
    for index in range(total):
        row = rows[index if index < len(rows) else 0]
        for place, (source, placed) in enumerate(zip(row.sources, row.heard, strict=True)):
            if not placed.latent.values or source.adapter not in adapters:
                continue
            ids[index, place, : len(source.ids)] = source.ids
            length[index, place] = len(source.ids)
            adapter[index, place] = adapters.index(source.adapter)
            count = len(placed.latent.values)
            drawn[index, place, :count] = placed.latent.drawn
            logps[index, place, :count] = placed.latent.logprobs[:count]
            for other, held in enumerate(source.heard):
                many = len(held.latent.values)
                if many:
                    heard_at[index, place, other] = held.start
                    heard_length[index, place, other] = many
                    heard_values[index, place, other, :many] = held.latent.values
    return {
        "from_ids": ids,
        "from_length": length,
        "from_adapter": adapter,
        "from_drawn": drawn,
        "from_logps": logps,
        "from_heard_at": heard_at,
        "from_heard_length": heard_length,
        "from_heard_values": heard_values,
    }


def pathwise_values(
    base: Any,
    batch: Mapping[str, Tensor],
    codecs: Mapping[str, LatentCodec],
    adapters: Sequence[str],
    clip: tuple[float, float],
    temperature: float = 1.0,
) -> tuple[Tensor, float | None]:
    """What was heard, shape (B, S, k, d), with gradients into the senders where their rows are on record.

    Args:
        base: the model without its head's loss; its codecs hang on it.
        batch: with the columns of `speech_columns`.
        codecs: by adapter.
        adapters: names in the order of the batch's adapter columns.
        clip: a vector carries a gradient while the ratio of its density is between 1 - clip[0] and 1 + clip[1].
        temperature: that messages were drawn with.

    Returns:
        The values, and the share of vectors beyond the clip; None where there are no gradients.
    """
    values = batch["heard_values"]
    if "from_ids" not in batch or not torch.is_grad_enabled():
        return values, None
    places = (batch["from_adapter"] >= 0).nonzero()
    if not len(places):
        return values, None
    at = (places[:, 0], places[:, 1])
    who, length, ids = batch["from_adapter"][at], batch["from_length"][at], batch["from_ids"][at]
    tokens = values.shape[2]  # fewer than were said where the channel cuts every message short
    said = max(len(codec.queries) for codec in codecs.values())
    block = torch.nn.functional.pad(ids, (0, said))
    reach = torch.arange(block.shape[1], device=block.device) < (length + said)[:, None]
    heard = {
        "heard_at": batch["from_heard_at"][at],
        "heard_length": batch["from_heard_length"][at],
        "heard_values": batch["from_heard_values"][at],
        "said_at": length,
        "prompt_ids": ids[:, :0],
        "adapter": who,
    }
    fills = Fills(base, fills_of(heard, codecs, adapters))
    route = AdapterRoute(base, [adapters[number] for number in who.tolist()])
    try:
        hidden = base.base_model(input_ids=block, attention_mask=reach.long(), use_cache=False).last_hidden_state
    finally:
        fills.close()
        route.close()
    columns = length[:, None] + torch.arange(tokens, device=block.device)
    states = hidden[torch.arange(len(hidden), device=block.device)[:, None], columns]
    moved = torch.zeros_like(values)
    outside = torch.zeros(values.shape[:3], dtype=torch.bool, device=values.device)
    for number, name in enumerate(adapters):
        mine = (who == number).nonzero()[:, 0]
        if name not in codecs or not len(mine):
            continue
        codec = codecs[name]
        mean = codec.mean(states[mine])
        drawn = batch["from_drawn"][at][mine]
        ratio = (codec.logprob(drawn, mean.detach(), temperature).detach() - batch["from_logps"][at][mine]).exp()
        beyond = (ratio < 1.0 - clip[0]) | (ratio > 1.0 + clip[1])
        sent = codec.sent(drawn + mean - mean.detach())
        where = (places[mine, 0], places[mine, 1])
        moved = moved.index_put(where, (sent - sent.detach()).masked_fill(beyond[..., None], 0.0))
        outside = outside.index_put(where, beyond)
    lengths = batch["heard_length"][at][:, None]
    counted = torch.arange(tokens, device=values.device) < lengths
    return values + moved, float(outside[at][counted].float().mean())


def fills_of(
    batch: Mapping[str, Tensor],
    codecs: Mapping[str, LatentCodec],
    adapters: Sequence[str],
    values: Tensor | None = None,
) -> list[Fill]:
    """The vectors that stand in a batch's prompts and after its completions.

    Args:
        batch: with the columns of `speech_columns`.
        codecs: by adapter.
        adapters: names in the order of the batch's `adapter` column.
        values: what was heard, where it is to carry gradients; None for `heard_values`.
    """
    held = batch["heard_values"] if values is None else values
    fills: list[Fill] = []
    prompt_width = batch["prompt_ids"].shape[1]
    for number, name in enumerate(adapters):
        mine = batch["adapter"] == number
        if name not in codecs or not bool(mine.any()):
            continue
        codec = codecs[name]
        for length in batch["heard_length"][mine].unique().tolist():
            if length:
                places = (mine[:, None] & (batch["heard_length"] == length)).nonzero()
                numbers = held[places[:, 0], places[:, 1], :length]
                starts = batch["heard_at"][places[:, 0], places[:, 1]]
                fills.append(Fill.side_by_side(codec.embedded(numbers), places[:, 0], starts))
        speaking = (mine & (batch["said_at"] >= 0)).nonzero()[:, 0]
        if len(speaking):
            queries = codec.queries.expand(len(speaking), -1, -1)
            fills.append(Fill.side_by_side(queries, speaking, prompt_width + batch["said_at"][speaking]))
    return fills


def query_columns(batch: Mapping[str, Tensor]) -> Tensor:
    """Places of the queries among the completion's columns, shape (B, k); rows that say nothing point to the first."""
    tokens = batch["said_drawn"].shape[1]
    return batch["said_at"].clamp(min=0)[:, None] + torch.arange(tokens, device=batch["said_at"].device)


def speech_loss(
    batch: Mapping[str, Tensor],
    hidden: Tensor,
    codecs: Mapping[str, LatentCodec],
    adapters: Sequence[str],
    clip: tuple[float, float],
    only: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, float]]:
    """The clipped surrogate of what was said, summed over vectors.

    Args:
        batch: with the columns of `speech_columns`.
        hidden: states at the queries, shape (B, k, width).
        codecs: by adapter.
        adapters: names in the order of the batch's `adapter` column.
        clip: the ratio is kept to 1 - clip[0] and 1 + clip[1].
        only: rows whose loss counts; None for all.
        temperature: that messages were drawn with.

    Returns:
        The sum, and figures: vectors, mean ratio, share of clipped ratios, mean deviation of the Gaussians.
    """
    total = hidden.sum() * 0.0
    ratios: list[Tensor] = []
    figures: dict[str, float] = {}
    deviations: list[float] = []
    for number, name in enumerate(adapters):
        rows = ((batch["adapter"] == number) & (batch["said_at"] >= 0)).nonzero()[:, 0]
        if only is not None:
            rows = rows[only[rows]]
        if name not in codecs or not len(rows):
            continue
        codec = codecs[name]
        logps = codec.logprob(batch["said_drawn"][rows], codec.mean(hidden[rows]), temperature)
        ratio = (logps - batch["said_logps"][rows]).exp()
        advantages = batch["said_advantages"][rows]
        kept = ratio.clamp(1.0 - clip[0], 1.0 + clip[1])
        total = total - torch.minimum(ratio * advantages, kept * advantages).sum()
        ratios.append(ratio.detach().flatten())
        deviations.append(float(codec.deviation().detach().mean()))
    if ratios:
        joined = torch.cat(ratios)
        outside = (joined < 1.0 - clip[0]) | (joined > 1.0 + clip[1])
        figures = {
            "speech/vectors": float(len(joined)),
            "speech/ratio": float(joined.mean()),
            "speech/clip_ratio": float(outside.float().mean()),
            "speech/deviation": float(np.mean(deviations)),
        }
    return total, figures


def codecs_of(model: Any) -> dict[str, LatentCodec]:
    """The codecs that hang on a model, by adapter."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return dict(getattr(base, CODECS, None) or {})
