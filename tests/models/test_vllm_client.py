"""The client of a vLLM server whose server is slow, gone, or closes idle connections. No vLLM: the server is a fake."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from preconcert.core import EngineAwayError
from preconcert.models.vllm_client import ServerEngine
from preconcert.models.vllm_settings import VLLMSettings


class Fake:
    """Answers `/v1/models`; what becomes of each request that comes is said by its number."""

    def __init__(self, becomes: Callable[[int], str]) -> None:
        self.becomes = becomes
        self.asked = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                line, _ = self._listening.accept()
                threading.Thread(target=self._answer, args=(line,), daemon=True).start()

    def _answer(self, line: socket.socket) -> None:
        with contextlib.suppress(OSError), line:
            while line.recv(65536):
                self.asked += 1
                match self.becomes(self.asked):
                    case "broken":
                        return
                    case "late":
                        time.sleep(2.0)
                body = json.dumps({"data": [{"id": "base"}]}).encode()
                line.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))


class Client(ServerEngine):
    """Without the question that only a vLLM server answers."""

    def _check_flags(self) -> None: ...


@pytest.fixture
def connected() -> Iterator[Callable[..., tuple[Client, Fake]]]:
    with contextlib.ExitStack() as stack:

        def make(becomes: Callable[[int], str], **settings: Any) -> tuple[Client, Fake]:
            fake = stack.enter_context(contextlib.closing(Fake(becomes)))
            config: Any = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=10))
            client = Client(VLLMSettings(url=fake.url, retries=0, **settings), config)
            return stack.enter_context(contextlib.closing(client)), fake

        yield make


def test_a_connection_that_was_closed_just_then_is_made_anew(connected: Callable[..., tuple[Client, Fake]]) -> None:
    client, fake = connected(lambda number: "broken" if number == 2 else "answered")
    assert client.served() == {}
    assert fake.asked == 3, "the one that broke, and one more"


def test_it_is_made_anew_once(connected: Callable[..., tuple[Client, Fake]]) -> None:
    client, fake = connected(lambda number: "answered" if number == 1 else "broken")
    with pytest.raises(EngineAwayError, match="is away"):
        client.served()
    assert fake.asked == 3


def test_no_answer_in_time_is_the_engines_fault(connected: Callable[..., tuple[Client, Fake]]) -> None:
    client, fake = connected(lambda number: "answered" if number == 1 else "late", timeout_s=0.3)
    with pytest.raises(EngineAwayError, match=r"gave no answer within 0\.3 s"):
        client.served()
    assert fake.asked == 2, "what takes too long is not asked again"


def test_nobody_there(connected: Callable[..., tuple[Client, Fake]]) -> None:
    client, fake = connected(lambda number: "answered" if number == 1 else "broken")
    fake.close()
    with pytest.raises(EngineAwayError, match="after 0 retries"):
        client.served()
