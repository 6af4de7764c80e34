"""The batches a world model learns from: sources mixed by share, endings often enough, its own outputs among them.

Parts: `WorldData` (rows of any batch by its number, all random choices from a seed), `check_length` (of rows),
`partners_of` (who plays in a source), `collate` (rows as tensors), `coverage` (what the sources have shown).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preconcert.core import ConfigError, Episode, Move, UnknownNameError, derive_seed
from preconcert.prompts import OWN_TEAM, PARTNERS, WorldFormat
from preconcert.training.world_rows import Step, WorldRow, world_row, world_steps
from preconcert.training.world_settings import WorldTraining
from preconcert.world_models import TokenWorldModel


def check_length(longest: int, recall: int, taken: int) -> None:
    """Are rows of up to so many tokens short enough for a model?

    Raises:
        ConfigError: they are not.
    """
    if longest > taken:
        raise ConfigError(
            f"world_model.recall={recall} makes rows of up to {longest} tokens, and the model takes {taken}: recall "
            "less, or give a starter more (starter.max_context)"
        )


def partners_of(source: str) -> str:
    """The kind of players whose episodes a source holds: the team itself, unless its name says otherwise."""
    return source if source in PARTNERS else OWN_TEAM


class _Source:
    """The steps of one source of episodes."""

    def __init__(self, episodes: Sequence[Episode], spelling: WorldFormat, partners: str) -> None:
        self.chains: list[list[Step]] = [
            chain
            for episode in episodes
            for chain in world_steps(episode, spelling.turns.memory, partners, spelling.recall)
        ]
        self.places = np.array([(c, i) for c, chain in enumerate(self.chains) for i in range(len(chain))])
        ending = np.array([step.ending for chain in self.chains for step in chain], dtype=bool)
        self.ending, self.plain = self.places[ending], self.places[~ending]


class WorldData:
    """Batches of rows by number.

    Args:
        sources: episodes by the name of their source; those that `settings.shares` does not draw from are left out.
        world: the model that learns; its present weights write what batches from its own outputs start from.
        settings: what is drawn.
        seed: every random choice follows from it, from the batch's number and from the model's weights.

    Raises:
        ConfigError: a source that is drawn from has no episodes.
        UnknownNameError: a share or a value source that is no source.
    """

    def __init__(
        self, sources: Mapping[str, Sequence[Episode]], world: TokenWorldModel, settings: WorldTraining, seed: int
    ) -> None:
        for name in settings.shares:
            if name not in sources:
                raise UnknownNameError("source of episodes", name, sources)
        self.names = tuple(name for name, share in settings.shares.items() if share > 0)
        for name in self.names:
            if not sources[name]:
                raise ConfigError(f"there are no episodes of the source {name!r}")
        shares = np.array([settings.shares[name] for name in self.names])
        self.shares = shares / shares.sum()
        self.world = world
        self.format: WorldFormat = world.format
        self.settings = settings
        self.seed = seed
        self.sources = {name: _Source(sources[name], self.format, partners_of(name)) for name in self.names}
        self.taken: int | None = getattr(world.model, "max_context", None)
        """Tokens of the longest row that the model takes, where it says so."""
        self._own: dict[int, list[WorldRow]] = {}

    def batch(self, number: int) -> list[WorldRow]:
        """The rows of one batch; half of them have the others' actions given.

        Raises:
            ConfigError: a row is longer than what the model takes.
        """
        settings = self.settings
        if self._is_own(number):
            if number not in self._own:
                later = range(number, settings.steps)
                self._make_own([n for n in later if self._is_own(n)][: settings.own_refresh])
            return self._own.pop(number)
        rng = np.random.default_rng(derive_seed(self.seed, "batch", number))
        rows = [
            self._row(rng, name, step, bool(place % 2), None, weight)
            for place, (name, step, weight) in enumerate(self._draw(rng))
        ]
        if self.taken is not None:
            check_length(max(len(row.ids) for row in rows), self.format.recall, self.taken)
        return rows

    def _is_own(self, number: int) -> bool:
        settings = self.settings
        every = settings.own_every
        return every > 0 and number >= settings.own_start * settings.steps and number % every == every - 1

    def _draw(self, rng: np.random.Generator) -> list[tuple[str, Step, float]]:
        """Transitions with their sources and weights: endings as often as is asked for, and lighter for it."""
        drawn: list[tuple[str, Step, float]] = []
        for which in rng.choice(len(self.names), size=self.settings.batch, p=self.shares):
            name = self.names[int(which)]
            source = self.sources[name]
            natural = len(source.ending) / len(source.places)
            wanted = min(1.0, max(natural, self.settings.ending_share)) if len(source.plain) else 1.0
            ends = len(source.ending) > 0 and rng.random() < wanted
            places = source.ending if ends else source.plain
            chain, index = places[int(rng.integers(len(places)))]
            weight = natural / wanted if ends else (1 - natural) / (1 - wanted)
            drawn.append((name, source.chains[chain][index], weight))
        return drawn

    def _row(
        self, rng: np.random.Generator, name: str, step: Step, given: bool, belief: Any, weight: float
    ) -> WorldRow:
        others = step.belief.others
        order = [others[int(index)] for index in rng.permutation(len(others))]
        dice = float(rng.random())
        valued = name in self.settings.value_sources
        return world_row(self.format, step, given, order, dice if valued else None, belief, weight)

    def _make_own(self, numbers: Sequence[int]) -> None:
        """The batches of these numbers: the real moves carried out on what the model imagines, and what really came.

        Half of the imaginations have the others' actions given, and so have their rows.
        """
        settings = self.settings
        rng = np.random.default_rng(derive_seed(self.seed, "own", numbers[0]))
        rows: dict[int, list[WorldRow]] = {number: [] for number in numbers}
        walks: list[tuple[int, str, list[Step], int, bool]] = []
        low, high = settings.own_steps
        lengths: list[int] = []
        for number in numbers:
            length = int(rng.integers(low, high + 1))
            for place in range(math.ceil(settings.batch / length)):
                name = self.names[int(rng.choice(len(self.names), p=self.shares))]
                chains = self.sources[name].chains
                chain = chains[int(rng.integers(len(chains)))]
                start = int(rng.integers(max(1, len(chain) - length)))
                walks.append((number, name, chain, start, bool(place % 2)))
                lengths.append(length)
        beliefs = [chain[start].belief for _, _, chain, start, _ in walks]
        live = [place for place, (_, _, chain, start, _) in enumerate(walks) if start + 1 < len(chain)]
        for ahead in range(1, high + 1):
            if not live:
                break
            moves = [_move(walks[place], ahead - 1) for place in live]
            seeds = [derive_seed(self.seed, "imagine", numbers[0], place, ahead) for place in live]
            steps = self.world.advance([beliefs[place] for place in live], moves, seeds)
            going: list[int] = []
            for place, imagined in zip(live, steps, strict=True):
                number, name, chain, start, given = walks[place]
                if imagined.malformed or imagined.done:
                    continue
                beliefs[place] = imagined.belief
                rows[number].append(self._row(rng, name, chain[start + ahead], given, imagined.belief, 1.0))
                if ahead < lengths[place] and start + ahead + 1 < len(chain):
                    going.append(place)
            live = going
        for number in numbers:
            # Imaginations that end too early leave gaps, which real transitions fill.
            missing = max(0, settings.batch - len(rows[number]))
            filler = [self._row(rng, name, step, bool(place % 2), None, weight)
                      for place, (name, step, weight) in enumerate(self._draw(rng)[:missing])]  # fmt: skip
            self._own[number] = rows[number][: settings.batch] + filler


def _move(walk: tuple[int, str, list[Step], int, bool], ahead: int) -> Move:
    """What the agent really did `ahead` steps into a walk."""
    _, _, chain, start, given = walk
    move = chain[start + ahead].move
    return move if given else Move(move.action, move.message)


def collate(rows: Sequence[WorldRow], pad: int) -> dict[str, Tensor]:
    """Right-padded tensors of shape (rows, tokens): `input_ids`, `attention_mask`, `kinds`; `row_weights` (rows)."""
    width = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    kinds = np.zeros((len(rows), width), dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)], mask[place, : len(row.ids)], kinds[place, : len(row.ids)] = row.ids, 1, row.kinds
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "kinds": torch.from_numpy(kinds),
        "row_weights": torch.tensor([row.weight for row in rows], dtype=torch.float32),
    }


def coverage(
    sources: Mapping[str, Sequence[Episode]], heldout: Mapping[str, Sequence[Episode]]
) -> dict[str, dict[str, float]]:
    """What the sources have shown of a task.

    Args:
        sources: episodes that are learned from, by the name of their source.
        heldout: episodes on other layouts, by the name of their source.

    Returns:
        By source, and for `all` of them: episodes, transitions, different pairs of (agent, view, action), different
        global states, and which share of the held-out transitions have a pair that it has shown.
    """
    later = [pair for episodes in heldout.values() for pair in _pairs(episodes)]
    found: dict[str, dict[str, float]] = {}
    everything = [episode for episodes in sources.values() for episode in episodes]
    for name, episodes in {**sources, "all": everything}.items():
        pairs = _pairs(episodes)
        known = set(pairs)
        found[name] = {
            "episodes": len(episodes),
            "transitions": len(pairs),
            "pairs": len(known),
            "states": len({state for episode in episodes for state in episode.states}),
            "heldout_pairs_seen": sum(pair in known for pair in later) / len(later) if later else math.nan,
        }
    return found


def _pairs(episodes: Sequence[Episode]) -> list[tuple[str, str, str]]:
    return [
        (agent, turn.observation.text, turn.action)
        for episode in episodes
        for agent, trajectory in episode.trajectories.items()
        for turn in trajectory.turns
    ]
