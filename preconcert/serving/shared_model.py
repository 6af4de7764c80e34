"""One language model for many threads.

Parts: `SharedModel`, a `LanguageModel` around another one that checks the length of every context, counts what passes,
and puts everything that waits into one call of the inner model, from threads of its own: one for a model that does one
thing at a time, several for one that batches by itself; `Engine`, what it asks when a call fails; `shared`.

Callers cannot see each other: what comes out of a batch does not depend on what else is in it, and where a batch fails,
each caller's part is tried alone, so that the error reaches the one who made it. Where the engine fails, all are told.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from preconcert.core import EngineAwayError, Latent, ModelError
from preconcert.models.language_model import (
    ChoiceRequest,
    Completion,
    GenerateRequest,
    LanguageModel,
    LatentModel,
    ScoreRequest,
    SpeakRequest,
)
from preconcert.serving.errors import ContextTooLongError


class Engine(Protocol):
    """Something that can die and come back."""

    @property
    def starts(self) -> int:
        """How often it has been started."""
        ...

    def recovered(self, starts: int) -> bool:
        """After a failed call: has the engine died since it had been started so often? Then wait until it is back.

        Raises:
            EngineDownError: it has not come back in time.
        """
        ...


@dataclass(slots=True)
class _Call:
    """What one thread waits for."""

    kind: str
    """A method of the model."""
    requests: Sequence[Any]
    """What goes into a batch; arguments for anything else."""
    batched: bool
    answer: Future[Any] = field(default_factory=Future)


_LINGER = 0.25
"""Share of a call's usual time for which those are waited for who were there last time."""
_LONGEST_LINGER_S = 0.5
_DEATHS = 2
"""How often an engine may die while it writes the same before that is taken for the reason."""
_PAUSES = 2
"""And no longer than this part of it without anybody coming."""
_WINDOW = 1.6
"""Usual times of a call for which those who were there count as company: their answers have just gone out."""


Meter = Callable[[int, float, int], None]
"""Told of every call of the inner model: rows, seconds, new tokens."""


class SharedModel:
    """A `LanguageModel` that many threads may use.

    Args:
        inner: the model.
        max_context: tokens of prompt and answer together.
        workers: calls of the inner model at once.
        engine: asked when a call fails; None passes every failure on.
        meter: told of every call.
    """

    def __init__(
        self,
        inner: LanguageModel,
        max_context: int,
        workers: int = 1,
        engine: Engine | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.inner = inner
        self.tokenizer: Any = inner.tokenizer
        """That of the model."""
        self.max_context = min(max_context, int(getattr(inner, "max_context", None) or max_context))
        self.meter = meter
        self._engine = engine
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._closed = False
        self._taking = threading.Lock()
        self._usual_s = 0.0
        """What a call takes, as a running mean."""
        self._answered: deque[tuple[float, int]] = deque(maxlen=64)
        """When calls of the model began, and how many callers each had."""
        self._threads = [
            threading.Thread(target=self._work, name=f"model-{number}", daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Those of the model."""
        return self.inner.adapters

    @property
    def codecs(self) -> Mapping[str, Any]:
        """How adapters write and read latent messages; none where the model does not say."""
        found: Mapping[str, Any] = getattr(self.inner, "codecs", {})
        return found

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """As `LanguageModel.generate`.

        Raises:
            ContextTooLongError: prompt and answer together are longer than allowed.
        """
        for request in requests:
            new = request.max_tokens
            if request.automaton is not None:
                new = min(new, request.automaton.longest)
            self._check(len(request.prompt_ids), new)
        return self._batch("generate", requests)

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[float, ...]]:
        """As `LanguageModel.score`."""
        for request in requests:
            self._check(len(request.prompt_ids), len(request.completion_ids))
        return self._batch("score", requests)

    def choose(self, requests: Sequence[ChoiceRequest]) -> list[tuple[float, ...]]:
        """As `LanguageModel.choose`."""
        for request in requests:
            self._check(len(request.prompt_ids), max(map(len, request.options), default=0))
        return self._batch("choose", requests)

    def add_adapter(self, name: str, seed: int, source: str | None = None) -> None:
        """As `LanguageModel.add_adapter`."""
        self._alone("add_adapter", name, seed, source)

    def load_adapter(self, name: str, path: Path) -> None:
        """As `LanguageModel.load_adapter`."""
        self._alone("load_adapter", name, path)

    def save_adapter(self, name: str, path: Path) -> None:
        """As `LanguageModel.save_adapter`."""
        self._alone("save_adapter", name, path)

    def close_session(self, session: str) -> None:
        """As `LanguageModel.close_session`; not waited for."""
        if not self._closed:
            self._queue.put(_Call("close_session", (session,), batched=False))

    def close(self) -> None:
        """Answer what waits, and take nothing more."""
        if self._closed:
            return
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout=30)
        close = getattr(self.inner, "close", None)
        if close is not None:
            close()

    def _check(self, prompt: int, new: int) -> None:
        if prompt + new > self.max_context:
            raise ContextTooLongError(
                f"a context of {prompt} tokens and {new} for the answer is longer than the limit of "
                f"{self.max_context} tokens"
            )

    def _batch(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        if not requests:
            return []
        answers: list[Any] = self._wait(_Call(kind, requests, batched=True))
        return answers

    def _alone(self, kind: str, *arguments: Any) -> None:
        self._wait(_Call(kind, arguments, batched=False))

    def _wait(self, call: _Call) -> Any:
        if self._closed:
            raise RuntimeError("the model is closed")
        self._queue.put(call)
        return call.answer.result()

    def _work(self) -> None:
        """Take all that waits, put equal kinds into one call, go on until told to stop."""
        while True:
            with self._taking:
                waiting = self._taken()
            calls = [call for call in waiting if call is not None]
            for kind in dict.fromkeys(call.kind for call in calls if call.batched):
                self._answer(kind, [call for call in calls if call.batched and call.kind == kind])
            for call in calls:
                if not call.batched:
                    _settle(call, partial(getattr(self.inner, call.kind), *call.requests))
            if None in waiting:
                return

    def _taken(self) -> list[_Call | None]:
        """All that waits, and those who are about to: whoever plays on asks again shortly after an answer, and a batch
        of one takes as long as one of all. Whoever is alone is never kept waiting."""
        waiting = [self._queue.get()]
        began = last = time.perf_counter()
        window = _WINDOW * self._usual_s
        company = sum(callers for when, callers in list(self._answered) if began - when < window)
        patience = min(_LONGEST_LINGER_S, _LINGER * self._usual_s)
        while waiting[-1] is not None:
            until = min(began + patience, last + patience / _PAUSES) if len(waiting) < company else 0.0
            left = until - time.perf_counter()
            try:
                waiting.append(self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait())
            except queue.Empty:
                break
            last = time.perf_counter()
        return waiting

    def _answer(self, kind: str, calls: Sequence[_Call]) -> None:
        self._answered.append((time.perf_counter(), len(calls)))
        if len(calls) == 1:
            _settle(calls[0], partial(self._patiently, kind, calls[0].requests))
            return
        try:
            answers = self._patiently(kind, [request for call in calls for request in call.requests])
        except EngineAwayError as error:  # of nobody in the batch: asking for each alone would only take as long again
            for call in calls:
                call.answer.set_exception(error)
            return
        except Exception:  # of somebody in the batch; each alone finds out whose
            for call in calls:
                self._answer(kind, [call])
            return
        start = 0
        for call in calls:
            call.answer.set_result(answers[start : start + len(call.requests)])
            start += len(call.requests)

    def _patiently(self, kind: str, requests: Sequence[Any]) -> Any:
        """Call the model, again if its engine died meanwhile: requests carry their seeds, so the answer is the same.

        Raises:
            ModelError: the engine died of it again and again; of a batch, each call is tried alone then.
        """
        for tries in itertools.count():
            starts = 0 if self._engine is None else self._engine.starts
            began = time.perf_counter()
            try:
                answers = getattr(self.inner, kind)(requests)
            except Exception:
                if self._engine is None or not self._engine.recovered(starts):
                    raise
                if self._engine.starts > starts and tries + 1 >= _DEATHS:
                    raise ModelError(
                        f"the engine died {_DEATHS} times while it wrote this; it is not asked again"
                    ) from None
                continue
            took = time.perf_counter() - began
            self._usual_s += 0.2 * (took - self._usual_s)
            if self.meter is not None:
                new = sum(len(answer.ids) for answer in answers) if kind == "generate" else 0
                self.meter(len(requests), took, new)
            return answers
        raise AssertionError("unreachable")


class SharedLatentModel(SharedModel):
    """The same where adapters also write latent messages."""

    def speak(self, requests: Sequence[SpeakRequest]) -> list[Latent]:
        """As `LatentModel.speak`."""
        for request in requests:
            self._check(len(request.ids), 0)
        return self._batch("speak", requests)


def shared(
    inner: LanguageModel,
    max_context: int,
    workers: int = 1,
    engine: Engine | None = None,
    meter: Meter | None = None,
) -> SharedModel:
    """A shared model that can whatever the inner one can; arguments as of `SharedModel`."""
    kind = SharedLatentModel if isinstance(inner, LatentModel) else SharedModel
    return kind(inner, max_context, workers, engine, meter)


def _settle(call: _Call, work: Callable[[], Any]) -> None:
    try:
        answer = work()
    except Exception as error:  # handed to the thread that waits for it
        call.answer.set_exception(error)
    else:
        call.answer.set_result(answer)
