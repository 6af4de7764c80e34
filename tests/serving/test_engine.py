"""An engine that dies: what repeats it, who is told, and how it ends. Stand-ins for vLLM; nothing is started."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from preconcert.core import ModelError
from preconcert.models import Completion, GenerateRequest
from preconcert.models.language_model import CompletionEnd
from preconcert.serving.engine import Supervised
from preconcert.serving.shared_model import shared

DEADLY = 13


class Mortal:
    """An engine and the model on it: a prompt with one token kills it, and it comes back."""

    name = "mortal"
    ready = True
    tokenizer = None

    def __init__(self) -> None:
        self.starts, self.calls = 1, 0
        self.adapters: tuple[str, ...] = ()

    def recovered(self, starts: int) -> bool:
        return self.starts > starts

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.calls += 1
        time.sleep(0.05)
        if any(DEADLY in request.prompt_ids for request in requests):
            self.starts += 1
            raise ConnectionError("gone")
        return [Completion((1,), (0.0,), (True,), CompletionEnd.LENGTH) for _ in requests]


def test_what_kills_the_engine_is_not_repeated_for_ever() -> None:
    engine: Any = Mortal()
    model = shared(engine, 100, engine=engine)
    found: dict[int, Any] = {}

    def ask(token: int) -> None:
        try:
            found[token] = model.generate([GenerateRequest((token,), seed=0, max_tokens=1)])[0].ids
        except ModelError as error:
            found[token] = error

    threads = [threading.Thread(target=ask, args=(token,)) for token in (1, DEADLY, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert {token: found[token] for token in (1, 2, 3)} == {1: (1,), 2: (1,), 3: (1,)}, "the others get their answers"
    assert "died 2 times" in str(found[DEADLY])
    assert engine.calls <= 10
    model.close()


class Slow:
    """A server that is dead, and takes for ever to come up again."""

    url = "http://nowhere"
    log = "none"

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.restarting = threading.Event()

    pid = None

    def alive(self) -> bool:
        return False

    def restart(self) -> None:
        self.restarting.set()
        if self.stopped.wait(60):
            raise ModelError("it ended")

    def stop(self) -> None:
        self.stopped.set()


def test_an_engine_that_is_just_being_started_again_is_ended_at_once() -> None:
    server: Any = Slow()
    engine = Supervised(server)
    engine._look.set()
    assert server.restarting.wait(20)
    began = time.perf_counter()
    engine.close()
    assert server.stopped.is_set()
    assert time.perf_counter() - began < 10
    assert not engine._thread.is_alive()
