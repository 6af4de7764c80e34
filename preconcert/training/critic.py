"""The critic: what a team's turn is worth, read off the whole truth (centralised) or off the agent's own prompt.

A critic is an adapter and a linear head on the shared base, or a model of its own. It trains on returns and is never
used when acting. Its parameters are disjoint from the policy's, so its update is a step of its own beside TRL's.

Parts: `Critic`, `value_losses`, the encoders, and `Processes`, by which several fit one critic. Its settings are in
`critic_settings.py`, what is read for which turn in `critic_reader.py`, the head in `value_head.py`. Which returns it
is fitted to is credit's business.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from preconcert.core import Episode, TrainingError, derive_seed
from preconcert.models import TransformersModel, load_checkpoint, route_rows
from preconcert.training.credit import TurnKey
from preconcert.training.critic_reader import CriticReader, Reading
from preconcert.training.critic_settings import CriticModel, CriticSettings
from preconcert.training.value_head import ValueHead

ADAPTER = "critic"
"""The critic's adapter on the shared base."""


class _Encoder(Protocol):
    """Hidden states under the critic's weights."""

    width: int
    net: Any

    @property
    def device(self) -> torch.device: ...

    def parameters(self) -> dict[str, nn.Parameter]: ...

    def open(self, rows: int) -> AbstractContextManager[Any]:
        """Held during forward and backward passes over so many rows."""
        ...

    def hidden(self, ids: Int[Tensor, "rows tokens"], mask: Int[Tensor, "rows tokens"]) -> Tensor: ...


class _SharedEncoder:
    """An adapter on the policy's base."""

    def __init__(self, model: TransformersModel, seed: int) -> None:
        if ADAPTER in model.adapters:
            raise TrainingError(f"the critic's adapter is called {ADAPTER!r}, and the model has one of that name")
        model.add_adapter(ADAPTER, seed)
        for parameter in model.adapter_parameters(ADAPTER).values():
            parameter.requires_grad_(False)
        self.model = model
        self.net = model.base
        self.width = model.base.config.get_text_config().hidden_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.model.adapter_parameters(ADAPTER)

    def open(self, rows: int) -> AbstractContextManager[Any]:
        return route_rows(self.net, [ADAPTER] * rows)

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        return _last_hidden(self.net, ids, mask)


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

    def open(self, rows: int) -> AbstractContextManager[Any]:
        return nullcontext()

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        return _last_hidden(self.net, ids, mask)


def _last_hidden(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


class Processes(Protocol):
    """Those that fit one critic together."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all processes; the argument stays as it is."""
        ...

    def gather(self, numbers: Int[Tensor, " n"]) -> Int[Tensor, " all"]:
        """Everyone's numbers, none of them negative, in any order."""
        ...


class Alone:
    """One process."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Its own."""
        return tensor

    def gather(self, numbers: Tensor) -> Tensor:
        """Its own."""
        return numbers


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
        learners: see `CriticReader`.
        rows: sequences per forward pass without gradients.

    Raises:
        TrainingError: the model has an adapter of the critic's name, or a `separate` critic has nothing to start from.
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
        learners: Collection[str] | None = None,
        rows: int = 256,
    ) -> None:
        self.settings = settings
        self.agents = tuple(agents)
        self.seed = seed
        self.rows = rows
        self.reader = CriticReader(model.tokenizer, agents, settings.context, acted, per_token, learners)
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
        with torch.no_grad(), _without_dropout(self.encoder.net):
            for start in range(0, len(readings), self.rows):
                part = readings[start : start + self.rows]
                with self.encoder.open(len(part)):
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
        processes: Processes | None = None,
    ) -> dict[str, float]:
        """Learn the returns of the rollout that `values` was last called on.

        L = ½ max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²), the mean over values, in normalised units (PPO's
        clipped value loss; MAPPO, arXiv 2103.01955).

        Args:
            returns: per turn, or per token of it.
            iteration: seeds the minibatches, which do not depend on how the rollout is divided among processes.
            processes: those that fit together; None for one alone.

        Returns:
            `value_loss`, `critic_grad_norm`, and of the returns before learning, `explained_variance/AGENT` for every
            agent whose returns vary, with their mean `explained_variance`.
        """
        batch = self._batch
        if batch is None:
            raise TrainingError("the critic has read no rollout yet")
        s, device, team = self.settings, self.encoder.device, processes or Alone()
        targets = self._per_reading(batch, returns)
        olds = self._per_reading(batch, batch.values)
        self._follow(batch, targets, team)
        found = self._explained(batch, targets, olds, team)
        parameters = [*self.encoder.parameters().values(), *self.head.parameters()]
        losses: list[float] = []
        norms: list[float] = []
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            for epoch in range(s.epochs):
                for chosen in self._minibatches(batch, (iteration, epoch), team):
                    count = sum(len(targets[i]) for i in chosen)
                    everything = float(team.sum(torch.tensor(float(count), device=device)).clamp(min=1))
                    loss = torch.zeros((), device=device)
                    self.optimizer.zero_grad()
                    if count:
                        with self.encoder.open(len(chosen)):
                            value, column = self._forward([batch.readings[i] for i in chosen])
                            target = self.head.normalised(_cat(targets, chosen, device), column)
                            old = self.head.normalised(_cat(olds, chosen, device), column)
                            loss = value_losses(value, old, target, s.clip).sum() / everything
                            loss.backward()
                    for parameter in parameters:
                        if parameter.grad is None:
                            parameter.grad = torch.zeros_like(parameter)
                        parameter.grad = team.sum(parameter.grad)
                    norms.append(float(nn.utils.clip_grad_norm_(parameters, s.max_grad_norm)))
                    self.optimizer.step()
                    losses.append(float(team.sum(loss.detach())))
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

    def _per_reading(self, batch: _Batch, numbers: Mapping[TurnKey, Any]) -> list[NDArray[np.float64]]:
        """The number of every place, by reading."""
        try:
            return [
                np.array(
                    [numbers[key][token] if self.reader.per_token else numbers[key] for _, _, key, token in r.places],
                    dtype=np.float64,
                )
                for r in batch.readings
            ]
        except KeyError as error:
            raise TrainingError(f"credit gave no return for {error.args[0]}") from None

    def _minibatches(self, batch: _Batch, seeds: tuple[int, int], team: Processes) -> list[list[int]]:
        """This process's part of each minibatch: all readings in an order drawn by their names, cut evenly."""
        drawn = [derive_seed(self.seed, "minibatches", *seeds, reading.name) for reading in batch.readings]
        everyone = np.sort(team.gather(torch.tensor(drawn, device=self.encoder.device)).cpu().numpy())
        places = np.searchsorted(everyone, np.array(drawn))
        order = np.argsort(places, kind="stable")
        number = places * self.settings.minibatches // max(len(everyone), 1)
        return [[int(i) for i in order if number[i] == part] for part in range(self.settings.minibatches)]

    def _follow(self, batch: _Batch, targets: list[NDArray[np.float64]], team: Processes) -> None:
        if self.settings.normalise:
            number = np.concatenate([*targets, np.zeros(0)])
            count, total, squares = self._sums(batch, (np.ones_like(number), number, number**2), team)
            self.head.follow(count, total, squares, self.settings.memory)

    def _explained(
        self, batch: _Batch, targets: list[NDArray[np.float64]], olds: list[NDArray[np.float64]], team: Processes
    ) -> dict[str, float]:
        """1 − Var(R − V) / Var(R) of each agent, about its own means."""
        target, old = (np.concatenate([*numbers, np.zeros(0)]) for numbers in (targets, olds))
        error = target - old
        sums = self._sums(batch, (np.ones_like(target), target, target**2, error, error**2), team).cpu().numpy()
        mean, mean2, rest, rest2 = sums[1:] / sums[0].clip(min=1)
        variance, left = mean2 - mean**2, rest2 - rest**2
        found = {
            agent: float(1 - left[column] / variance[column])
            for column, agent in enumerate(self.agents)
            if variance[column] > 1e-9 * max(1.0, float(mean2[column]))
        }
        overall = float(np.mean(list(found.values()))) if found else 0.0
        return {"explained_variance": overall, **{f"explained_variance/{agent}": v for agent, v in found.items()}}

    def _sums(self, batch: _Batch, numbers: Sequence[NDArray[np.float64]], team: Processes) -> Tensor:
        """Each row of numbers (one per place) summed by agent over all processes."""
        columns = np.array([column for r in batch.readings for _, column, _, _ in r.places], dtype=np.int64)
        sums = np.stack([np.bincount(columns, row, len(self.agents)) for row in numbers])
        return team.sum(torch.from_numpy(sums).to(self.encoder.device))


def value_losses(
    value: Float[Tensor, " n"], old: Float[Tensor, " n"], target: Float[Tensor, " n"], clip: float | None
) -> Float[Tensor, " n"]:
    """½ max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²); without ε, ½ (V − R)²."""
    error = (value - target) ** 2
    if clip is not None:
        error = torch.maximum(error, (old + (value - old).clamp(-clip, clip) - target) ** 2)
    return 0.5 * error


@contextmanager
def _without_dropout(net: nn.Module) -> Iterator[None]:
    training = [module for module in net.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _cat(numbers: Sequence[NDArray[np.float64]], chosen: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(np.concatenate([numbers[i] for i in chosen]), dtype=torch.float32, device=device)
