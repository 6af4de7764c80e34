"""Replays: finished episodes as people read them, and the page that plays them.

Parts: `Replay` and its frames, `replay_of` (an episode plus the board that its environment draws), `page` (one HTML
file without anything to load). What an agent foretold stands beside what came.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from preconcert.core import Env, Episode, StopReason, Turn
from preconcert.envs import make_env
from preconcert.experiments.curve import Curve
from preconcert.experiments.plans import Weighed, weighed
from preconcert.prompts import END_OF_PLAY
from preconcert.training.hindsight import reward_word
from preconcert.training.measures import perceived

_HEADLINE = {
    "trained": "trained team, sampled",
    "trained-greedy": "trained team, greedy",
    "trained-shuffled": "sampled, messages shuffled",
    "warm": "warm start alone, sampled",
    "scripted": "the imperfect script it imitated",
}
"""Arms that the page shows, and what it calls them."""


@dataclass(frozen=True, slots=True)
class Heard:
    """One line of an inbox."""

    sender: str
    words: str


@dataclass(frozen=True, slots=True)
class Guess:
    """What an agent expected another one to do, and what that one did."""

    about: str
    actions: tuple[str, ...]
    real: tuple[str, ...]
    """As far as it is known."""
    right: bool | None
    """None while that is not known."""
    known: bool
    """Had the other been seen or heard? Otherwise the guess is in the dark and counts in no measure."""
    probability: float


@dataclass(frozen=True, slots=True)
class Foreseen:
    """One foretold word, and the word that came."""

    slot: str
    expected: str
    came: str
    right: bool


@dataclass(frozen=True, slots=True)
class View:
    """One agent's side of a step."""

    agent: str
    saw: str
    heard: tuple[Heard, ...]
    intends: tuple[Guess, ...]
    foresees: tuple[Foreseen, ...]
    says: str | None
    bits: float | None
    """Of the message; None for silence."""
    does: str
    malformed: bool
    reward: float
    weighed: tuple[Weighed, ...] = ()
    """What a planner weighed, best first; empty without one."""
    alone: bool = False
    """Having heard nothing, it acts as the silent team that it falls back on would."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One step: the world before it, and what everybody made of it."""

    step: int
    board: tuple[str, ...]
    """One string per row; empty where the environment draws none."""
    state: str
    views: tuple[View, ...]
    """Empty in the last frame, which shows how it ended."""


@dataclass(frozen=True, slots=True)
class Replay:
    """One episode to look at."""

    task: str
    seed: int
    split: str
    success: bool | None
    truncated: bool
    mean_return: float
    """Mean over agents."""
    agents: tuple[str, ...]
    legend: str
    """How to read the board."""
    frames: tuple[Frame, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def replay_of(episode: Episode, running: bool = False, alone: Callable[[Turn], bool] | None = None) -> Replay:
    """An episode, step by step. Its environment is played through once more for the board.

    Args:
        episode: what was played.
        running: it goes on; what was foretold of steps that nobody has taken is neither right nor wrong yet.
        alone: says of a turn that it is a silent team's; None where there is none to fall back on.
    """
    env = make_env(episode.task, episode.params, episode.seed, episode.split)
    draw: Callable[[], list[str]] | None = getattr(env, "board", None)
    env.reset()
    frames: list[Frame] = []
    agents = tuple(episode.trajectories)
    for step in range(episode.steps + 1):
        over = step == episode.steps
        views = () if over else tuple(_view(episode, agent, step, env, running, alone) for agent in agents)
        board = tuple(str(row) for row in draw()) if draw is not None else ()
        frames.append(Frame(step, board, episode.states[step], views))
        if not over:
            env.step({agent: episode.trajectories[agent].turns[step].action for agent in agents})
    trajectories = episode.trajectories.values()
    return Replay(
        task=episode.task,
        seed=episode.seed,
        split=episode.split,
        success=episode.success,
        truncated=any(each.stop_reason is StopReason.TRUNCATED for each in trajectories),
        mean_return=sum(each.total_reward for each in trajectories) / len(trajectories),
        agents=agents,
        legend=" ".join((getattr(draw, "__doc__", None) or "").strip().split("\n\n")[0].split()),
        frames=tuple(frames),
    )


def page(
    title: str,
    summary: Sequence[tuple[str, str]],
    figures: Sequence[tuple[str, str, str]],
    figures_note: str,
    curve: Curve | None,
    replays: Sequence[Replay],
) -> str:
    """One self-contained HTML page.

    Args:
        title: the heading.
        summary: label and text of each fact below the heading.
        figures: label, number and small print of each headline figure.
        figures_note: where the figures come from.
        curve: how learning went; None where there is no log.
        replays: what the player offers, in this order.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined, autoescape=True
    )
    data = json.dumps([replay.to_json() for replay in replays], separators=(",", ":"))
    return templates.get_template("replay.html.jinja").render(
        title=title,
        summary=summary,
        figures=figures,
        figures_note=figures_note,
        curve=curve,
        replays=replays,
        data=Markup(data.replace("<", "\\u003c").replace("&", "\\u0026")),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def headline(saved: Mapping[str, Any] | None, ceiling: float | None) -> tuple[list[tuple[str, str, str]], str]:
    """The page's figures, and a line on where they come from.

    Args:
        saved: an evaluation's JSON; None where there is none yet.
        ceiling: the best success without messages, where it is known.
    """
    figures: list[tuple[str, str, str]] = []
    arms: Mapping[str, Any] = saved["arms"] if saved is not None else {}
    for name, label in _HEADLINE.items():
        found = arms.get(name)
        if found is not None and found["success_rate"] is not None:
            low, high = found["success_ci95"]
            figures.append((label, f"{found['success_rate']:.1%}", f"95%: {low:.0%} to {high:.0%}"))
    if figures and ceiling is not None:
        figures.append(("the most without messages", f"{ceiling:.1%}", "proven for the task"))
    if saved is None:
        return figures, "Not evaluated yet; after `preconcert eval`, `preconcert watch` puts its figures here."
    count, seed = saved["episodes"], saved["seed"]
    return figures, f"Success over {count} held-out instances, the same for every figure (seed {seed})."


def write_page(path: Path, html: str) -> None:
    """Write beside and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(html, encoding="utf-8")
    os.replace(beside, path)


def _view(
    episode: Episode, agent: str, step: int, env: Env, running: bool, alone: Callable[[Turn], bool] | None
) -> View:
    mine = episode.trajectories[agent]
    turn = mine.turns[step]
    return View(
        agent=agent,
        saw=turn.observation.text,
        heard=tuple(Heard(message.sender, message.payload) for message in turn.inbox),
        intends=tuple(_guesses(episode, turn, step, running)),
        foresees=tuple(_foreseen(episode, turn, step, env, running)),
        says=turn.message.payload if turn.message is not None else None,
        bits=turn.message.bits if turn.message is not None else None,
        does=turn.action,
        malformed=turn.malformed,
        reward=turn.reward,
        weighed=weighed(episode, turn, env.language.view),
        alone=alone is not None and alone(turn),
    )


def _guesses(episode: Episode, turn: Turn, step: int, running: bool) -> list[Guess]:
    guesses: list[Guess] = []
    for intention in turn.intentions:
        theirs = episode.trajectories[intention.about].turns
        real = tuple(
            theirs[later].action if later < len(theirs) else END_OF_PLAY
            for later in range(step, step + len(intention.actions))
            if later < len(theirs) or not running
        )
        open_yet = len(real) < len(intention.actions) and intention.actions[: len(real)] == real
        guesses.append(
            Guess(
                intention.about,
                intention.actions,
                real,
                None if open_yet else intention.actions == real,
                perceived(turn, intention.about),
                intention.probability,
            )
        )
    return guesses


def _foreseen(episode: Episode, turn: Turn, step: int, env: Env, running: bool) -> list[Foreseen]:
    if turn.forecast is None:
        return []
    mine = episode.trajectories[turn.agent]
    last = step + 1 == len(mine.turns)
    after: Mapping[str, str] = (mine.final_observation if last else mine.turns[step + 1].observation).fields
    found = [
        Foreseen(slot, word, after[slot], word == after[slot]) for slot, word in turn.forecast.fields.items()
    ]
    if turn.forecast.reward is not None:
        came = reward_word(turn.reward, env.language)
        found.append(Foreseen("reward", turn.forecast.reward, came, turn.forecast.reward == came))
    if turn.forecast.done is not None:
        words = ("no", "yes")
        over = last and not running
        found.append(Foreseen("done", words[turn.forecast.done], words[over], turn.forecast.done == over))
    return found
