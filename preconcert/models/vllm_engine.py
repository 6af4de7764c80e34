"""The engine itself: all that imports vLLM.

Parts: `Dice`, the logits processor that an engine's process loads by its qualified name, and `EmbeddedEngine`, an
engine of this process's own (its core is a child process), which is made anew when it dies. The HTTP client of a server
is in `vllm_client.py`; both do what `VLLMModel` asks of a `RowEngine`.

Beside the documented interface of logits processors two things are changed inside the engine's process. On a CPU, rows
without an adapter are kept clear of the last slot's (`_spare_rows_without_adapter`). And after sampling, `Dice` puts
the log-probabilities that it drew with in the place of the engine's own, in its own rows only. So a row costs one
number per token instead of the whole vocabulary's, at any temperature, and plain requests beside it get what they
always got.
"""

from __future__ import annotations

import functools
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm import EngineArgs, SamplingParams
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.sampler import Sampler

from preconcert.core import EngineAwayError, ModelError
from preconcert.models.loading import first_line
from preconcert.models.vllm_instructions import Dicing, Row, Written, instructions, read_instructions

_log = logging.getLogger(__name__)
_WATCH_S = 0.1
_PATIENCE_S = 5.0
"""How long an engine may take to drop a call that has run out of time before it counts as hung."""


class Dice(LogitsProcessor):
    """Draws the tokens of rows with instructions; all other rows are left alone."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = str(device)
        self._vocabulary = vllm_config.model_config.get_vocab_size()
        self.dicing = Dicing()
        _report_after_sampling()
        _spare_rows_without_adapter()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse instructions that cannot be read before they reach the engine.

        Raises:
            ValueError: what is wrong with them.
        """
        if read_instructions(sampling_params.extra_args, 2**31, "cpu") is not None and sampling_params.temperature:
            raise ValueError("a request with instructions is drawn by them: its own temperature must be 0")

    def is_argmax_invariant(self) -> bool:
        """It decides the argmax."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow which request is where in the batch."""
        process_dict_updates(self.dicing.rows, batch_update, self._new)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask all but the token that was drawn."""
        self.dicing.decide(logits)
        return logits

    def _new(self, params: SamplingParams, prompt_ids: list[int] | None, outputs: list[int]) -> Any:
        try:
            return read_instructions(params.extra_args, self._vocabulary, self._device, prompt_ids, outputs)
        # Raised here, it would end the engine and every request in it; this one goes on as a plain greedy request,
        # whose log-probabilities the client finds to be none of the grammar's.
        except ValueError:
            _log.exception("a request's instructions cannot be followed")
            return None


def _report_after_sampling() -> None:
    """Make the sampler report what `Dice` drew with. Twice is once."""
    plain = Sampler.forward
    if getattr(plain, "_reports_dice", False):
        return

    @functools.wraps(plain)
    def forward(self: Sampler, logits: torch.Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, logits, sampling_metadata, *args, **kwargs)
        tensors = output.logprobs_tensors
        if tensors is not None:
            for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
                if isinstance(processor, Dice):
                    processor.dicing.report(tensors.logprob_token_ids, tensors.logprobs)
        return output

    forward._reports_dice = True  # type: ignore[attr-defined]
    Sampler.forward = forward


def _spare_rows_without_adapter() -> None:
    """Keep adapters out of rows that have none, in vLLM 0.30's operations for CPUs. Twice is once.

    Such rows have slot -1, by which those operations index, so that they get the adapter of the last slot as soon as
    there is one. Where the first half of an adapter gives them nothing, the second adds nothing.
    """
    plain = lora_ops.bgmv_shrink
    if getattr(plain, "_spares_rows", False):
        return

    @functools.wraps(plain)
    def bgmv_shrink(
        inputs: torch.Tensor,
        lora_b_weights: torch.Tensor,
        output_tensor: torch.Tensor,
        lora_indices_tensor: torch.Tensor,
        scaling: float = 1.0,
    ) -> None:
        plain(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor.masked_fill_((lora_indices_tensor < 0)[:, None], 0.0)

    bgmv_shrink._spares_rows = True  # type: ignore[attr-defined]
    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = bgmv_shrink  # sgmv_shrink calls the former


class EngineDiedError(ModelError):
    """The engine's process is gone, or does not answer any more."""


@dataclass
class _Call:
    """Some rows on their way through the engine, or something to be done in its thread."""

    rows: Sequence[Row] = ()
    work: Callable[[LLMEngine], Any] | None = None
    answer: Future[Any] = field(default_factory=Future)
    found: dict[int, Written] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)


class _Driver:
    """One engine and the thread that drives it: calls of several threads are batched as they come."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._running: dict[str, tuple[_Call, int]] = {}
        self._names = itertools.count()
        self._loras: dict[str, LoRARequest] = {}
        self.engine: LLMEngine | None = LLMEngine.from_engine_args(
            EngineArgs(**arguments), enable_multiprocessing=True
        )
        self.dead: str | None = None
        """Why it is, if it is."""
        self._failing = threading.Lock()
        self._thread = threading.Thread(target=self._drive, name="preconcert-vllm", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, args=(self.engine,), name="preconcert-vllm-watch", daemon=True).start()

    def submit(self, call: _Call) -> None:
        """Hand over a call; its answer is in its future."""
        self._calls.put(call)
        if self.dead is not None:
            self._fail(self.dead)

    def lora(self, name: str, number: int, path: Path) -> LoRARequest:
        """Make an adapter known; it is read, at the latest, when the first request asks for it."""
        request = self._loras[name] = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(path))
        return request

    def forget(self, name: str) -> None:
        """Take an adapter away."""
        request = self._loras.pop(name)
        self.submit(_Call(work=lambda engine: engine.remove_lora(request.lora_int_id)))

    def stop(self, why: str) -> None:
        """End the engine and every call in it."""
        engine, self.engine = self.engine, None
        self.dead = self.dead or why
        if engine is not None:
            self._wake(engine)
            engine.engine_core.shutdown()
            engine.renderer.shutdown()
        if threading.current_thread() is not self._thread:
            self._thread.join(_PATIENCE_S)
        self._fail(self.dead)

    def _drive(self) -> None:
        engine = self.engine
        assert engine is not None
        try:
            while self.dead is None:
                while not self._running or not self._calls.empty():
                    call = self._calls.get()
                    if call is None:
                        return
                    self._begin(engine, call)
                for output in engine.step():
                    if output.finished:
                        self._end(output)
        # Whatever it is, nobody else sees what happens in this thread: the calls are told, and decide.
        except Exception as error:
            self.dead = self.dead or f"{type(error).__name__}: {first_line(error)}"
        finally:
            self._fail(self.dead or "it was stopped")

    def _watch(self, engine: LLMEngine) -> None:
        """Tell the driving thread of the death of the engine's process: vLLM's client only marks it, and whoever waits
        for an answer waits for ever."""
        while self.dead is None and not engine.engine_core.resources.engine_dead:
            time.sleep(_WATCH_S)
        if self.dead is None:
            self.dead = "its process ended"
            self._wake(engine)

    def _wake(self, engine: LLMEngine) -> None:
        core = engine.engine_core
        self._calls.put(None)
        core.outputs_queue.put_nowait(EngineDiedError(self.dead))
        for waiting in list(core.utility_results.values()):
            if not waiting.done():
                waiting.set_exception(EngineDiedError(self.dead))

    def _begin(self, engine: LLMEngine, call: _Call) -> None:
        if call.work is not None:
            try:
                call.answer.set_result(call.work(engine))
            except Exception as error:  # if it is the engine's end, its next step says so, too
                _log.warning("vLLM: %s: %s", type(error).__name__, first_line(error))
                call.answer.set_exception(error)
            return
        for place, row in enumerate(call.rows):
            name = f"r{next(self._names)}"
            prompt: Any = (
                {"prompt_token_ids": list(row.prompt_ids)} if row.embeds is None else {"prompt_embeds": row.embeds}
            )
            try:
                inner = engine.add_request(name, prompt, _params(row), lora_request=self._lora(row.adapter))
            except ValueError as error:  # vLLM refuses the request; the engine goes on
                engine.abort_request(call.ids, internal=True)
                for known in call.ids:
                    self._running.pop(known, None)
                call.answer.set_exception(ModelError(f"vLLM refuses a request: {first_line(error)}"))
                return
            except Exception as error:  # the engine's end; nobody else knows of this call yet
                call.answer.set_exception(EngineDiedError(f"vLLM died: {first_line(error)}"))
                raise
            call.ids.append(inner)
            self._running[name] = self._running[inner] = (call, place)

    def _lora(self, name: str | None) -> LoRARequest | None:
        if name is None:
            return None
        if name not in self._loras:
            raise ValueError(f"adapter {name!r} is not loaded")
        return self._loras[name]

    def _end(self, output: Any) -> None:
        call, place = self._running.pop(output.request_id)
        self._running.pop(call.ids[place], None)
        one = output.outputs[0]
        call.found[place] = _written(call.rows[place], one)
        if len(call.found) == len(call.rows) and not call.answer.done():
            call.answer.set_result([call.found[index] for index in range(len(call.rows))])

    def abort(self, call: _Call) -> _Call:
        """Drop a call; the answer to what is returned says that the engine has done so."""

        def drop(engine: LLMEngine) -> None:
            engine.abort_request(call.ids, internal=True)
            for name in [name for name, (other, _) in self._running.items() if other is call]:
                del self._running[name]

        dropping = _Call(work=drop)
        self.submit(dropping)
        return dropping

    def _fail(self, why: str) -> None:
        with self._failing:
            calls = {id(call): call for call, _ in self._running.values()}
            self._running.clear()
            while True:
                try:
                    call = self._calls.get_nowait()
                except queue.Empty:
                    break
                if call is not None:
                    calls[id(call)] = call
            for call in calls.values():
                if not call.answer.done():
                    call.answer.set_exception(EngineDiedError(f"the vLLM engine died: {why}"))


def _params(row: Row) -> SamplingParams:
    return SamplingParams(
        temperature=0.0,
        max_tokens=row.tokens,
        stop_token_ids=list(row.stops),
        ignore_eos=True,
        logprobs=row.watched,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=instructions([row]),
        skip_clone=True,
    )


def _written(row: Row, output: Any) -> Written:
    flat = output.logprobs
    starts = flat.start_indices
    tables: tuple[dict[int, float], ...] = ()
    if row.watched:
        tables = tuple(
            dict(zip(flat.token_ids[start:end], flat.logprobs[start:end], strict=True))
            for start, end in zip(starts, flat.end_indices, strict=True)
        )
    return Written(tuple(output.token_ids), tuple(flat.logprobs[start] for start in starts), tables)


class EmbeddedEngine:
    """An engine of this process's own; one that dies is made anew, with its adapters, and the call repeated.

    Args:
        arguments: of vLLM's `EngineArgs`.
        timeout_s: for one call.
        retries: how often an engine is made anew for one call.

    Raises:
        ModelError: no engine can be made.
    """

    def __init__(self, arguments: dict[str, Any], timeout_s: float, retries: int) -> None:
        self._arguments = {**arguments, "logits_processors": [f"{Dice.__module__}:{Dice.__qualname__}"]}
        self._timeout_s, self._retries = timeout_s, retries
        self._adapters: dict[str, tuple[int, Path]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._closed = False
        self.restarts = 0
        """How often the engine was made anew."""
        self._driver = self._start()

    def write(self, rows: Sequence[Row]) -> list[Written]:
        """The continuations of these rows, all in one batch.

        Raises:
            ModelError: a request is refused, there is no answer in time, or the engine died and cannot be made anew.
        """
        for attempt in itertools.count():
            driver = self._driver
            call = _Call(rows)
            driver.submit(call)
            try:
                found: list[Written] = call.answer.result(self._timeout_s)
                return found
            except FutureTimeoutError:
                self._give_up(driver, call)
                raise EngineAwayError(
                    f"vLLM gave no answer to {len(rows)} requests within {self._timeout_s:g} s"
                ) from None
            except EngineDiedError as error:
                if self._closed:
                    raise ModelError("the vLLM engine is closed") from error
                if attempt >= self._retries:
                    raise ModelError(f"{error}; it was made anew {attempt} times for one call") from error
                _log.warning("%s; it is made anew (attempt %d of %d)", error, attempt + 1, self._retries)
                self._replace(driver)
        raise AssertionError("unreachable")

    def load(self, name: str, path: Path) -> None:
        """Read an adapter under a name that was never used before.

        Raises:
            ModelError: vLLM cannot use it, or does not answer in time.
        """
        with self._lock:
            driver = self._driver
            self._adapters[name] = (next(self._numbers), path)
            request = driver.lora(name, *self._adapters[name])
            call = _Call(work=lambda engine: engine.add_lora(request))
            driver.submit(call)
            try:
                call.answer.result(self._timeout_s)
            except EngineDiedError:
                self._replace(driver)  # the new one has it from the start
            except Exception as error:
                del self._adapters[name]
                raise ModelError(
                    f"vLLM cannot use adapter {name!r}: {type(error).__name__}: {first_line(error)}"
                ) from error

    def unload(self, name: str) -> None:
        """Forget an adapter."""
        with self._lock:
            del self._adapters[name]
            self._driver.forget(name)

    def served(self) -> dict[str, Path]:
        """The adapters it knows, and their folders."""
        return {name: path for name, (_, path) in self._adapters.items()}

    @property
    def core_pid(self) -> int | None:
        """Process id of the engine's core; None while there is none."""
        engine = self._driver.engine
        if engine is None:
            return None
        return int(engine.engine_core.resources.engine_manager.processes[0].pid)

    def close(self) -> None:
        """End the engine's process."""
        with self._lock:
            self._closed = True
            self._driver.stop("it was closed")

    def _start(self) -> _Driver:
        began = time.monotonic()
        try:
            driver = _Driver(self._arguments)
        # vLLM raises almost anything from the depths of an engine that does not start.
        except Exception as error:
            raise ModelError(
                f"no vLLM engine for {self._arguments['model']!r}: {type(error).__name__}: {first_line(error)} "
                "(its own log says more: VLLM_LOGGING_LEVEL=INFO)"
            ) from error
        for name, (number, path) in self._adapters.items():
            driver.lora(name, number, path)
        _log.info("vLLM engine ready after %.1f s", time.monotonic() - began)
        return driver

    def _replace(self, dead: _Driver) -> None:
        """Put a new engine in the place of a dead one; of several callers the first does it."""
        with self._lock:
            if self._driver is not dead or self._closed:
                return
            dead.stop("it was replaced")
            self.restarts += 1
            self._driver = self._start()

    def _give_up(self, driver: _Driver, call: _Call) -> None:
        """Drop a call that took too long; an engine that cannot even do that is ended, and made anew by the next."""
        try:
            driver.abort(call).answer.result(_PATIENCE_S)
        except (FutureTimeoutError, EngineDiedError):
            driver.stop(f"it hung for more than {self._timeout_s:g} s")
