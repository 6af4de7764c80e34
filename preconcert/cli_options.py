"""Options that several commands share, and what they come to."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preconcert.core import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from preconcert.experiments.evaluation import SpecialPlay
    from preconcert.experiments.planned import Planned

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.", show_default=False)]
PlayOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Play otherwise: messages=on|shuffled|off, drop=0.3, params.size=6, agent.constrained=false, ...",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always take the most likely token.")]
Plan = Annotated[bool, typer.Option("--plan", help="Imagine before acting; planner.KEY=VALUE changes the search.")]
PlannerKind = Annotated[
    str | None,
    typer.Option(
        "--planner", help="The search of --plan: best-of-k (if not given), beam or tree.", show_default=False
    ),
]
WorldModelKind = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="What --plan imagines with: token (the run's own; if not given), oracle or shuffled.",
        show_default=False,
    ),
]
FallbackRun = Annotated[
    Path | None,
    typer.Option(
        "--fallback",
        metavar="RUN",
        help="A run without messages: agents act as its team would until they have heard something.",
        show_default=False,
    ),
]
Patience = Annotated[
    int | None,
    typer.Option(min=1, help="Steps that agents wait before --fallback; 3 if not given.", show_default=False),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="PRECONCERT_API_KEY", help="Asked of, or sent with, every request.", show_default=False
    ),
]


PLANNER = "best-of-k"


def need_extra(extra: str, packages: Sequence[str]) -> None:
    """Go on only where an extra is installed.

    Raises:
        ConfigError: one of its packages is missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"this needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'preconcert[{extra}]', or -e '.[{extra}]' in a clone"
        )


def planned_with(
    plan: bool, planner: str | None, model: str | None, greedy: bool, overrides: Sequence[str]
) -> tuple[Planned | None, list[str]]:
    """How a run is to plan, None if not at all; and the overrides that are not the planner's.

    Raises:
        ConfigError: a search, a world model or settings of planning that is not asked for, unknown ones, or greedy
            planning.
    """
    from preconcert.config import parse_override
    from preconcert.experiments.planned import PREFIX, Planned, WorldKind, planner_settings

    own = [override for override in overrides if override.startswith(PREFIX)]
    others = [override for override in overrides if override not in own]
    values = dict(parse_override(override.removeprefix(PREFIX)) for override in own)
    if not plan:
        if values:
            raise ConfigError(f"planner.{next(iter(values))} changes the search of --plan, which is not asked for")
        for name, value in (("planner", planner), ("model", model)):
            if value is not None:
                raise ConfigError(f"--{name} {value} is for --plan, which is not asked for")
        return None, others
    if greedy:
        raise ConfigError("--plan weighs turns that are sampled, --greedy always takes the same one; take one of them")
    world = WorldKind.TOKEN if model is None else model
    if world not in list(WorldKind):
        raise UnknownNameError("world model", world, [kind.value for kind in WorldKind])
    return Planned(planner_settings(planner or PLANNER, values), WorldKind(world)), others


def around(planned: Planned | None, fallback: Path | None, patience: int | None) -> SpecialPlay | None:
    """What is put around a run's team: a planner, a silent run to fall back on, or nothing.

    Raises:
        ConfigError: both, or a patience for nothing.
    """
    from preconcert.experiments.fallback import Fallback

    if fallback is None:
        if patience is not None:
            raise ConfigError(f"--patience {patience} is for --fallback, which is not asked for")
        return planned
    if planned is not None:
        raise ConfigError("a team that plans has nothing to fall back on: take --plan or --fallback")
    return Fallback(fallback) if patience is None else Fallback(fallback, patience)
