"""`preconcert serve`: the engine, the service in front of it, and an orderly end.

Parts: `EngineKind`, `pick_engine`, `start_vllm_engine`, `serve`.
"""

from __future__ import annotations

import importlib.util
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path

import uvicorn

from preconcert.core import ConfigError
from preconcert.models import VLLMSettings
from preconcert.models.language_model import LanguageModel
from preconcert.models.vllm_model import VLLMModel
from preconcert.models.vllm_server import VLLMServer
from preconcert.serving.app import Face, create_app
from preconcert.serving.engine import Embedded, Supervised, Writer
from preconcert.serving.metrics import Metrics
from preconcert.serving.settings import ServiceSettings
from preconcert.serving.shared_model import SharedModel, shared
from preconcert.serving.team import ServedTeam, team_of_run
from preconcert.training.recipe import Recipe
from preconcert.training.run_folder import base_of, load_model

_CALL_S = 900.0
"""Of one call of vLLM, where `vllm.timeout_s` does not say: much longer than a request waits for its answer, so that
who is told to ask again finds the turn written. What takes longer is an engine that hangs."""
_VLLM_CALLS = 4
"""Calls of vLLM at once: it takes new sequences in at every step, and each call brings all that wait."""


class EngineKind(StrEnum):
    """What writes."""

    AUTO = "auto"
    """vLLM where it is installed and there is a GPU, transformers otherwise."""
    VLLM = "vllm"
    TRANSFORMERS = "transformers"


def pick_engine(asked: EngineKind) -> tuple[EngineKind, str]:
    """The engine, and why, in words."""
    if asked is not EngineKind.AUTO:
        return asked, "as asked"
    from transformers.utils import is_torch_cuda_available

    if importlib.util.find_spec("vllm") is None:
        return EngineKind.TRANSFORMERS, "vLLM is not installed"
    if not is_torch_cuda_available():
        return EngineKind.TRANSFORMERS, "there is no GPU; --engine vllm takes the processor"
    return EngineKind.VLLM, "there is a GPU"


def serve(
    run: Path,
    recipe: Recipe,
    settings: ServiceSettings,
    face: Callable[[ServedTeam, str], Face],
    engine: EngineKind = EngineKind.AUTO,
    vllm: VLLMSettings | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> None:
    """Serve a run until told to stop (Ctrl-C or SIGTERM); what is being written then is finished first. While the
    engine starts, both end it with the service.

    Args:
        run: its folder.
        recipe: its recipe, perhaps played otherwise.
        settings: limits.
        face: makes what people see, given the team and the engine's name.
        engine: what writes.
        vllm: how vLLM is run.
        host: address to listen at.
        port: to listen at; 0 for one that is free.
        say: told how things stand, line by line.

    Raises:
        PreconcertError: the run cannot be served.
    """
    signal.signal(signal.SIGTERM, _end)
    listening = _listen(host, port)
    kind, why = pick_engine(engine)
    say(f"engine: {kind.value} ({why})")
    metrics = Metrics()
    writer: Writer
    writer, model = (
        start_vllm_engine(run, recipe, vllm or VLLMSettings(), settings, metrics, say)
        if kind is EngineKind.VLLM
        else _embedded(run, recipe, settings, metrics)
    )
    try:
        team = team_of_run(run, recipe, model)
        app = create_app(team, settings, writer, face(team, kind.value), metrics)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,  # longer than clients and proxies keep an idle connection
            timeout_graceful_shutdown=int(settings.timeout_s) + 5,
        )
        where = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        if settings.api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
            say("no API key: everybody who reaches this address may use the team (--api-key)")
        say(f"{run} plays {recipe.task} at {where} (page), {where}/docs (API), {where}/v1 (OpenAI); Ctrl-C ends it")
        server = uvicorn.Server(config)

        def told(number: int, frame: object) -> None:
            """uvicorn raises the signal that ended it once more; by then everything is done."""
            if not server.should_exit:
                _end(number, frame)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, told)
        server.run(sockets=[listening])
        say("ended")
    finally:
        model.close()
        writer.close()
        listening.close()


def _end(number: int, frame: object) -> None:
    """A signal before there is anything to finish: everything is let go of as after an error, once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _embedded(
    run: Path, recipe: Recipe, settings: ServiceSettings, metrics: Metrics
) -> tuple[Writer, SharedModel]:
    model = load_model(recipe, run, run / "adapters")
    return Embedded(), shared(model, settings.max_context, meter=metrics.model_call)


def start_vllm_engine(
    run: Path,
    recipe: Recipe,
    vllm: VLLMSettings,
    settings: ServiceSettings,
    metrics: Metrics,
    say: Callable[[str], None],
) -> tuple[Supervised, SharedModel]:
    """A vLLM server on a run's base and adapters, looked after, and the model that writes with it.

    Args:
        run: its folder.
        recipe: its recipe.
        vllm: how vLLM is run.
        settings: limits of the service.
        metrics: receives what is counted.
        say: told how things stand.

    Raises:
        PreconcertError: vLLM is not installed, or does not start.
    """
    if vllm.url is not None:
        raise ConfigError(f"vllm.url = {vllm.url!r}: the service starts a vLLM server of its own")
    adapters = _adapters(run)
    latent = recipe.agent.codec.type == "latent"
    own = vllm.model_copy(
        update={
            "max_adapters": max(vllm.max_adapters, len(adapters) + 2),
            "max_context": vllm.max_context or settings.max_context,
            "latents": vllm.latents or latent,
        }
    )
    base = base_of(recipe, run)
    server = VLLMServer(base, recipe.lora, adapters, recipe.dtype, own)
    say(f"vLLM starts; its log: {server.log}")
    server.start()
    writer = Supervised(server, on_restart=metrics.restarts.inc)
    try:
        patience_s = vllm.timeout_s if "timeout_s" in vllm.model_fields_set else _CALL_S
        there = own.model_copy(update={"url": server.url, "retries": 0, "timeout_s": patience_s})
        spoken = load_model(recipe, run, run / "adapters") if latent else None
        model: LanguageModel = VLLMModel.load(base, recipe.lora, recipe.dtype, there, spoken)
        # Latent messages are written by the embedded model, which does one thing at a time.
        workers = 1 if latent else _VLLM_CALLS
        return writer, shared(model, settings.max_context, workers, writer, metrics.model_call)
    except BaseException:
        writer.close()
        raise


def _adapters(run: Path) -> Mapping[str, Path]:
    folder = run / "adapters"
    if not folder.is_dir():
        raise ConfigError(f"the run {str(run)!r} has no 'adapters' folder; is it finished?")
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")}


def _listen(host: str, port: int) -> socket.socket:
    """The socket, before anything that takes time."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise ConfigError(f"cannot listen at {host}, port {port}: {error}") from None
    return listening
