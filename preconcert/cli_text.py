"""What the commands print, and where: results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from rich.console import Console

REFUSED = 2
"""Exit code for everything that cannot be done as asked."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
_PIPE_WIDTH = 120
"""Columns where the output is no terminal."""
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Switches that Hugging Face libraries read when they are imported; what the user has set stays."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep other people's bars, warnings and prints out of the way; what they print goes to standard error."""
    for switch, value in _QUIET.items():
        os.environ.setdefault(switch, value)
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.filterwarnings("ignore", module=r"(?!preconcert)")
        yield


def make_console(err: bool = False) -> Console:
    """Where to print for people: standard output, or standard error; a pipe is as wide as a terminal often is."""
    console = Console(stderr=err, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)
    return console


def print_json(content: Any) -> None:
    """Print for machines."""
    sys.stdout.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def complain(text: str) -> None:
    """Say on standard error what went wrong, in one line and at most one more."""
    first, _, rest = text.strip().partition("\n")
    print(f"error: {first}", file=sys.stderr)
    if rest:
        print(f"  {' '.join(rest.split())}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())
