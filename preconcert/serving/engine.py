"""What writes the turns: the embedded model, or a vLLM server that is started again when it dies.

Parts: `Embedded`, `Supervised`, and `Writer`, what both are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from preconcert.core import PreconcertError
from preconcert.models.vllm_server import VLLMServer
from preconcert.serving.errors import EngineDownError

_LOG = logging.getLogger("preconcert.serving")
_LOOK_S = 0.5
"""How often the server is looked after."""
_UNWELL = 12
"""Looks in a row at which a server that runs does not say that it is well, until it counts as dead."""


class Writer(Protocol):
    """An engine as the service sees it."""

    name: str
    """`transformers` or `vllm`."""
    url: str | None
    """Where it answers itself; None for one in this process."""

    @property
    def ready(self) -> bool:
        """Can turns be written now?"""
        ...

    def give_up(self) -> None:
        """Keep nobody waiting who waits for it to come back."""
        ...

    def close(self) -> None:
        """Let it go."""
        ...


class Embedded:
    """A model in this process."""

    name = "transformers"
    url: str | None = None
    ready = True

    def give_up(self) -> None:
        """It is never away."""

    def close(self) -> None:
        """Nothing to let go."""


class Supervised:
    """A vLLM server, looked after by a thread.

    Args:
        server: which has been started.
        patience_s: how long a turn waits for it to come back. Whoever asked for it has been told to ask again by then.
        on_restart: told whenever it was started again.
    """

    name = "vllm"

    def __init__(
        self, server: VLLMServer, patience_s: float = 900.0, on_restart: Callable[[], None] = lambda: None
    ) -> None:
        self.server = server
        self.url: str | None = server.url
        self.on_restart = on_restart
        self._patience_s = patience_s
        self._starts = 1
        self._ready = True
        self._closing = threading.Event()
        self._look = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._watch, name="vllm-watch", daemon=True)
        self._thread.start()

    @property
    def starts(self) -> int:
        """How often it has been started."""
        return self._starts

    @property
    def ready(self) -> bool:
        """Can turns be written now?"""
        return self._ready

    def recovered(self, starts: int) -> bool:
        """After a failed call: has it died since it had been started so often? Then wait until it is back.

        Raises:
            EngineDownError: it has not come back in time.
        """
        if self._starts == starts and self._ready and self.server.alive():
            return False
        self._look.set()
        deadline = time.monotonic() + self._patience_s
        with self._changed:
            while not (self._ready and self._starts > starts):
                if self._closing.is_set() or not self._changed.wait(min(1.0, max(0.0, deadline - time.monotonic()))):
                    if self._ready and self._starts == starts and self.server.alive():
                        return True  # it was only slow to answer
                    if self._closing.is_set() or time.monotonic() >= deadline:
                        raise EngineDownError(f"vLLM is away, and did not come back within {self._patience_s:g} s")
        return True

    def give_up(self) -> None:
        """Keep nobody waiting who waits for it to come back."""
        self._closing.set()
        self._look.set()

    def close(self) -> None:
        """End the server, also one that is just being started again."""
        self.give_up()
        self._thread.join(timeout=1)
        self.server.stop()  # whoever waits for it to answer sees that it has ended
        self._thread.join(timeout=60)
        self.server.stop()  # one that was started in between

    def _watch(self) -> None:
        unwell = 0
        while not self._closing.is_set():
            self._look.wait(_LOOK_S)
            self._look.clear()
            if self._closing.is_set():
                return
            if self.server.alive():
                unwell = 0
                self._say(True)
                continue
            unwell += 1
            if self.server.pid is not None and unwell < _UNWELL:
                continue
            self._say(False)
            _LOG.warning("vLLM died; it is started again (its log: %s)", self.server.log)
            try:
                self.server.restart()
            except PreconcertError as error:
                _LOG.error("vLLM did not start: %s", error)
                self._closing.wait(5.0)
                continue
            unwell = 0
            with self._changed:
                self._starts += 1
                self._ready = True
                self._changed.notify_all()
            _LOG.warning("vLLM is back")
            self.on_restart()

    def _say(self, ready: bool) -> None:
        with self._changed:
            if self._ready != ready:
                self._ready = ready
                self._changed.notify_all()
