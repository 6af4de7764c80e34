"""The command line: train a team, judge it, look at it.

Each command imports what it needs when it runs, so that help and `tasks` answer at once. Results go to standard output,
progress to standard error. Whatever the package refuses is one `error:` line and exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from preconcert import __version__
from preconcert.cli_checks import check_environment, doctor, tasks
from preconcert.cli_runs import crossplay, diagnose, evaluate, experiment, export, train
from preconcert.cli_show import play, serve, watch
from preconcert.cli_text import INTERRUPTED, REFUSED, complain
from preconcert.core import PreconcertError


class _Commands(TyperGroup):
    """The boundary at which errors become lines."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; with `standalone_mode` this ends the process."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except PreconcertError as error:
            complain(str(error))
            code = REFUSED
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception as error:
            # click's own errors, which typer may bring along under another module name
            if not hasattr(error, "format_message"):
                raise
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]
            else:
                complain(error.format_message())
            code = getattr(error, "exit_code", REFUSED)
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Teams of language-model agents that write the future before they act.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"preconcert {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options that stand before a command."""


_COMMANDS: dict[str, Callable[..., None]] = {
    "tasks": tasks,
    "train": train,
    "eval": evaluate,
    "play": play,
    "watch": watch,
    "serve": serve,
    "diagnose": diagnose,
    "export": export,
    "crossplay": crossplay,
    "experiment": experiment,
    "check-env": check_environment,
    "doctor": doctor,
}
"""In the order in which `--help` lists them."""

for name, command in _COMMANDS.items():
    app.command(name)(command)


if __name__ == "__main__":
    app()
