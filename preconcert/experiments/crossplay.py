"""Cross-play: every member of a population against every other, as a table, a file and a heat map.

Parts: `Entrant` (somebody who plays), `entrants_of` (a run's past, its end, its counters), `cross_play`, `CrossPlay`.
Where the game is small enough its pay-offs are exact (`exact_games.py`); elsewhere they are means over episodes, each
pair meeting in every seating.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from preconcert.agents import GenerativeTeam
from preconcert.core import ConfigError, Slot, Turn, TurnRequest, UnknownNameError
from preconcert.experiments.evaluation import Players, heldout_specs, play, sides_of
from preconcert.experiments.exact_games import ExactGame, GameValue, Strategy, exact_game
from preconcert.experiments.provenance import commit, machine, versions
from preconcert.training.json_file import write_json
from preconcert.training.league import FOLDER, Member
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter, Silent
from preconcert.training.rollout import SCRIPT
from preconcert.training.run_folder import load_recipe_of

_DPI = 130


@dataclass(frozen=True, slots=True)
class Entrant:
    """Somebody who plays any side."""

    label: str
    run: int | None
    """Which run's model writes; None for scripts."""
    player: str | None
    """An adapter of that run, or `script:NAME`; None for the adapters that the run's agents have."""


@dataclass(frozen=True, slots=True)
class CrossPlay:
    """Who wins what of whom."""

    labels: tuple[str, ...]
    returns: NDArray[np.float64]
    """Shape (entrants, entrants): what the row's side wins on average against the column's, over the seatings."""
    errors: NDArray[np.float64] | None
    """Standard errors of the means, where games were played."""
    worth: Mapping[str, GameValue]
    """By label, where the game is small enough."""
    task: str
    params: Mapping[str, Any]
    episodes: int | None
    """Per pair and seating; None where none was needed."""
    samples: int | None
    """Turns counted per view, where nothing was played and probabilities could only be counted."""

    @property
    def exact(self) -> bool:
        """Is nothing estimated?"""
        return self.episodes is None and self.samples is None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "task": self.task,
            "params": dict(self.params),
            "labels": list(self.labels),
            "exact": self.exact,
            "episodes": self.episodes,
            "samples": self.samples,
            "returns": self.returns.tolist(),
            "errors": None if self.errors is None else self.errors.tolist(),
            "worth": {label: asdict(found) for label, found in self.worth.items()},
            "versions": versions(),
            "commit": commit(),
            "machine": machine(),
        }

    def figure(self) -> Figure:
        """A heat map, rows against columns."""
        count = len(self.labels)
        size = 2.0 + 0.42 * count
        figure = Figure(figsize=(size + 1.2, size), layout="constrained")
        axis = figure.subplots()
        bound = float(np.abs(self.returns).max()) or 1.0
        signed = bool((self.returns < 0).any())
        image = axis.imshow(
            self.returns, cmap="RdBu" if signed else "viridis", vmin=-bound if signed else 0.0, vmax=bound
        )
        axis.set_xticks(range(count), self.labels, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(count), self.labels, fontsize=8)
        if count <= 14:
            for row in range(count):
                for column in range(count):
                    value = self.returns[row, column]
                    dark = abs(value) > 0.6 * bound if signed else value < 0.5 * bound
                    axis.text(
                        column, row, f"{value:.2f}", ha="center", va="center", fontsize=7,
                        color="white" if dark else "black",
                    )  # fmt: skip
        axis.set_xlabel("against", fontsize=9)
        axis.set_title(f"{self.task}: return of the row's side", fontsize=10)
        figure.colorbar(image, ax=axis, shrink=0.8)
        return figure


class Guests:
    """A policy that hands each request to the run whose adapter the cast names, as `NUMBER/ADAPTER`."""

    version = -1

    def __init__(self, teams: Sequence[GenerativeTeam]) -> None:
        self.teams = list(teams)

    def decide(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        """One turn per request, one batch per run."""
        turns: dict[int, Turn] = {}
        for number, team in enumerate(self.teams):
            mine = [place for place, request in enumerate(requests) if _run_of(request) == number]
            asked = [
                replace(requests[place], player=(requests[place].player or "").partition("/")[2] or None)
                for place in mine
            ]
            if asked:
                turns.update(zip(mine, team.decide(asked), strict=True))
        return [turns[place] for place in range(len(requests))]

    def message_slots(self, others: Sequence[str]) -> tuple[Slot, ...]:
        """The form of messages, which all runs share.

        Raises:
            ConfigError: they do not.
        """
        forms = [team.message_slots(others) for team in self.teams]
        for number, form in enumerate(forms):
            if form != forms[0]:
                raise ConfigError(
                    f"the runs talk in different forms: the first in {_form(forms[0])}, number {number + 1} in "
                    f"{_form(form)}; cross-play is between runs of one agent.codec"
                )
        return forms[0]

    def finish(self, episode: str) -> None:
        """Every run lets go."""
        for team in self.teams:
            team.finish(episode)


def entrants_of(run: Path, number: int, prefix: str = "") -> list[Entrant]:
    """A run's members: snapshots by adapter and age, then the adapters at the end.

    Args:
        run: the run folder.
        number: of the run among those that play.
        prefix: goes before every label.
    """
    recipe = load_recipe_of(run)
    folders = sorted((run / FOLDER).iterdir()) if (run / FOLDER).is_dir() else []
    held = [Member.parse(path.name) for path in folders if not path.name.startswith(".")]
    held.sort(key=lambda member: (member.source, member.iteration))
    found = [Entrant(prefix + member.name, number, member.name) for member in held]
    if recipe.league is None:
        return [*found, Entrant(prefix + "trained", number, None)]
    names = sorted(path.name for path in (run / "adapters").iterdir() if not path.name.startswith("."))
    for name in names:
        last = max((place for place, member in enumerate(held) if member.source == name), default=len(found) - 1)
        place = 1 + next((i for i, e in enumerate(found) if e.player == held[last].name), last) if held else len(found)
        found.insert(place, Entrant(f"{prefix}{name}, trained", number, name))
    return found


def cross_play(
    runs: Sequence[Path],
    scripts: Sequence[str] | None = None,
    episodes: int = 100,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> CrossPlay:
    """Play all pairs.

    Args:
        runs: finished run folders of one task with the same parameters.
        scripts: players of the task that play too; None for all of its opponents.
        episodes: per pair and seating, where they are played.
        seed: of the task instances and of every choice.
        reporter: receives progress.

    Raises:
        ConfigError: the runs play different games, the game has not two sides, or nobody is there to meet.
        UnknownNameError: a script that the task does not have.
    """
    reporter = reporter or Silent()
    recipes = [load_recipe_of(run) for run in runs]
    first = recipes[0]
    for run, recipe in zip(runs, recipes, strict=True):
        if (recipe.task, dict(recipe.params)) != (first.task, dict(first.params)):
            raise ConfigError(f"{str(run)!r} plays {recipe.task} {dict(recipe.params)}, {str(runs[0])!r} does not")
    players = [Players(run, recipe) for run, recipe in zip(runs, recipes, strict=True)]
    env = players[0].env
    sides = sides_of(first, env)
    if len(sides) != 2:
        raise ConfigError(f"cross-play is between two sides; {first.task} has {len(sides)} here")
    names = [path.name for path in runs] if len({path.name for path in runs}) == len(runs) else [str(p) for p in runs]
    entrants = [
        entrant
        for number, (run, name) in enumerate(zip(runs, names, strict=True))
        for entrant in entrants_of(run, number, f"{name}: " if len(runs) > 1 else "")
    ]
    known = tuple(getattr(env, "opponents", {}))
    for script in scripts or ():
        if script not in known:
            raise UnknownNameError("script", script, known)
    entrants += [Entrant(script, None, SCRIPT + script) for script in (known if scripts is None else scripts)]
    if len(entrants) < 2:
        raise ConfigError("there is nobody to meet: the runs have no league, and no scripts are given")
    for each in players:
        each.load_league()
    teams = [each.team() for each in players]
    game = exact_game(first, sides)
    strategies = _strategies(game, entrants, teams) if game is not None else None
    if game is not None and strategies is not None:
        return _reckoned(first, game, entrants, strategies)
    return _played(first, sides, entrants, teams, episodes, seed, reporter)


def _strategies(
    game: ExactGame, entrants: Sequence[Entrant], teams: Sequence[GenerativeTeam]
) -> list[Strategy] | None:
    """Everyone's strategy; None if somebody's cannot be written down."""
    found: list[Strategy] = []
    for entrant in entrants:
        if entrant.run is None:
            strategy = game.script((entrant.player or "").removeprefix(SCRIPT))
        else:
            strategy = game.ask(teams[entrant.run], entrant.player)
        if strategy is None:
            return None
        found.append(strategy)
    return found


def _reckoned(
    recipe: Recipe, game: ExactGame, entrants: Sequence[Entrant], strategies: Sequence[Strategy]
) -> CrossPlay:
    count = len(entrants)
    returns = np.zeros((count, count))
    for row, mine in enumerate(strategies):
        for column, other in enumerate(strategies):
            returns[row, column] = (game.returns([mine, other])[0] + game.returns([other, mine])[1]) / 2
    counts = [strategy.samples for strategy in strategies if strategy.samples is not None]
    return CrossPlay(
        labels=tuple(entrant.label for entrant in entrants),
        returns=returns,
        errors=None,
        worth={entrant.label: game.worth(table) for entrant, table in zip(entrants, strategies, strict=True)},
        task=recipe.task,
        params=recipe.params,
        episodes=None,
        samples=min(counts) if counts else None,
    )


def _played(
    recipe: Recipe,
    sides: Sequence[Sequence[str]],
    entrants: Sequence[Entrant],
    teams: Sequence[GenerativeTeam],
    episodes: int,
    seed: int,
    reporter: Reporter,
) -> CrossPlay:
    count = len(entrants)
    returns, errors = np.zeros((count, count)), np.zeros((count, count))
    guests, specs = Guests(teams), heldout_specs(recipe, episodes, seed)
    reporter.stage("cross-play", count * count)
    for row, mine in enumerate(entrants):
        for column, other in enumerate(entrants):
            # The instances are the same for all seats: their luck is shared, so a mean over seats is one figure.
            found = np.zeros((len(sides), len(specs)))
            for seat, side in enumerate(sides):
                seated = [mine if place == seat else other for place in range(len(sides))]
                cast = {a: _player(each) for each, agents in zip(seated, sides, strict=True) for a in agents}
                played = play([replace(spec, cast=cast) for spec in specs], guests, recipe.channel, seed)
                for number, episode in enumerate(played):
                    found[seat, number] = np.mean([episode.trajectories[agent].total_reward for agent in side])
            by_instance = found.mean(axis=0)
            returns[row, column] = float(by_instance.mean())
            errors[row, column] = float(np.std(by_instance, ddof=1) / np.sqrt(len(specs)))
            reporter.advance(row * count + column + 1)
    labels = tuple(entrant.label for entrant in entrants)
    return CrossPlay(labels, returns, errors, {}, recipe.task, recipe.params, episodes, None)


def write_cross_play(found: CrossPlay, folder: Path) -> tuple[Path, Path]:
    """`crossplay.json` and `crossplay.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "crossplay.json", folder / "crossplay.png"
    write_json(files[0], json.loads(json.dumps(found.to_json())))
    found.figure().savefig(files[1], dpi=_DPI)
    return files


def _form(slots: Sequence[Slot]) -> str:
    return " ".join(f"{slot.name} ({len(slot.choices)} words)" for slot in slots) or "no words"


def _player(entrant: Entrant) -> str:
    return entrant.player or "" if entrant.run is None else f"{entrant.run}/{entrant.player or ''}"


def _run_of(request: TurnRequest) -> int:
    return int((request.player or "0").partition("/")[0])
