"""A service on a tiny real team: a random starter model with adapters that matter, untrained."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from preconcert.agents import AgentSettings
from preconcert.models import TransformersModel
from preconcert.serving.app import Face, create_app
from preconcert.serving.settings import ServiceSettings
from preconcert.serving.shared_model import shared
from preconcert.serving.team import ServedTeam
from tests.training.teams import AGENTS, PARAMS, TASK, load, starter_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return starter_checkpoint(tmp_path_factory.mktemp("starter") / "base")


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> TransformersModel:
    """For what a rollout in this process says; never shared with a service, which has a copy."""
    return load(checkpoint)


@pytest.fixture(scope="session")
def served(checkpoint: Path) -> Callable[..., ServedTeam]:
    """A team as a service plays it, on a model of its own."""

    def make(agents: AgentSettings | None = None, max_context: int = 4096, **options: object) -> ServedTeam:
        common = shared(load(checkpoint), max_context)
        return ServedTeam(common, TASK, PARAMS, agents or AgentSettings(), {a: a for a in AGENTS}, **options)

    return make


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The application on a free loopback port; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.started
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def url(served: Callable[..., ServedTeam]) -> Iterator[str]:
    """A service that all tests may use."""
    with running(create_app(served(), ServiceSettings(), face=Face())) as address:
        yield address
