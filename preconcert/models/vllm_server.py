"""A vLLM server of our own: its command, and the process while it runs.

Parts: `server_command` (what to start, for those who start it themselves) and `VLLMServer` (starts it, says whether it
lives, starts it again). Its log is a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import httpx

from preconcert.core import ModelError
from preconcert.models.adapters import LoraSettings
from preconcert.models.vllm_heads import fitted_adapter, fitted_checkpoint
from preconcert.models.vllm_settings import VLLMSettings
from preconcert.models.vllm_start import check_vllm, engine_arguments, environment_of, read_base

PROCESSOR = "preconcert.models.vllm_engine:Dice"
BASE = "base"
"""The base model's name on our servers."""
_POLL_S = 0.25
_GRACE_S = 20.0
"""How long a server may take to end by itself."""


def server_command(
    base: str | Path,
    lora: LoraSettings,
    adapters: Mapping[str, Path],
    dtype: str = "float32",
    settings: VLLMSettings | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> tuple[list[str], dict[str, str]]:
    """What starts a vLLM server that `VLLMModel` can use: the command, and variables to add to the environment.

    Args:
        base: a folder or a hub name.
        lora: the shape of the adapters.
        adapters: by name, which is also their name as a model of the server; folders in peft's format.
        dtype: of the weights.
        settings: how vLLM is run; `api_key` is what clients must send.
        host: address to listen at.
        port: to listen at.

    Raises:
        ModelError: no such model, or it cannot be served.
    """
    settings = settings or VLLMSettings()
    folder, config, _ = read_base(base, dtype)
    arguments, environment = engine_arguments(fitted_checkpoint(folder, config), config, lora, dtype, settings)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            command.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            command += [flag, *map(str, value)]
        else:
            command += [flag, str(value)]
    command += ["--logits-processors", PROCESSOR, "--served-model-name", BASE, "--host", host, "--port", str(port)]
    if settings.api_key is not None:
        environment["VLLM_API_KEY"] = settings.api_key
    if adapters:
        paths = {name: fitted_adapter(Path(place).resolve(), config) for name, place in adapters.items()}
        modules = [{"name": name, "path": str(path), "base_model_name": BASE} for name, path in paths.items()]
        command += ["--lora-modules", *map(json.dumps, modules)]
    environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    return command, environment


class VLLMServer:
    """A vLLM server as a child process.

    Args:
        base: a folder or a hub name.
        lora: the shape of the adapters.
        adapters: that it serves under their names from the start, also after `restart`.
        dtype: of the weights.
        settings: how vLLM is run.
        host: address to listen at.
        port: to listen at; 0 for one that is free.
        log: file for what it says; None for a temporary one.
        patience_s: how long it may take until it answers.
    """

    def __init__(
        self,
        base: str | Path,
        lora: LoraSettings,
        adapters: Mapping[str, Path] | None = None,
        dtype: str = "float32",
        settings: VLLMSettings | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        log: Path | None = None,
        patience_s: float = 600.0,
    ) -> None:
        check_vllm()
        self.settings = settings or VLLMSettings()
        self.host, self.port = host, port or _free_port(host)
        self.adapters = dict(adapters or {})
        self._command, self._environment = server_command(
            base, lora, self.adapters, dtype, self.settings, host, self.port
        )
        if log is None:
            handle, name = tempfile.mkstemp(prefix="preconcert-vllm-", suffix=".log")
            os.close(handle)
            log = Path(name)
        self.log = log
        """What it says."""
        self._patience_s = patience_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Its process id; None before the start and after the end."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def start(self, wait: bool = True) -> None:
        """Start it, and wait until it answers.

        Args:
            wait: False returns at once; `alive` says when it answers.

        Raises:
            ModelError: it ended, or did not answer in time; with the end of its log.
        """
        if self.pid is not None:
            return
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment_of(self._environment)},
                start_new_session=True,
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until it answers. Whatever ends the waiting, Ctrl-C for one, ends the server.

        Raises:
            ModelError: it ended, or did not answer in time; with the end of its log.
        """
        deadline = time.monotonic() + self._patience_s
        try:
            while not self.alive():
                if self.pid is None or time.monotonic() > deadline:
                    ended = self.pid is None
                    raise ModelError(
                        f"the vLLM server {'ended' if ended else f'did not answer within {self._patience_s:g} s'}; its "
                        f"log {str(self.log)!r} ends: {self._last_words()}"
                    )
                time.sleep(_POLL_S)
        except BaseException:
            self.stop()
            raise

    def alive(self) -> bool:
        """Does it run, and say that it is well?"""
        if self.pid is None:
            return False
        try:
            return httpx.get(f"{self.url}/health", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    def restart(self) -> None:
        """End it if it still runs, and start it again with the same adapters.

        Raises:
            ModelError: it does not come up.
        """
        self.stop()
        self.start()

    def stop(self) -> None:
        """End it, and all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_S)
        finally:  # also where a second Ctrl-C ends the grace
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its engine, should it have been left behind
        process.wait()

    def __enter__(self) -> VLLMServer:
        self.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self.stop()

    def _last_words(self) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace")[-20_000:]
        lines = [line for line in text.splitlines() if line.strip()]
        wrong = [line for line in lines if "Error" in line]
        return " / ".join((wrong or lines)[-3:])[:1000] or "nothing"


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
