"""A server's process ends with whoever waits for it. No vLLM: the process only sleeps."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from preconcert.core import ModelError
from preconcert.models import LoraSettings, vllm_server
from preconcert.models.vllm_server import VLLMServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> VLLMServer:
    sleeps = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(vllm_server, "check_vllm", lambda: None)
    monkeypatch.setattr(vllm_server, "server_command", lambda *_: (sleeps, {}))
    return VLLMServer("nothing", LoraSettings(), log=tmp_path / "log", patience_s=0.5)


@pytest.mark.parametrize("reason", [KeyboardInterrupt, SystemExit, ModelError])
def test_nothing_is_left_of_a_start_that_was_broken_off(
    server: VLLMServer, monkeypatch: pytest.MonkeyPatch, reason: type[BaseException]
) -> None:
    pids: list[int] = []

    def alive() -> bool:
        assert server.pid is not None
        pids.append(server.pid)
        if reason is not ModelError:
            raise reason
        return False

    monkeypatch.setattr(server, "alive", alive)
    with pytest.raises(reason):
        server.start()
    assert server.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
