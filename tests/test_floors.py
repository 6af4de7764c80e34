"""The house has floors: a folder imports only from those below it. This test walks every import and keeps them.

Imports inside functions and under `TYPE_CHECKING` count like any other. The table is the one in CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "preconcert"

BELOW_TRAINING = {"core", "prompts", "envs", "models", "world_models", "agents"}
BELOW_EXPERIMENTS = BELOW_TRAINING | {"training"}
COMMANDS = {"cli", "cli_checks", "cli_options", "cli_runs", "cli_show", "cli_text"}
EVERYTHING = BELOW_EXPERIMENTS | COMMANDS | {"experiments", "serving", "config"}

MAY_IMPORT = {
    "__init__": {"core"},
    "core": set[str](),
    "prompts": {"core"},
    "envs": {"core"},
    "models": {"core", "prompts"},
    "world_models": {"core", "prompts", "models"},
    "agents": {"core", "prompts", "models", "world_models"},
    "training": BELOW_TRAINING,
    "experiments": BELOW_EXPERIMENTS,
    "serving": BELOW_EXPERIMENTS,
    **dict.fromkeys(COMMANDS, EVERYTHING),
    "config": EVERYTHING,
    "__main__": EVERYTHING,
}
"""Part of the package (a folder, or a file beside them) to the other parts that it may import."""

CORE_LIBRARIES = sys.stdlib_module_names | {"numpy", "pydantic"}
TORCH_PARTS = {"models", "world_models", "agents", "training"}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "types"}


def imports(tree: ast.AST, module: str, is_package: bool, parts: set[str]) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that a module imports."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                base = package[: len(package) - level + 1] if level else []
                name = ".".join([*base, source] if source else base)
                if name == "preconcert":  # `from preconcert import envs` names a part; `import __version__` does not
                    yield from ((node.lineno, f"{name}.{alias.name}") for alias in names if alias.name in parts)
                else:
                    yield node.lineno, name
            case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name))]):
                if called in {"import_module", "__import__"}:
                    yield node.lineno, name


def violations(root: Path) -> list[str]:
    """Everything under a package folder that breaks a rule, one sentence each.

    Args:
        root: the folder of the package, named `preconcert`.
    """
    found: list[str] = []
    vllm_files: set[str] = set()
    files = sorted(root.rglob("*.py"))
    names = {path: path.relative_to(root).with_suffix("").parts for path in files}
    parts = {name[0] for name in names.values()}
    for path, name in names.items():
        file, part = path.relative_to(root.parent).as_posix(), name[0]
        for forbidden in FORBIDDEN_NAMES & set(name):
            found.append(f"{file}: nothing is called {forbidden!r}; name it for what it holds")
        if part not in MAY_IMPORT:
            found.append(f"{file}: {part!r} is on no floor; give it one in MAY_IMPORT")
            continue
        is_package = name[-1] == "__init__"
        module = ".".join(["preconcert", *(name[:-1] if is_package else name)])
        for line, imported in imports(ast.parse(path.read_text("utf-8"), str(path)), module, is_package, parts):
            top, _, rest = imported.partition(".")
            where = f"{file}:{line} imports {imported}"
            if top == "preconcert":
                target = rest.partition(".")[0]
                if target and target != part and target not in MAY_IMPORT[part]:
                    allowed = ", ".join(sorted(MAY_IMPORT[part])) or "nothing"
                    found.append(f"{where}: {part} may import {allowed} of this package")
            elif part in {"core", "__init__"} and top not in CORE_LIBRARIES:
                found.append(f"{where}: {part} may import the standard library, numpy and pydantic")
            elif top == "torch" and part not in TORCH_PARTS:
                found.append(f"{where}: torch belongs in {', '.join(sorted(TORCH_PARTS))}")
            elif top == "vllm":
                vllm_files.add(file)
    if len(vllm_files) > 1:
        found.append(f"vllm is imported in {len(vllm_files)} files and belongs in one: {', '.join(sorted(vllm_files))}")
    return found


def test_every_import_keeps_the_floors() -> None:
    found = violations(PACKAGE)
    assert not found, "\n" + "\n".join(found)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        path = root / "preconcert" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root / "preconcert"


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("core/x.py", "import torch", "preconcert/core/x.py:1 imports torch"),
        ("core/x.py", "\nfrom preconcert.envs import tasks", "core/x.py:2 imports preconcert.envs: core may"),
        ("__init__.py", "from preconcert.training import x", "__init__.py:1 imports preconcert.training"),
        ("prompts/x.py", "from preconcert.envs.grid import Grid", "imports preconcert.envs.grid: prompts may"),
        ("envs/x.py", "import preconcert.prompts", "imports preconcert.prompts: envs may import core"),
        ("envs/x.py", "import torch.nn as nn", "imports torch.nn: torch belongs in"),
        ("experiments/x.py", "from torch import Tensor", "imports torch: torch belongs in"),
        ("agents/x.py", "def late():\n    from preconcert.envs import make", "x.py:2 imports preconcert.envs: agents"),
        ("agents/deep/x.py", "from ...envs import make", "agents/deep/x.py:1 imports preconcert.envs"),
        ("agents/__init__.py", "from ..training import rollout", "agents/__init__.py:1 imports preconcert.training"),
        ("models/x.py", "from preconcert import envs", "imports preconcert.envs: models"),
        ("models/x.py", "if TYPE_CHECKING:\n    import preconcert.agents", "x.py:2 imports preconcert.agents"),
        ("training/x.py", "importlib.import_module('preconcert.cli')", "training/x.py:1 imports preconcert.cli"),
        ("serving/x.py", "import preconcert.experiments.plot", "imports preconcert.experiments.plot: serving"),
        ("training/utils.py", "", "training/utils.py: nothing is called 'utils'"),
        ("models/types/x.py", "", "models/types/x.py: nothing is called 'types'"),
        ("extra/x.py", "", "extra/x.py: 'extra' is on no floor"),
    ],
)
def test_the_walk_catches(tmp_path: Path, file: str, source: str, expected: str) -> None:
    found = violations(write(tmp_path, {"envs/__init__.py": "", file: source}))
    assert len(found) == 1
    assert expected in found[0]


def test_vllm_is_imported_in_one_file(tmp_path: Path) -> None:
    one = write(tmp_path, {"models/vllm.py": "import vllm\nfrom vllm.lora import request"})
    assert violations(one) == []
    two = write(tmp_path, {"serving/server.py": "def start():\n    import vllm"})
    assert violations(two) == [
        "vllm is imported in 2 files and belongs in one: preconcert/models/vllm.py, preconcert/serving/server.py"
    ]


def test_the_walk_lets_pass_what_is_allowed(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "__init__.py": "import os\nfrom preconcert.core import Env",
            "core/x.py": "import json\nimport numpy as np\nfrom pydantic import TypeAdapter\nfrom .y import z",
            "envs/x.py": "import gymnasium\nfrom preconcert import __version__\nfrom preconcert.envs.y import z",
            "training/x.py": "import torch\nfrom preconcert.envs import make\nfrom preconcert.agents import Team",
            "cli.py": "from preconcert.config import Recipe\nfrom preconcert.experiments import run",
            "config.py": "from preconcert import training",
        },
    )
    assert violations(root) == []
