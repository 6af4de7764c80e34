"""Training of the recurrent world model on whole episodes, as each agent lived them.

The loss of a step (DreamerV3's, with categorical heads): cross-entropies of the fields, the words heard, reward, end,
value and the others' actions, plus prior_weight · max(free, KL(sg(posterior) ‖ prior)) + posterior_weight · max(free,
KL(posterior ‖ sg(prior))). From a random step of each episode on the others' actions are given, as in an imagination
with known teammates; before it they are hidden, as in an agent's own past.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from preconcert.core import ConfigError, Episode, TaskLanguage, derive_seed
from preconcert.world_models.experience import SILENCE, Lived, Setting, lived_by
from preconcert.world_models.recurrent import (
    Encoding,
    RecurrentNetwork,
    RecurrentSettings,
    RecurrentWorldModel,
    one_hot,
)

_MAX_GRAD_NORM = 10.0
_HIDDEN = -100
"""Marks targets that carry no loss."""


@dataclass(frozen=True, slots=True)
class _Data:
    """Episodes as tensors, padded to the longest."""

    observed: Tensor
    """(episodes, T + 1, parts), indices."""
    moved: Tensor
    """(episodes, T, parts), indices, the others' actions filled in."""
    targets: Tensor
    """(episodes, T + 1, heads): what each categorical head but the value should say, `_HIDDEN` where nothing."""
    values: Tensor
    """(episodes, T + 1): sums of later rewards."""
    valued: Tensor
    """(episodes,): 1 where values are learned from, else 0."""
    theirs: Tensor
    """(episodes, T, others): the others' actions, `_HIDDEN` after the end."""
    lengths: Tensor
    """(episodes,): views per episode."""


def train_recurrent(
    episodes: Sequence[Episode],
    language: TaskLanguage,
    settings: RecurrentSettings | None = None,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
    valued: Sequence[bool] | None = None,
) -> RecurrentWorldModel:
    """Train from nothing.

    Args:
        episodes: what it learns from.
        language: of the task.
        settings: shape and training.
        seed: of weights, batches and latents.
        on_step: called with (steps done, loss).
        valued: the episodes that teach what a moment is worth. What random play earns is no value of a team; by default
            all do.

    Raises:
        ConfigError: no episodes, none of them valued, or a task without a view.
    """
    settings = settings or RecurrentSettings()
    setting = Setting.of(episodes, language)
    encoding = Encoding(setting)
    counted = [True] * len(episodes) if valued is None else list(valued)
    if len(counted) != len(episodes) or not any(counted):
        raise ConfigError(f"valued: {sum(counted)} of {len(counted)} marks are set, for {len(episodes)} episodes")
    lives = [lived_by([episode], setting.view) for episode in episodes]
    marks = [mark for mark, own in zip(counted, lives, strict=True) for _ in own]
    data = _tensors([life for own in lives for life in own], marks, encoding)
    worth = data.values[data.valued > 0]
    low, high = float(worth.min()), float(worth.max())
    if high <= low:
        high = low + 1.0
    network = RecurrentNetwork(encoding, settings, derive_seed(seed, "weights") % 2**31)
    generator = torch.Generator().manual_seed(derive_seed(seed, "batches") % 2**31)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr, eps=1e-7)
    bins = torch.linspace(low, high, settings.bins)
    network.train()
    for step in range(settings.steps):
        rows = torch.randint(len(data.lengths), (settings.batch,), generator=generator)
        rate = settings.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / settings.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20)
        loss = _loss(network, encoding, data, rows, bins, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), _MAX_GRAD_NORM)
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, loss.item())
    return RecurrentWorldModel(network, setting, (low, high))


def _loss(
    network: RecurrentNetwork,
    encoding: Encoding,
    data: _Data,
    rows: Tensor,
    bins: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Mean over the steps of a batch."""
    settings = network.settings
    lengths = data.lengths[rows]
    longest = int(lengths.max())
    looks = data.observed[rows, :longest]
    moves = data.moved[rows, : longest - 1].clone()
    given_from = (torch.rand(len(rows), generator=generator) * lengths).long()
    hidden = torch.arange(longest - 1)[None, :] < given_from[:, None]
    first_other = 1 + len(encoding.slots)
    moves[..., first_other:][hidden] = 0
    encoded = network.observe(one_hot(looks, encoding.observed))
    move_hot = one_hot(moves, encoding.moved)
    latent_shape = (len(rows), settings.groups, settings.classes)
    noise = -torch.log(-torch.log(torch.rand(longest, *latent_shape, generator=generator).clamp(1e-6, 1 - 1e-6)))
    h = torch.zeros(len(rows), settings.state)
    z = torch.zeros(len(rows), settings.groups * settings.classes)
    states, latents, posteriors = [], [], []
    for t in range(longest):
        if t:
            h = network.carry(h, z, move_hot[:, t - 1])
        shares = network.infer(h, encoded[:, t])
        hard = F.one_hot((shares.detach().log() + noise[t]).argmax(-1), settings.classes).float()
        z = (hard + shares - shares.detach()).flatten(1)
        states.append(h)
        latents.append(z)
        posteriors.append(shares)
    deep, latent, posterior = torch.stack(states, 1), torch.stack(latents, 1), torch.stack(posteriors, 1)
    prior = network.mixed(network.prior(deep))
    there = (torch.arange(longest)[None, :] < lengths[:, None]).float()
    whose = F.one_hot(looks[..., -1], len(encoding.agents)).float()
    both = torch.cat([deep, latent, whose], -1)

    parts = network.decode(both).split(network.heads, -1)
    targets = data.targets[rows, :longest]
    total = torch.zeros(len(rows), longest)
    for number, logits in enumerate(parts[:-1]):
        total = total + F.cross_entropy(
            logits.transpose(1, 2), targets[..., number], ignore_index=_HIDDEN, reduction="none"
        )
    worth = two_hot(data.values[rows, :longest], bins)
    total = total - data.valued[rows][:, None] * (worth * F.log_softmax(parts[-1], -1)).sum(-1)

    acts = network.others(both[:, :-1]).reshape(len(rows), longest - 1, encoding.others, len(encoding.actions))
    guessed = F.cross_entropy(
        acts.permute(0, 3, 1, 2), data.theirs[rows, : longest - 1], ignore_index=_HIDDEN, reduction="none"
    ).sum(-1)
    total = total + F.pad(guessed, (0, 1))

    to_prior = _divergence(posterior.detach(), prior).clamp_min(settings.free_nats)
    to_posterior = _divergence(posterior, prior.detach()).clamp_min(settings.free_nats)
    total = total + settings.prior_weight * to_prior + settings.posterior_weight * to_posterior
    return (total * there).sum() / there.sum()


def two_hot(values: Tensor, bins: Tensor) -> Tensor:
    """Each value as weights of the two bins around it.

    Args:
        values: any shape.
        bins: ascending, evenly spaced.

    Returns:
        The values' shape with one more dimension, of the bins.
    """
    place = (values.clamp(float(bins[0]), float(bins[-1])) - bins[0]) / (bins[1] - bins[0])
    return (1 - (place[..., None] - torch.arange(len(bins))).abs()).clamp_min(0.0)


def _divergence(one: Tensor, other: Tensor) -> Tensor:
    """KL in nats, summed over groups."""
    return (one * (one.log() - other.log())).sum((-2, -1))


def _tensors(lives: Sequence[Lived], valued: Sequence[bool], encoding: Encoding) -> _Data:
    if not lives:
        raise ConfigError("the episodes hold no turn")
    count, longest = len(lives), max(life.steps for life in lives)
    others, slots, fields = encoding.others, len(encoding.slots), len(encoding.fields)
    observed = np.zeros((count, longest + 1, len(encoding.observed)), dtype=np.int64)
    moved = np.zeros((count, longest, len(encoding.moved)), dtype=np.int64)
    targets = np.full((count, longest + 1, fields + slots * others + 2), _HIDDEN, dtype=np.int64)
    values = np.zeros((count, longest + 1), dtype=np.float32)
    theirs = np.full((count, longest, others), _HIDDEN, dtype=np.int64)
    for row, life in enumerate(lives):
        sums, left = [], 0.0
        for reward in reversed(life.rewards):
            sums.append(left)
            left += reward
        values[row, : life.steps + 1] = [left, *reversed(sums)]
        for t in range(life.steps + 1):
            heard = life.heard[t] if t < life.steps else (SILENCE,) * others
            look = encoding.observation(life.agent, life.views[t], heard)
            observed[row, t] = look
            targets[row, t, :fields] = look[:fields]
            if t < life.steps:
                targets[row, t, fields : fields + slots * others] = look[fields:-1]
                moved[row, t] = encoding.move(life.actions[t], life.messages[t], life.theirs[t])
                theirs[row, t] = [encoding.actions[did] for did in life.theirs[t]]
            if t:
                targets[row, t, -2] = encoding.setting.reward_index(life.rewards[t - 1])
                targets[row, t, -1] = int(life.ended and t == life.steps)
    return _Data(
        torch.from_numpy(observed),
        torch.from_numpy(moved),
        torch.from_numpy(targets),
        torch.from_numpy(values),
        torch.tensor(valued, dtype=torch.float32),
        torch.from_numpy(theirs),
        torch.tensor([life.steps + 1 for life in lives]),
    )
