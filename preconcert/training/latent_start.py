"""Latent messages from supervised play: senders learn what to send by what it is worth to their receivers' imitation.

Parts: `LatentStartSettings`, `Seat` (an agent's model and adapter), `LatentStart` (the losses and their gradients) and
`train_latents` (the loop).

Three moments of an episode go through the models together. At t − 2 everyone speaks without having heard anything, at
t − 1 everyone hears that and speaks again, at t everyone hears what was said at t − 1; the gradient of the receivers'
losses at t runs through the messages into the senders at t − 1. Four losses, after Interlat (arXiv 2511.09149):

* cross-entropy of the receiver's turn, its predictions filled in from hindsight;
* distillation: KL(teacher ‖ student) at the same words, the teacher being the warm-started base that reads the same
  moment with messages in words;
* anchor: the vectors that a receiver reads begin near the embeddings of the words of a scripted message, an even part
  of the words for each vector; the weight fades;
* separation: max(0, ln 2 − JS) between the distributions under the message and under another episode's, so that a
  message is not merely carried along.

Agents may have models of their own: what goes from one to the other is k × d numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from preconcert.core import TrainingError, derive_seed
from preconcert.models import AdapterRoute, Fill, Fills, TransformersModel
from preconcert.models.latents import layer_scale
from preconcert.training.latent_lines import Line, Lines
from preconcert.training.reporter import Reporter, Silent


class LatentStartSettings(BaseModel):
    """The supervised phase of latent messages, between the warm start and reinforcement learning."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(400, ge=0)
    """Optimiser steps; 0 leaves codecs as they are made."""
    batch: int = Field(32, ge=1)
    """Moments per step; each has a turn of every agent."""
    lr: float = Field(3e-3, gt=0)
    """AdamW's peak learning rate, of adapters; decays along a cosine."""
    codec_lr: float = Field(1e-2, gt=0)
    """The same, of codecs, which begin from nothing."""
    distil: float = Field(0.3, ge=0)
    """Weight of the distillation from messages in words; 0 needs no teacher."""
    anchor: float = Field(1.0, ge=0)
    """Weight, at the start, of the distance between the vectors that a receiver reads and the embeddings of the words
    that the scripted sender used; fades evenly. Looking something up is learned late by itself: the base already does
    it with words."""
    anchored: float = Field(0.7, ge=0, le=1)
    """Share of the steps over which that weight fades to 0."""
    separate: float = Field(0.1, ge=0)
    """Weight of the separation from other episodes' messages."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip of the gradient's norm, over everything that is trained."""


@dataclass(frozen=True)
class Seat:
    """Who plays an agent."""

    model: TransformersModel
    adapter: str
    teacher: str | None = None
    """The adapter that reads messages in words; None for the bare base."""


@dataclass(frozen=True)
class _Read:
    """What one pass over some lines gave."""

    logits: list[Tensor]
    """By model, at the chosen places of all its lines in a row, over its vocabulary."""
    truth: list[Tensor]
    """The words there."""
    codes: dict[str, Tensor]
    """By agent, shape (lines of the agent, k, d): what was drawn for its message, before quantisation."""
    distances: list[Tensor]
    """Of the vectors that were read from the embeddings of words, relative to the latter's size; one per vector."""


Codes = Mapping[str, Tensor]
"""By sender, one message per moment: shape (moments, k, d), as sent."""


class LatentStart:
    """The losses of a batch of moments.

    Args:
        seats: who plays each agent. Adapters need codecs, of one shape.
        settings: the weights of the losses.

    Raises:
        TrainingError: the codecs differ in shape.
    """

    def __init__(self, seats: Mapping[str, Seat], settings: LatentStartSettings) -> None:
        shapes = {seat.model.codecs[seat.adapter].settings for seat in seats.values()}
        if len({(shape.tokens, shape.dims, shape.levels) for shape in shapes}) > 1:
            raise TrainingError("agents who talk to each other need codecs of one shape (tokens, dims, levels)")
        self.seats = dict(seats)
        self.settings = settings
        self.shape = next(iter(shapes))

    def parameters(self) -> list[nn.Parameter]:
        """What is trained: the adapters and codecs in the seats, but for the width of the Gaussian, which a supervised
        loss could only shrink."""
        found: dict[int, nn.Parameter] = {}
        for seat in self.seats.values():
            codec = seat.model.codecs[seat.adapter]
            own = [p for p in codec.parameters() if p is not codec.log_deviation]
            for parameter in (*seat.model.adapter_parameters(seat.adapter).values(), *own):
                found[id(parameter)] = parameter
        return list(found.values())

    def loss(
        self, moments: Sequence[tuple[Lines, int]], seed: int, done: float = 0.0
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum for some moments, and its parts by name.

        Args:
            moments: episodes and steps; the step is at least 1.
            seed: of the Gaussian noise on what is sent.
            done: share of the training that is over.
        """
        noise = np.random.default_rng(seed)
        with torch.no_grad():
            first = self._read([_at(lines, step - 2) for lines, step in moments], None, noise)
        early = [step >= 2 for _, step in moments]
        heard = {agent: self._sent(agent, codes) for agent, codes in first.codes.items()}
        second = self._read([_at(lines, step - 1) for lines, step in moments], heard, noise, audible=early)
        said = {agent: self._sent(agent, codes) for agent, codes in second.codes.items()}
        third = self._read([_at(lines, step) for lines, step in moments], said, noise, speak=False)
        entropy = _mean(
            [
                functional.cross_entropy(logits, truth, reduction="none")
                for read in (second, third)
                for logits, truth in zip(read.logits, read.truth, strict=True)
            ]
        )
        parts = {"cross_entropy": float(entropy.detach())}
        total = entropy
        fading = self.settings.anchor * (1.0 - done / self.settings.anchored) if self.settings.anchored else 0.0
        if fading > 0 and third.distances:
            distance = _mean(third.distances)
            parts["distance"] = float(distance.detach())
            total = total + fading * distance
        if self.settings.distil:
            teacher = self._teach([_at(lines, step) for lines, step in moments])
            divergence = _mean(
                [
                    _divergence(told, own)
                    for own, told in zip(third.logits, teacher, strict=True)
                ]
            )
            parts["distillation"] = float(divergence.detach())
            total = total + self.settings.distil * divergence
        if self.settings.separate and len(moments) > 1:
            # A quarter of the moments hears the message of the next one in the batch.
            some = max(1, len(moments) // 4)
            other = {agent: codes.roll(1, dims=0)[:some] for agent, codes in said.items()}
            wrong = self._read([_at(lines, step) for lines, step in moments[:some]], other, noise, speak=False)
            firsts = self._first(moments, some)
            divergence = _mean(
                [
                    _jensen_shannon(own[places.to(own.device)], mixed)
                    for own, mixed, places in zip(third.logits, wrong.logits, firsts, strict=True)
                ]
            )
            parts["separation"] = float(divergence.detach())
            total = total + self.settings.separate * (math.log(2.0) - divergence).clamp(min=0.0)
        return total, parts

    def _sent(self, agent: str, drawn: Tensor) -> Tensor:
        seat = self.seats[agent]
        return seat.model.codecs[seat.adapter].sent(drawn)

    def _first(self, moments: Sequence[tuple[Lines, int]], some: int) -> list[Tensor]:
        """Which of all chosen places belong to the first `some` moments, in the order of `_read`."""
        found: list[Tensor] = []
        for _, rows in self._by_model([_at(lines, step) for lines, step in moments]):
            flags = [number < some for number, line in rows for _ in line.chosen]
            found.append(torch.tensor(flags))
        return found

    def _by_model(
        self, moments: Sequence[Sequence[Line]]
    ) -> list[tuple[TransformersModel, list[tuple[int, Line]]]]:
        """Lines with the number of their moment, by the model that reads them; always in the same order."""
        models = list({id(seat.model): seat.model for seat in self.seats.values()}.values())
        return [
            (
                model,
                [
                    (number, line)
                    for number, lines in enumerate(moments)
                    for line in lines
                    if self.seats[line.agent].model is model
                ],
            )
            for model in models
        ]

    def _read(
        self,
        moments: Sequence[Sequence[Line]],
        heard: Codes | None,
        noise: np.random.Generator,
        speak: bool = True,
        audible: Sequence[bool] | None = None,
    ) -> _Read:
        """Read every line with what its agent hears; what it then says, if anyone wants to know."""
        logits: list[Tensor] = []
        truth: list[Tensor] = []
        codes: dict[str, Tensor] = {}
        distances: list[Tensor] = []
        for model, rows in self._by_model(moments):
            queries = self.shape.tokens if speak else 0
            hidden, starts = self._hidden(model, rows, heard, audible, queries, distances)
            head = model.base.get_output_embeddings()
            picked, words = _places(
                [(row, len(line.prompt) + place, line.answer[place]) for row, (_, line) in enumerate(rows)
                 for place in line.chosen],
                hidden,
            )
            logits.append(functional.linear(picked, head.weight, getattr(head, "bias", None)).float())
            truth.append(words)
            if speak:
                codes |= self._codes(model, rows, hidden, starts, noise)
        return _Read(logits, truth, codes, distances)

    def _hidden(
        self,
        model: TransformersModel,
        rows: Sequence[tuple[int, Line]],
        heard: Codes | None,
        audible: Sequence[bool] | None,
        queries: int,
        distances: list[Tensor],
    ) -> tuple[Tensor, list[int]]:
        """Hidden states of a block of lines, and where each line's queries begin; adds to `distances`."""
        starts = [len(line.prompt) + len(line.answer) for _, line in rows]
        width = max(starts) + queries
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, ((_, line), start) in enumerate(zip(rows, starts, strict=True)):
            ids[row, :start] = torch.tensor(line.prompt + line.answer)
            mask[row, : start + queries] = 1
        fills: list[Fill] = []
        for adapter in dict.fromkeys(self.seats[line.agent].adapter for _, line in rows):
            mine = [row for row, (_, line) in enumerate(rows) if self.seats[line.agent].adapter == adapter]
            codec = model.codecs[adapter]
            if queries:
                asked = codec.queries.expand(len(mine), -1, -1)
                fills.append(Fill.side_by_side(asked, mine, [starts[row] for row in mine]))
            for sender in heard or {}:
                hearing = [
                    row
                    for row in mine
                    if sender in rows[row][1].starts and (audible is None or audible[rows[row][0]])
                ]
                if heard is None or not hearing:
                    continue
                values = heard[sender][[rows[row][0] for row in hearing]]
                places = [rows[row][1].starts[sender] for row in hearing]
                vectors = codec.embedded(values.to(codec.queries.device))
                fills.append(Fill.side_by_side(vectors, hearing, places))
                said = [rows[row][1].words.get(sender, ()) for row in hearing]
                layer = model.base.get_input_embeddings()
                distances.append(_distances(vectors, said, layer.weight * layer_scale(layer)))
        device = model.device
        names = [self.seats[line.agent].adapter for _, line in rows]
        route, open_fills = AdapterRoute(model.base, names), Fills(model.base, fills)
        try:
            output = model.base.base_model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        finally:
            open_fills.close()
            route.close()
        return output.last_hidden_state, starts

    def _codes(
        self,
        model: TransformersModel,
        rows: Sequence[tuple[int, Line]],
        hidden: Tensor,
        starts: Sequence[int],
        noise: np.random.Generator,
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for agent, seat in self.seats.items():
            if seat.model is not model:
                continue
            mine = [row for row, (_, line) in enumerate(rows) if line.agent == agent]
            at = torch.tensor([starts[row] for row in mine])[:, None] + torch.arange(self.shape.tokens)
            codec = model.codecs[seat.adapter]
            mean = codec.mean(hidden[torch.tensor(mine)[:, None], at.to(hidden.device)])
            shaken = torch.from_numpy(noise.standard_normal(tuple(mean.shape))).to(mean)
            found[agent] = mean + codec.deviation().detach() * shaken
        return found

    @torch.no_grad()
    def _teach(self, moments: Sequence[Sequence[Line]]) -> list[Tensor]:
        """What the teachers would write next at the same words, having heard messages in words."""
        found: list[Tensor] = []
        for model, rows in self._by_model(moments):
            ids = torch.zeros((len(rows), max(len(line.teacher) for _, line in rows)), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, (_, line) in enumerate(rows):
                ids[row, : len(line.teacher)] = torch.tensor(line.teacher)
                mask[row, : len(line.teacher)] = 1
            with AdapterRoute(model.base, [self.seats[line.agent].teacher for _, line in rows]):
                hidden = model.base.base_model(
                    input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
                ).last_hidden_state
            picked, _ = _places(
                [(row, place, line.teacher[place]) for row, (_, line) in enumerate(rows) for place in line.taught],
                hidden,
            )
            head = model.base.get_output_embeddings()
            found.append(functional.linear(picked, head.weight, getattr(head, "bias", None)).float())
        return found


def train_latents(
    start: LatentStart,
    episodes: Sequence[Lines],
    seed: int,
    reporter: Reporter | None = None,
) -> list[dict[str, float]]:
    """Train the seats' adapters and codecs on scripted episodes.

    Args:
        start: what to train, and by which losses.
        episodes: from `lines_of`.
        seed: order of the moments, and noise.
        reporter: receives progress.

    Returns:
        The log: `step`, `loss` and its parts.

    Raises:
        TrainingError: no episode has a second step, so that no message is ever read.
    """
    reporter = reporter or Silent()
    settings = start.settings
    moments = [(lines, step) for lines in episodes for step in range(1, len(next(iter(lines.values()))))]
    if not moments:
        raise TrainingError("no episode has a second step: there is nobody to read a message")
    parameters = start.parameters()
    models = list({id(seat.model): seat.model for seat in start.seats.values()}.values())
    held = [(p, p.requires_grad) for model in models for p in model.base.parameters()]
    trained = {id(p) for p in parameters}
    for parameter, _ in held:
        parameter.requires_grad_(id(parameter) in trained)
    codecs = {id(p) for seat in start.seats.values() for p in seat.model.codecs[seat.adapter].parameters()}
    groups = [
        {"params": [p for p in parameters if id(p) not in codecs], "lr": settings.lr},
        {"params": [p for p in parameters if id(p) in codecs], "lr": settings.codec_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warm = max(1, settings.steps // 20)

    def rate(step: int) -> float:
        decay = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / max(1, settings.steps))))
        return min(1.0, (step + 1) / warm) * max(0.05, decay)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order = np.random.default_rng(derive_seed(seed, "order"))
    log: list[dict[str, float]] = []
    every = max(1, settings.steps // 50)
    try:
        for step in range(settings.steps):
            chosen = order.choice(len(moments), size=min(settings.batch, len(moments)), replace=False)
            some = [moments[int(index)] for index in chosen]
            loss, parts = start.loss(some, derive_seed(seed, "noise", step), step / settings.steps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            if step % every == 0 or step + 1 == settings.steps:
                log.append({"step": step, "loss": float(loss.detach()), **parts})
                reporter.advance(step + 1, f"loss {float(loss.detach()):.3f}")
    finally:
        for parameter, wanted in held:
            parameter.requires_grad_(wanted)
            parameter.grad = None
    return log


def _at(lines: Lines, step: int) -> list[Line]:
    """Everyone's turn at a step; before the first there is only the first, which nobody hears."""
    return [turns[max(step, 0)] for turns in lines.values()]


def _places(found: Sequence[tuple[int, int, int]], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states that predict some words, and the words: rows, columns of the words, their ids."""
    table = torch.tensor(found, device=hidden.device)
    return hidden[table[:, 0], table[:, 1] - 1], table[:, 2]


def _distances(vectors: Tensor, said: Sequence[Sequence[tuple[int, ...]]], embeddings: Tensor) -> Tensor:
    """Squared distances of vectors, shape (rows, k, width), from the mean embeddings of their share of the words, over
    the embeddings' mean square length. Vectors beyond the last word have none."""
    count = vectors.shape[1]
    scale = embeddings.detach().float().square().sum(-1).mean()
    found: list[Tensor] = []
    for row, words in enumerate(said):
        for place, share in enumerate(np.array_split(np.arange(len(words)), count)):
            tokens = [token for index in share for token in words[index]]
            if tokens:
                target = embeddings[tokens].detach().float().mean(0)
                found.append((vectors[row, place] - target).square().sum() / scale)
    return torch.stack(found) if found else vectors.new_zeros(0)


def _jensen_shannon(right: Tensor, wrong: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each row's distributions in nats, at most ln 2."""
    one, other = right.log_softmax(-1), wrong.log_softmax(-1)
    middle = torch.logaddexp(one, other) - math.log(2.0)
    return 0.5 * ((one.exp() * (one - middle)).sum(-1) + (other.exp() * (other - middle)).sum(-1))


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """The mean over all numbers of all parts, which may be on different devices."""
    device = parts[0].device
    count = max(1, sum(part.numel() for part in parts))
    return torch.stack([part.sum().to(device) for part in parts]).sum() / count


def _divergence(told: Tensor, own: Tensor) -> Tensor:
    """KL(told || own) of each row's distributions, in nats."""
    return functional.kl_div(own.log_softmax(-1), told.log_softmax(-1), log_target=True, reduction="none").sum(-1)
