"""The commands: `serve` as a process of its own, and `play --server` beside `play RUN`."""

from __future__ import annotations

import importlib.util
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from preconcert.cli import app
from tests.serving.run_folder import run_folder

KEY = "sesame"


def call(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("runs") / "random")


@pytest.fixture(scope="module")
def service(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    command = [sys.executable, "-m", "preconcert.cli", "serve", run, "--port", str(port), "--api-key", KEY]
    with log.open("wb") as out:
        process = subprocess.Popen([*map(str, command), "--engine", "transformers"], stdout=out, stderr=out)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process, url, log
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("options", [["--seed", "3"], ["--seed", "5", "--greedy"]])
def test_play_shows_the_same_there_and_here(service: tuple[Any, str, Path], run: Path, options: list[str]) -> None:
    there = call("play", "--server", service[1], "--api-key", KEY, *options)
    assert there.exit_code == 0, there.output
    here = call("play", run, *options)
    assert there.stdout == here.stdout
    assert "agent_0" in there.stdout


def test_play_without_the_key_is_refused(service: tuple[Any, str, Path]) -> None:
    refused = call("play", "--server", service[1])
    assert refused.exit_code == 2
    assert "Authorization: Bearer" in refused.stderr


def test_the_page_draws_the_team(service: tuple[Any, str, Path]) -> None:
    page = httpx.get(service[1]).text
    assert "A team that plays rendezvous" in page
    assert "API key" in page
    for outside in ("src=", "@import", "url("):
        assert outside not in page


def test_sigterm_ends_it_in_order(service: tuple[subprocess.Popen[bytes], str, Path]) -> None:
    process, url, log = service
    headers = {"authorization": f"Bearer {KEY}"}
    name = httpx.post(f"{url}/v1/sessions", json={"instance": 1}, headers=headers).json()["id"]
    assert httpx.post(f"{url}/v1/sessions/{name}/step", headers=headers).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert "plays rendezvous at" in log.read_text()
    assert log.read_text().rstrip().endswith("ended")


def test_refusals(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, words in (
        (["serve", run, "--engine", "vlm"], "did you mean 'vllm'?"),
        (["serve", run, "vllm.memry=1"], "did you mean 'vllm.memory'?"),
        (["serve", run, "messages=shuffled", "--port", "0", "--engine", "transformers"], "sessions are apart"),
        (["serve", run, "--host", "256.0.0.1"], "cannot listen"),
        (["serve", "nowhere"], "no run folder"),
        (["play"], "--server"),
        (["play", run, "--server", "http://127.0.0.1:9"], "goes to `preconcert serve`"),
    ):
        refused = call(*arguments)  # type: ignore[arg-type]
        assert refused.exit_code == 2
        assert words in refused.stderr
    found: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    refused = call("serve", run)
    assert refused.exit_code == 2
    assert "uvicorn" in refused.stderr
    assert "preconcert[serve]" in refused.stderr
