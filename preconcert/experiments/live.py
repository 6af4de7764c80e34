"""The page that watches a session of the HTTP service, and the frames that it is given.

It draws with what the replay page draws with, and loads nothing from anywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from preconcert.core import Episode
from preconcert.experiments.replay import replay_of


def live_replay(episode: Episode, running: bool) -> dict[str, Any]:
    """An episode as the page draws it.

    Args:
        episode: so far.
        running: it goes on.
    """
    return replay_of(episode, running).to_json()


def live_page(
    task: str, agents: Sequence[str], params: Mapping[str, Any], engine: str, plans: bool, key: bool
) -> str:
    """The page as HTML.

    Args:
        task: what is played.
        agents: who plays.
        params: of the task.
        engine: what writes.
        plans: can the team plan?
        key: does the service ask for one?
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined, autoescape=True
    )
    summary = [
        ("agents", ", ".join(agents)),
        ("parameters", ", ".join(f"{name} {value}" for name, value in params.items()) or "defaults"),
        ("engine", engine),
    ]
    return templates.get_template("live.html.jinja").render(task=task, summary=summary, plans=plans, key=key)
