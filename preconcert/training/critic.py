"""The critic: what a team's turn is worth, read off the whole truth (centralised) or off the agent's own prompt.

A critic is an adapter and a linear head on the shared base, or a model of its own. It trains on returns and is never
used when acting. Its parameters are disjoint from the policy's, so its update is a step of its own beside TRL's.

Parts: `CriticSettings`, `CriticReader` (what is read for which turn), `ValueHead` (per-agent normalisation, PopArt) and
`Critic`. Which returns it is fitted to is credit's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from preconcert.core import Episode, TrainingError, derive_seed
from preconcert.models import TransformersModel, load_checkpoint, route_rows
from preconcert.training.credit import TurnKey

ADAPTER = "critic"
"""The critic's adapter on the shared base."""


class CriticContext(StrEnum):
    """What the critic reads."""

    CENTRAL = "central"
    """The global state and every message that somebody holds."""
    OWN = "own"
    """The agent's own prompt."""


class CriticModel(StrEnum):
    """Where the critic's weights are."""

    SHARED = "shared"
    """An adapter and a head on the policy's base."""
    SEPARATE = "separate"
    """A full copy of the base, every weight trained."""


class CriticSettings(BaseModel):
    """The critic and how it learns."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    context: CriticContext = CriticContext.CENTRAL
    """What it reads."""
    model: CriticModel = CriticModel.SHARED
    """Where its weights are."""
    lr: float = Field(3e-3, gt=0)
    """AdamW's learning rate."""
    epochs: int = Field(3, ge=1)
    """Passes over each rollout."""
    minibatches: int = Field(8, ge=1)
    """Optimiser steps per pass."""
    clip: float | None = Field(0.2, gt=0)
    """How far a value may move from the one at the rollout before it stops counting, in normalised units."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip of the gradient's norm."""
    normalise: bool = True
    """Keep each agent's returns at mean 0 and deviation 1 for the head (PopArt)."""
    memory: float = Field(0.9, ge=0, lt=1)
    """Weight of the past in the normaliser's moving moments, per rollout."""
    warmup_iterations: int = Field(2, ge=0)
    """First iterations in which the critic learns and the policy has no advantage yet."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One sequence and the values that are read off it."""

    ids: tuple[int, ...]
    places: tuple[tuple[int, int, TurnKey, int], ...]
    """(token whose hidden state is read, column of the head, turn, token of that turn's completion)."""


class CriticReader:
    """Which tokens the critic sees for each turn.

    Args:
        tokenizer: the model's tokenizer.
        agents: in the episode's order.
        context: whole truth or own prompt.
        acted: also read what earlier agents of the same step have done (values chained over agents).
        per_token: one value before each token of a completion, instead of one before the turn.
    """

    def __init__(
        self,
        tokenizer: Any,
        agents: Sequence[str],
        context: CriticContext,
        acted: bool = False,
        per_token: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.agents = tuple(agents)
        self.context = context
        self.acted = acted
        self.per_token = per_token
        self._ids: dict[str, tuple[int, ...]] = {}

    def read(self, episodes: Sequence[Episode]) -> list[Reading]:
        """One sequence per step where all agents can share it, else one per turn."""
        together = self.context is CriticContext.CENTRAL and not self.acted and not self.per_token
        readings: list[Reading] = []
        for position, episode in enumerate(episodes):
            if tuple(episode.trajectories) != self.agents:
                raise TrainingError(
                    f"the critic knows the agents {', '.join(self.agents)}, an episode has "
                    f"{', '.join(episode.trajectories)}"
                )
            # Scripted players are part of the world: their turns have no tokens and need no value.
            writers = [
                column
                for column, agent in enumerate(self.agents)
                if any(turn.completion_ids for turn in episode.trajectories[agent].turns)
            ]
            for index in range(episode.steps):
                if together:
                    ids = self._truth(episode, index)
                    places = tuple(
                        (len(ids) - 1, column, TurnKey(position, self.agents[column], index), 0) for column in writers
                    )
                    readings.append(Reading(ids, places))
                else:
                    readings += [self._alone(episode, position, index, column) for column in writers]
        return readings

    def _alone(self, episode: Episode, position: int, index: int, column: int) -> Reading:
        agent = self.agents[column]
        turn = episode.trajectories[agent].turns[index]
        ids: tuple[int, ...] = self._truth(episode, index) if self.context is CriticContext.CENTRAL else ()
        if self.acted:
            done = (f"{a} {episode.trajectories[a].turns[index].action}" for a in self.agents[:column])
            ids += self._tokens(" ".join(done))
        if self.context is CriticContext.OWN or self.per_token:
            ids += turn.prompt_ids
        key = TurnKey(position, agent, index)
        if not self.per_token:
            return Reading(ids, ((len(ids) - 1, column, key, 0),))
        places = tuple((len(ids) - 1 + token, column, key, token) for token in range(len(turn.completion_ids)))
        return Reading(ids + turn.completion_ids[:-1], places)

    def _truth(self, episode: Episode, index: int) -> tuple[int, ...]:
        held = {
            (message.sender, message.sent_at, message.payload): message
            for trajectory in episode.trajectories.values()
            for message in trajectory.turns[index].inbox
        }
        said = " ".join(f"{sender} {payload}" for sender, _, payload in sorted(held))
        ids = self._tokens(episode.states[index]) + self._tokens(said)
        if not ids:
            raise TrainingError(f"{episode.task}: the global state at step {index} is empty: there is nothing to read")
        return ids

    def _tokens(self, text: str) -> tuple[int, ...]:
        if text not in self._ids:
            if len(self._ids) > 100_000:
                self._ids.clear()
            self._ids[text] = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._ids[text]


class ValueHead(nn.Module):
    """A linear value per agent in units of that agent's returns (PopArt, arXiv 1602.07714, equations 4 to 9).

    Args:
        width: of the hidden state.
        agents: number of columns.
    """

    mean: Tensor
    deviation: Tensor
    first: Tensor
    second: Tensor
    weight_seen: Tensor

    def __init__(self, width: int, agents: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, agents)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        for name, start in (("mean", 0.0), ("deviation", 1.0), ("first", 0.0), ("second", 0.0), ("weight_seen", 0.0)):
            self.register_buffer(name, torch.full((agents,), start, dtype=torch.float64))

    def forward(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows agents"]:
        """Normalised values."""
        return self.linear(hidden.to(self.linear.weight.dtype))

    def raw(self, normalised: Float[Tensor, " n"], column: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """In units of the returns."""
        return (normalised.double() * self.deviation[column] + self.mean[column]).to(normalised.dtype)

    def normalised(self, raw: Float[Tensor, " n"], column: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """In units of the head."""
        return ((raw.double() - self.mean[column]) / self.deviation[column]).to(raw.dtype)

    @torch.no_grad()
    def follow(
        self,
        count: Float[Tensor, " agents"],
        total: Float[Tensor, " agents"],
        squares: Float[Tensor, " agents"],
        memory: float,
    ) -> None:
        """Move the moments towards a rollout's returns; the head is rescaled so that no raw value changes.

        Args:
            count: returns per agent; an agent without any keeps its moments.
            total: their sum.
            squares: the sum of their squares.
            memory: weight of the past.
        """
        seen = count > 0
        n = count.clamp(min=1)
        step = torch.where(seen, 1.0 - memory, 0.0)
        self.first += step * (total / n - self.first)
        self.second += step * (squares / n - self.second)
        self.weight_seen += step * (1.0 - self.weight_seen)
        known = self.weight_seen.clamp(min=1e-12)
        mean = torch.where(self.weight_seen > 0, self.first / known, self.mean)
        variance = (self.second / known - mean**2).clamp(min=1e-4)
        deviation = torch.where(self.weight_seen > 0, variance.sqrt(), self.deviation)
        kind = self.linear.weight.dtype
        self.linear.weight.mul_((self.deviation / deviation).to(kind)[:, None])
        self.linear.bias.copy_(((self.deviation * self.linear.bias.double() + self.mean - mean) / deviation).to(kind))
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)


class _Encoder(Protocol):
    """Hidden states under the critic's weights."""

    width: int

    @property
    def device(self) -> torch.device: ...

    def parameters(self) -> dict[str, nn.Parameter]: ...

    def hidden(self, ids: Int[Tensor, "rows tokens"], mask: Int[Tensor, "rows tokens"]) -> Tensor: ...


class _SharedEncoder:
    """An adapter on the policy's base."""

    def __init__(self, model: TransformersModel, seed: int) -> None:
        if ADAPTER not in model.adapters:
            model.add_adapter(ADAPTER, seed)
        self.model = model
        self.width = model.base.config.get_text_config().hidden_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.model.adapter_parameters(ADAPTER)

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        with route_rows(self.model.base, [ADAPTER] * len(ids)):
            return _last_hidden(self.model.base, ids, mask)


class _SeparateEncoder:
    """A model of its own."""

    def __init__(self, path: str | Path, dtype: str, device: torch.device) -> None:
        self.net, _ = load_checkpoint(path, dtype, str(device))
        self.width = self.net.config.get_text_config().hidden_size
        self._device = device

    @property
    def device(self) -> torch.device:
        return self._device

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.net.base_model.named_parameters())

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        return _last_hidden(self.net, ids, mask)


def _last_hidden(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


@dataclass(slots=True)
class _Batch:
    """A rollout as the critic holds it between reading and learning."""

    episodes: Sequence[Episode]
    readings: list[Reading]
    values: dict[TurnKey, float | NDArray[np.float64]]


class Critic:
    """Values of turns, learned from returns.

    Args:
        model: the policy's model; a `shared` critic adds its adapter there.
        agents: names in the episodes' order.
        settings: what it reads and how it learns.
        seed: of the adapter and of the minibatches.
        path: checkpoint of a `separate` critic's start.
        acted: see `CriticReader`.
        per_token: see `CriticReader`.
        rows: sequences per forward pass without gradients.
    """

    def __init__(
        self,
        model: TransformersModel,
        agents: Sequence[str],
        settings: CriticSettings,
        seed: int,
        path: str | Path | None = None,
        acted: bool = False,
        per_token: bool = False,
        rows: int = 256,
    ) -> None:
        self.settings = settings
        self.agents = tuple(agents)
        self.seed = seed
        self.rows = rows
        self.reader = CriticReader(model.tokenizer, agents, settings.context, acted, per_token)
        self.encoder: _Encoder
        if settings.model is CriticModel.SHARED:
            self.encoder = _SharedEncoder(model, derive_seed(seed, ADAPTER))
        else:
            if path is None:
                raise TrainingError("a separate critic needs the checkpoint that it starts from")
            self.encoder = _SeparateEncoder(path, "float32", model.device)
        self.head = ValueHead(self.encoder.width, len(self.agents)).to(self.encoder.device)
        self.optimizer = torch.optim.AdamW(
            [*self.encoder.parameters().values(), *self.head.parameters()], lr=settings.lr, weight_decay=0.0
        )
        self.pad = model.tokenizer.pad_token_id or 0
        self._batch: _Batch | None = None

    def values(self, episodes: Sequence[Episode]) -> dict[TurnKey, float | NDArray[np.float64]]:
        """The value before each turn, in units of the returns; per token, one before each token of the completion."""
        readings = self.reader.read(episodes)
        places = [place for reading in readings for place in reading.places]
        flat = torch.zeros(len(places), device=self.encoder.device)
        at = 0
        with torch.no_grad():
            for start in range(0, len(readings), self.rows):
                part = readings[start : start + self.rows]
                value, column = self._forward(part)
                flat[at : at + len(value)] = self.head.raw(value, column)
                at += len(value)
        found: dict[TurnKey, float | NDArray[np.float64]] = {}
        numbers = flat.double().cpu().numpy()
        if self.reader.per_token:
            lists: dict[TurnKey, list[float]] = {}
            for (_, _, key, _), number in zip(places, numbers.tolist(), strict=True):
                lists.setdefault(key, []).append(number)
            found.update({key: np.array(items) for key, items in lists.items()})
        else:
            found.update({key: n for (_, _, key, _), n in zip(places, numbers.tolist(), strict=True)})
        self._batch = _Batch(episodes, readings, found)
        return found

    def fit(
        self,
        returns: Mapping[TurnKey, Any],
        iteration: int,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, float]:
        """Learn the returns of the rollout that `values` was last called on.

        L = ½ max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²), the mean over values, in normalised units (PPO's
        clipped value loss; MAPPO, arXiv 2103.01955).

        Args:
            returns: per turn, or per token of it.
            iteration: seeds the minibatches.
            reduce: sums a tensor over all processes; None for one process.

        Returns:
            `value_loss`, `explained_variance` (of the returns, before learning) and `critic_grad_norm`.
        """
        batch = self._batch
        if batch is None:
            raise TrainingError("the critic has read no rollout yet")
        reduce = reduce or (lambda tensor: tensor)
        s, device = self.settings, self.encoder.device
        target_of = self._per_reading(batch, returns)
        old_of = self._per_reading(batch, batch.values)
        self._follow(batch, target_of, reduce)
        found = {"explained_variance": self._explained(target_of, old_of, reduce)}
        parameters = [*self.encoder.parameters().values(), *self.head.parameters()]
        losses: list[float] = []
        norms: list[float] = []
        rng = np.random.default_rng(derive_seed(self.seed, "minibatches", iteration))
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            for _ in range(s.epochs):
                for chosen in np.array_split(rng.permutation(len(batch.readings)), s.minibatches):
                    loss, count = torch.zeros((), device=device), 0
                    if len(chosen):
                        value, column = self._forward([batch.readings[i] for i in chosen])
                        target = self.head.normalised(_cat(target_of, chosen, device), column)
                        error = (value - target) ** 2
                        if s.clip is not None:
                            old = self.head.normalised(_cat(old_of, chosen, device), column)
                            clipped = old + (value - old).clamp(-s.clip, s.clip)
                            error = torch.maximum(error, (clipped - target) ** 2)
                        loss, count = 0.5 * error.sum(), len(error)
                    everything = float(reduce(torch.tensor(float(count), device=device)).clamp(min=1))
                    self.optimizer.zero_grad()
                    if count:
                        (loss / everything).backward()
                    for parameter in parameters:
                        if parameter.grad is None:
                            parameter.grad = torch.zeros_like(parameter)
                        parameter.grad = reduce(parameter.grad)
                    norms.append(float(nn.utils.clip_grad_norm_(parameters, s.max_grad_norm)))
                    self.optimizer.step()
                    losses.append(float(reduce(loss.detach().clone())) / everything)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
        self._batch = None
        return {**found, "value_loss": float(np.mean(losses)), "critic_grad_norm": float(np.mean(norms))}

    def state_dict(self) -> dict[str, Any]:
        """Weights, head, normaliser and optimiser."""
        weights = {name: parameter.detach().cpu() for name, parameter in self.encoder.parameters().items()}
        return {"weights": weights, "head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put everything back."""
        mine = self.encoder.parameters()
        if set(mine) != set(state["weights"]):
            raise TrainingError(f"a critic of {len(state['weights'])} tensors does not fit one of {len(mine)}")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(state["weights"][name])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])

    # ---- own parts

    def _forward(self, readings: Sequence[Reading]) -> tuple[Tensor, Tensor]:
        """Normalised values of all places of the readings, in order, and their columns."""
        device = self.encoder.device
        width = max(len(reading.ids) for reading in readings)
        ids = np.full((len(readings), width), self.pad, dtype=np.int64)
        mask = np.zeros((len(readings), width), dtype=np.int64)
        rows, tokens, columns = [], [], []
        for row, reading in enumerate(readings):
            ids[row, : len(reading.ids)] = reading.ids
            mask[row, : len(reading.ids)] = 1
            for token, place, _, _ in reading.places:
                rows.append(row)
                tokens.append(token)
                columns.append(place)
        hidden = self.encoder.hidden(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device))
        column = torch.tensor(columns, device=device)
        values = self.head(hidden[torch.tensor(rows, device=device), torch.tensor(tokens, device=device)])
        return values.gather(1, column[:, None])[:, 0], column

    def _per_reading(self, batch: _Batch, numbers: Mapping[TurnKey, Any]) -> list[list[tuple[int, float]]]:
        """(column, number) of every place, by reading."""
        try:
            return [
                [
                    (column, float(numbers[key][token] if self.reader.per_token else numbers[key]))
                    for _, column, key, token in reading.places
                ]
                for reading in batch.readings
            ]
        except KeyError as error:
            raise TrainingError(f"credit gave no return for {error.args[0]}") from None

    def _follow(self, batch: _Batch, target_of: list[list[tuple[int, float]]], reduce: Any) -> None:
        if not self.settings.normalise:
            return
        sums = torch.zeros(3, len(self.agents), dtype=torch.float64, device=self.encoder.device)
        flat = [pair for pairs in target_of for pair in pairs]
        column = torch.tensor([c for c, _ in flat], device=sums.device)
        number = torch.tensor([n for _, n in flat], dtype=torch.float64, device=sums.device)
        for row, values in enumerate((torch.ones_like(number), number, number**2)):
            sums[row].index_add_(0, column, values)
        count, total, squares = reduce(sums)
        self.head.follow(count, total, squares, self.settings.memory)

    def _explained(self, target_of: Any, old_of: Any, reduce: Any) -> float:
        """1 − Var(R − V) / Var(R), each agent's variance about its own mean; 0 where the returns do not vary."""
        sums = torch.zeros(5, len(self.agents), dtype=torch.float64)
        for targets, olds in zip(target_of, old_of, strict=True):
            for (column, target), (_, old) in zip(targets, olds, strict=True):
                error = target - old
                sums[:, column] += torch.tensor([1.0, target, target**2, error, error**2], dtype=torch.float64)
        n, target, target2, error, error2 = reduce(sums.to(self.encoder.device)).cpu()
        n = n.clamp(min=1)
        variance = (target2 / n - (target / n) ** 2).sum()
        rest = (error2 / n - (error / n) ** 2).sum()
        return float(1 - rest / variance) if variance > 1e-8 else 0.0


def _cat(pairs: list[list[tuple[int, float]]], chosen: NDArray[np.intp], device: torch.device) -> Tensor:
    return torch.tensor([number for i in chosen for _, number in pairs[i]], dtype=torch.float32, device=device)
