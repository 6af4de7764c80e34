"""A compact recurrent world model: the baseline of the Dreamer and MAMBA family.

After Hafner et al. (DreamerV2, arXiv 2010.02193; DreamerV3, arXiv 2301.04104) and, per agent, Egorov & Shpilman (MAMBA,
arXiv 2205.15023). One network serves all agents; an input says whose view it is. Written here, not copied.

    h_t = GRU(h_{t-1}, z_{t-1}, a_{t-1})       deterministic state; a: own action and words, others' actions if known
    z_t ~ prior(z | h_t)                       G groups of C classes, 1% uniform mixed in, straight-through gradients
    z_t ~ posterior(z | h_t, o_t)              o: the view's fields and the words heard, one-hot
    o_t, reward, end, value <- (h_t, z_t)      one categorical head each; values as two-hot bins of later rewards
    others' actions <- (h_t, z_t)              before the transition, so that imagination can draw them first

Parts: `RecurrentSettings`, `Encoding` (values to indices and back), `RecurrentNetwork`, `RecurrentWorldModel`. Training
is in `recurrent_training.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from preconcert.core import (
    ImaginedStep,
    Judgement,
    ModelError,
    Move,
    Outcome,
    Turn,
    TurnRequest,
    uniforms,
)
from preconcert.world_models.experience import SILENCE, Moment, Setting, Values, words_of

_WEIGHTS, _SETTINGS = "recurrent.safetensors", "recurrent.json"
_SHARPNESS = 16.0
"""The posterior's last layer starts out this much larger than usual: latents are then an almost fixed code of what is
seen from the first step on. From nearly uniform ones the decoder learns nothing for hundreds of steps."""
_JUDGING_SAMPLES = 16
"""Draws of the latent that a judgement averages over."""


class RecurrentSettings(BaseModel):
    """Shape and training of the recurrent model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    state: PositiveInt = 128
    """Width of the deterministic state."""
    groups: PositiveInt = 16
    """Categorical latents."""
    classes: PositiveInt = 16
    """Classes of each."""
    hidden: PositiveInt = 128
    """Width of the layers between."""
    bins: PositiveInt = 11
    """Of the value."""
    steps: PositiveInt = 2000
    """Optimiser steps."""
    batch: PositiveInt = 16
    """Episodes per step, each as one agent lived it."""
    lr: float = Field(6e-3, gt=0)
    """Peak of Adam's learning rate; it decays to a tenth along a cosine."""
    unimix: float = Field(0.01, ge=0, lt=1)
    """Share of the uniform distribution in prior and posterior."""
    free_nats: float = Field(0.1, ge=0)
    """KL per step below which it carries no gradient."""
    prior_weight: float = Field(1.0, ge=0)
    """Of the KL that moves the prior to the posterior."""
    posterior_weight: float = Field(0.1, ge=0)
    """Of the KL that moves the posterior to the prior."""


class Encoding:
    """Values as indices, and the sizes of all one-hot parts.

    Args:
        setting: of the task.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.fields = [{value: i for i, value in enumerate(each.choices)} for each in setting.view.fields]
        self.slots = [{word: i + 1 for i, word in enumerate(slot.choices)} for slot in setting.language.message]
        """Index 0 is silence."""
        self.actions = {action: i for i, action in enumerate(setting.language.actions)}
        self.agents = {agent: i for i, agent in enumerate(setting.agents)}
        self.others = len(setting.agents) - 1
        self.field_sizes = [len(each) for each in self.fields]
        self.word_sizes = [len(slot) + 1 for slot in self.slots]
        self.observed = [*self.field_sizes, *(self.word_sizes * self.others), len(self.agents)]
        """Sizes of the parts of an observation: fields, then words by other agent, then whose view it is."""
        self.moved = [len(self.actions), *self.word_sizes, *([len(self.actions) + 1] * self.others)]
        """Sizes of the parts of a move: action, words, then actions by other agent, index 0 for unknown."""

    def observation(self, agent: str, values: Values, heard: Sequence[str]) -> list[int]:
        """One index per part."""
        found = [place[value] for place, value in zip(self.fields, values, strict=True)]
        for words in heard:
            found += self.words(words)
        return [*found, self.agents[agent]]

    def words(self, said: str) -> list[int]:
        """One index per slot; silence for words that do not fill the slots."""
        parts = said.split()
        if len(parts) != len(self.slots):
            return [0] * len(self.slots)
        return [slot.get(word, 0) for slot, word in zip(self.slots, parts, strict=True)]

    def said(self, indices: Sequence[int]) -> str:
        """The inverse of `words`."""
        if not indices or any(index == 0 for index in indices):
            return SILENCE
        parts = zip(self.setting.language.message, indices, strict=True)
        return " ".join(slot.choices[index - 1] for slot, index in parts)

    def move(self, action: str, message: str | None, theirs: Sequence[str | None]) -> list[int]:
        """One index per part."""
        others = [0 if did is None else self.actions[did] + 1 for did in theirs]
        return [self.actions[action], *self.words(message or SILENCE), *others]


def one_hot(indices: Int[Tensor, "*batch parts"], sizes: Sequence[int]) -> Float[Tensor, "*batch width"]:
    """All parts beside one another."""
    offsets = torch.tensor(np.cumsum([0, *sizes[:-1]]), dtype=torch.long)
    found = torch.zeros(*indices.shape[:-1], sum(sizes))
    return found.scatter_(-1, indices + offsets, 1.0)


class RecurrentNetwork(nn.Module):
    """The layers; see the module's docstring for what they compute.

    Args:
        encoding: sizes.
        settings: widths.
        seed: of the weights.
    """

    def __init__(self, encoding: Encoding, settings: RecurrentSettings, seed: int) -> None:
        super().__init__()
        self.settings = settings
        latent, state, hidden = settings.groups * settings.classes, settings.state, settings.hidden
        agents = len(encoding.agents)
        self.heads = [
            *encoding.field_sizes,
            *(encoding.word_sizes * encoding.others),
            len(encoding.setting.rewards),
            2,
            settings.bins,
        ]
        with torch.device("meta"):  # made without drawing from torch's own random state, then filled from the seed
            self.observe = _mlp(sum(encoding.observed), hidden, hidden)
            self.posterior = _mlp(state + hidden, hidden, latent)
            self.prior = _mlp(state, hidden, latent)
            self.enter = nn.Linear(latent + sum(encoding.moved), hidden)
            self.cell = nn.GRUCell(hidden, state)
            self.decode = _mlp(state + latent + agents, hidden, sum(self.heads))
            self.others = _mlp(state + latent + agents, hidden, encoding.others * len(encoding.actions))
        self.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.weight.fill_(1.0)
                    module.bias.zero_()
                elif isinstance(module, nn.Linear | nn.GRUCell):
                    for parameter in module.parameters(recurse=False):
                        fan = parameter.shape[-1] if parameter.ndim > 1 else parameter.shape[0]
                        parameter.uniform_(-(fan**-0.5), fan**-0.5, generator=generator)
            last = self.posterior[-1]
            assert isinstance(last, nn.Linear)
            last.weight.mul_(_SHARPNESS)

    def mixed(self, logits: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch groups classes"]:
        """Probabilities of the latent, with a share of the uniform distribution."""
        shape = (*logits.shape[:-1], self.settings.groups, self.settings.classes)
        shares = F.softmax(logits.reshape(shape), -1)
        return (1 - self.settings.unimix) * shares + self.settings.unimix / self.settings.classes

    def infer(
        self, h: Float[Tensor, "batch state"], observed: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch groups classes"]:
        """Posterior probabilities, from an encoded observation."""
        return self.mixed(self.posterior(torch.cat([h, observed], -1)))

    def carry(
        self, h: Float[Tensor, "batch state"], z: Float[Tensor, "batch latent"], move: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch state"]:
        """The next deterministic state."""
        return self.cell(F.silu(self.enter(torch.cat([z, move], -1))), h)


def _mlp(wide: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(wide, hidden), nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(hidden, out))


@dataclass(frozen=True, slots=True)
class _Belief:
    h: Tensor
    z: Tensor
    moment: Moment


class RecurrentWorldModel:
    """Imagines by its prior. Beliefs come from filtering an agent's past, in which the others' actions are unknown.

    What it says depends on the rest of a batch through rounding alone. Its judgements of views, rewards and ends are
    means over 16 fixed draws of the latent.

    Args:
        network: trained.
        setting: of the task.
        greedy: say the likeliest instead of drawing; its probabilities stay the same.
        returns: the smallest and the largest sum of later rewards, between which the value's bins lie.
    """

    def __init__(
        self, network: RecurrentNetwork, setting: Setting, returns: tuple[float, float], greedy: bool = False
    ) -> None:
        self.network = network.eval()
        self.setting = setting
        self.encoding = Encoding(setting)
        self.returns = returns
        self.greedy = greedy
        self._bins = torch.linspace(*returns, network.settings.bins)

    @torch.no_grad()
    def begin(self, requests: Sequence[TurnRequest], pasts: Sequence[Sequence[Turn]]) -> list[Any]:
        """Posterior states after each agent's past and its present view."""
        if not requests:
            return []
        network, encoding, view = self.network, self.encoding, self.setting.view
        h = torch.zeros(len(requests), network.settings.state)
        z = torch.zeros(len(requests), network.settings.groups * network.settings.classes)
        seen: list[list[list[int]]] = []
        moved: list[list[list[int]]] = []
        for request, past in zip(requests, pasts, strict=True):
            shown = [*((turn.observation, turn.inbox) for turn in past), (request.observation, request.inbox)]
            seen.append(
                [
                    encoding.observation(request.agent, view.parse(look.text), words_of(mail, request.others))
                    for look, mail in shown
                ]
            )
            unknown = [None] * encoding.others
            moved.append(
                [encoding.move(t.action, None if t.message is None else t.message.payload, unknown) for t in past]
            )
        for step in range(max(map(len, seen))):
            rows = [row for row, looks in enumerate(seen) if step < len(looks)]
            looks = one_hot(torch.tensor([seen[row][step] for row in rows]), encoding.observed)
            before = h[rows]
            if step:
                moves = one_hot(torch.tensor([moved[row][step - 1] for row in rows]), encoding.moved)
                before = network.carry(before, z[rows], moves)
            # The likeliest latent, not a draw: the same past always leads to the same belief.
            shares = network.infer(before, network.observe(looks))
            h[rows], z[rows] = before, F.one_hot(shares.argmax(-1), network.settings.classes).float().flatten(1)
        return [_Belief(h[row], z[row], Moment.of(request, view)) for row, request in enumerate(requests)]

    @torch.no_grad()
    def advance(self, beliefs: Sequence[Any], moves: Sequence[Move], seeds: Sequence[int]) -> list[ImaginedStep]:
        """One step of the prior each: the others' actions unless given, the next latent, and what it decodes to."""
        if not beliefs:
            return []
        network, encoding, setting = self.network, self.encoding, self.setting
        draw = _Draws(seeds, self.greedy)
        h, z, whose = self._stacked(beliefs)
        acts = self._others(h, z, whose)
        drawn = [draw.indices(acts[:, other]) for other in range(encoding.others)]
        theirs: list[dict[str, str]] = []
        for row, (belief, move) in enumerate(zip(beliefs, moves, strict=True)):
            given = move.others or {}
            theirs.append(
                {
                    other: given.get(other, setting.language.actions[int(drawn[number][row])])
                    for number, other in enumerate(belief.moment.others)
                }
            )
        h = network.carry(h, z, self._moves(moves, [list(each.values()) for each in theirs]))
        shares = network.mixed(network.prior(h))
        latent = torch.stack([draw.indices(shares[:, group]) for group in range(network.settings.groups)], 1)
        z = F.one_hot(latent, network.settings.classes).float().flatten(1)
        heads = self._decoded(h, z, whose)
        value = (heads[-1] * self._bins).sum(-1)
        found = [draw.indices(head) for head in heads[:-1]]
        return [
            self._step(row, belief, theirs[row], [int(each[row]) for each in found], float(value[row]), h[row], z[row])
            for row, belief in enumerate(beliefs)
        ]

    @torch.no_grad()
    def judge(
        self, beliefs: Sequence[Any], moves: Sequence[Move], outcomes: Sequence[Outcome]
    ) -> list[Judgement | None]:
        """By the decoder, averaged over draws from the prior that follows the others' real actions."""
        if not beliefs:
            return []
        network, encoding, view = self.network, self.encoding, self.setting.view
        h, z, whose = self._stacked(beliefs)
        acts = self._others(h, z, whose)
        real = [
            [outcome.others[other] for other in belief.moment.others]
            for belief, outcome in zip(beliefs, outcomes, strict=True)
        ]
        h = network.carry(h, z, self._moves(moves, real))
        shares = network.mixed(network.prior(h))
        generator = torch.Generator().manual_seed(0)
        points = torch.rand(_JUDGING_SAMPLES, 1, network.settings.groups, 1, generator=generator)
        latent = (shares.cumsum(-1) < points).sum(-1).clamp_max(network.settings.classes - 1)
        z = F.one_hot(latent, network.settings.classes).float().flatten(2)
        many = (_JUDGING_SAMPLES, *h.shape)
        heads = self._decoded(h.expand(many), z, whose.expand(_JUDGING_SAMPLES, *whose.shape))
        fields = len(encoding.fields)
        looks = torch.tensor(
            [
                [place[value] for place, value in zip(encoding.fields, view.parse(o.observation.text), strict=True)]
                for o in outcomes
            ]
        )
        logs = torch.zeros(_JUDGING_SAMPLES, len(outcomes))
        for head, real_values in zip(heads[:fields], looks.unbind(1), strict=True):
            logs += head.gather(-1, real_values.expand(_JUDGING_SAMPLES, -1)[..., None])[..., 0].log()
        nll = -(torch.logsumexp(logs, 0) - np.log(_JUDGING_SAMPLES))
        rewards, ends = heads[-3].mean(0), heads[-2].mean(0)[:, 1]
        actions = self.setting.language.actions
        return [
            Judgement(
                float(nll[row]),
                float(rewards[row, self.setting.reward_index(outcome.reward)]),
                float(ends[row]),
                {
                    other: dict(zip(actions, acts[row, number].tolist(), strict=True))
                    for number, other in enumerate(belief.moment.others)
                },
            )
            for row, (belief, outcome) in enumerate(zip(beliefs, outcomes, strict=True))
        ]

    def finish(self, episode: str) -> None:
        """Nothing is held."""

    def save(self, folder: Path) -> None:
        """Weights and everything needed to use them."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.network.state_dict().items()}, folder / _WEIGHTS)
        held = {
            "settings": self.network.settings.model_dump(mode="json"),
            "setting": self.setting.to_json(),
            "returns": list(self.returns),
        }
        (folder / _SETTINGS).write_text(json.dumps(held), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, greedy: bool = False) -> RecurrentWorldModel:
        """The inverse of `save`.

        Raises:
            ModelError: the folder holds no recurrent model.
        """
        if not (folder / _SETTINGS).is_file() or not (folder / _WEIGHTS).is_file():
            raise ModelError(f"{str(folder)!r} holds no recurrent world model: {_SETTINGS} or {_WEIGHTS} is missing")
        held = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        setting = Setting.from_json(held["setting"])
        network = RecurrentNetwork(Encoding(setting), RecurrentSettings.model_validate(held["settings"]), 0)
        network.load_state_dict(load_file(folder / _WEIGHTS))
        low, high = held["returns"]
        return cls(network, setting, (low, high), greedy)

    def _stacked(self, beliefs: Sequence[_Belief]) -> tuple[Tensor, Tensor, Tensor]:
        whose = torch.tensor([self.encoding.agents[belief.moment.agent] for belief in beliefs])
        return (
            torch.stack([belief.h for belief in beliefs]),
            torch.stack([belief.z for belief in beliefs]),
            F.one_hot(whose, len(self.encoding.agents)).float(),
        )

    def _moves(self, moves: Sequence[Move], theirs: Sequence[Sequence[str]]) -> Tensor:
        rows = [
            self.encoding.move(move.action, move.message, did) for move, did in zip(moves, theirs, strict=True)
        ]
        return one_hot(torch.tensor(rows), self.encoding.moved)

    def _others(self, h: Tensor, z: Tensor, whose: Tensor) -> Float[Tensor, "batch others actions"]:
        logits = self.network.others(torch.cat([h, z, whose], -1))
        return F.softmax(logits.reshape(len(h), self.encoding.others, len(self.encoding.actions)), -1)

    def _decoded(self, h: Tensor, z: Tensor, whose: Tensor) -> list[Tensor]:
        logits = self.network.decode(torch.cat([h, z, whose], -1))
        return [F.softmax(part, -1) for part in logits.split(self.network.heads, -1)]

    def _step(
        self,
        row: int,
        belief: _Belief,
        theirs: dict[str, str],
        found: list[int],
        value: float,
        h: Tensor,
        z: Tensor,
    ) -> ImaginedStep:
        now, encoding, setting = belief.moment, self.encoding, self.setting
        fields, slots = len(encoding.fields), len(encoding.slots)
        choices = (each.choices for each in setting.view.fields)
        values = tuple(options[index] for options, index in zip(choices, found[:fields], strict=True))
        words = found[fields : fields + slots * encoding.others]
        heard = tuple(encoding.said(words[slots * number : slots * (number + 1)]) for number in range(encoding.others))
        # Whoever was heard once stays in the inbox.
        heard = tuple(new if new != SILENCE else old for new, old in zip(heard, now.heard, strict=True))
        done = bool(found[-1])
        then = Moment(now.agent, now.others, now.step + 1, values, heard)
        return ImaginedStep(
            setting.observation(now.agent, values, then.step),
            setting.inbox(now.agent, heard, now.others, then.step),
            theirs,
            setting.rewards[found[-2]],
            done,
            0.0 if done else value,
            _Belief(h, z, then),
        )


class _Draws:
    """Indices from probabilities, one stream of uniforms per row, so that rows do not depend on one another."""

    def __init__(self, seeds: Sequence[int], greedy: bool) -> None:
        self._seeds: NDArray[np.uint64] = np.array(seeds, dtype=np.uint64)
        self._greedy = greedy
        self._drawn = 0

    def indices(self, shares: Float[Tensor, "rows choices"]) -> Int[Tensor, " rows"]:
        """One draw per row; the likeliest if greedy."""
        if self._greedy:
            return shares.argmax(-1)
        points = torch.from_numpy(uniforms(self._seeds, self._drawn)).to(shares.dtype)[:, None]
        self._drawn += 1
        return (shares.cumsum(-1) < points).sum(-1).clamp_max(shares.shape[-1] - 1)
