"""Runs uv with pip's settings, which it does not read itself.

    .venv/bin/python packaging/uv_with_pip_settings.py pip install ...

Indexes, folders of wheels, certificates and trusted hosts of pip's configuration files and environment become uv's
environment variables; those that are set already stay.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys

NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
}
"""Pip's option to uv's variable."""
LISTS = {"UV_FIND_LINKS": ","}
"""What stands between several values, where it is no space."""


def pip_settings() -> dict[str, str]:
    """Pip's options by name, from its files and environment; later ones win, as with pip."""
    lines = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    found: dict[str, str] = {}
    # The environment's come first in the list, and win.
    for line in sorted(lines, key=lambda one: one.startswith(":env:")):
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in ("global", "install", ":env:"):
            found[option] = str(ast.literal_eval(value))
    return found


def uv_environment() -> dict[str, str]:
    """The same for uv, with what is in the environment already."""
    found: dict[str, str] = {}
    for option, value in pip_settings().items():
        if option in NAMES:
            name = NAMES[option]
            found[name] = LISTS.get(name, " ").join(value.split())
    # Pip takes the best version of all indexes.
    found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {**found, **os.environ}


if __name__ == "__main__":
    sys.exit(subprocess.run([sys.executable, "-m", "uv", *sys.argv[1:]], env=uv_environment(), check=False).returncode)
