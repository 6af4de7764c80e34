"""How `preconcert serve` starts: what a signal does then, and how long vLLM may take. Nothing real is started."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preconcert.models import VLLMSettings
from preconcert.serving import launch
from preconcert.serving.metrics import Metrics
from preconcert.serving.settings import ServiceSettings
from preconcert.training.recipe import Recipe
from tests.training.teams import TASK


@pytest.fixture
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
def test_sigterm_while_the_engine_starts_ends_it_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tidied: list[str] = []

    def start(*_: Any) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            tidied.append("vLLM")

    monkeypatch.setattr(launch, "start_vllm_engine", start)
    with pytest.raises(SystemExit) as ended:
        launch.serve(
            tmp_path, Recipe(task=TASK), ServiceSettings(), lambda *_: launch.Face(), launch.EngineKind.VLLM, port=0
        )
    assert ended.value.code == 128 + signal.SIGTERM
    assert tidied == ["vLLM"]


class Server:
    """Is there at once."""

    url, log, settings = "http://127.0.0.1:9", "log", VLLMSettings()

    def __init__(self, *_: Any) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def alive(self) -> bool:
        return True


class Stop(Exception):
    """Far enough."""


@pytest.mark.parametrize(("vllm", "wanted"), [(VLLMSettings(), 900.0), (VLLMSettings(timeout_s=30), 30.0)])
def test_vllm_may_take_longer_than_a_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vllm: VLLMSettings, wanted: float
) -> None:
    found: list[VLLMSettings] = []

    def load(base: Any, lora: Any, dtype: Any, settings: VLLMSettings, spoken: Any) -> None:
        found.append(settings)
        raise Stop

    (tmp_path / "adapters").mkdir()
    monkeypatch.setattr(launch, "VLLMServer", Server)
    monkeypatch.setattr(launch, "base_of", lambda *_: "nothing")
    monkeypatch.setattr(launch.VLLMModel, "load", load)
    with pytest.raises(Stop):
        launch.start_vllm_engine(
            tmp_path, Recipe(task=TASK), vllm, ServiceSettings(timeout_s=5), Metrics(), lambda text: None
        )
    assert (found[0].timeout_s, found[0].retries) == (wanted, 0)
