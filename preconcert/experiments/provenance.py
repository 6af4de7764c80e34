"""Where a result comes from: versions, the commit, the machine. No model code is imported here."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from preconcert import __version__

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "pydantic", "numpy")
"""What every result names the version of."""
OFFLINE_FLAGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Installed versions, this package's and Python's first; None for what is not installed."""
    own = {"preconcert": __version__, "python": platform.python_version()}
    return {**own, **{name: _version(name) for name in packages}}


def commit() -> str | None:
    """The git commit of this package's checkout, `+changes` behind it where files differ; None outside of one."""
    folder = Path(__file__).parent
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    head = _git(folder, "rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def machine() -> dict[str, str | int | float | None]:
    """Platform, CPU cores this process may use, memory in GiB, and the GPU where there is one."""
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"platform": platform.platform(), "cores": cores, "memory_gib": memory, "gpu": _gpu()}


def offline_flags() -> dict[str, str | None]:
    """The variables that keep Hugging Face libraries off the network."""
    return {flag: os.environ.get(flag) for flag in OFFLINE_FLAGS}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _gpu() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        done = subprocess.run(
            [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return "; ".join(done.stdout.strip().splitlines()) or None if done.returncode == 0 else None
