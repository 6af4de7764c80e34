"""The sessions of a service: found by name, asked one thing at a time, closed when nobody asks any more.

A turn is written in a thread and belongs to the session, not to the request: a client that lost its connection, or was
told to wait, asks for the same step again and gets the same turn.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from preconcert.core import Turn
from preconcert.serving.errors import ServiceError
from preconcert.serving.session import Decided, OnTurn, Session
from preconcert.serving.settings import ServiceSettings
from preconcert.serving.team import ServedTeam
from preconcert.serving.wire import AskBody, ObserveBody, SessionBody

Work = Callable[[OnTurn | None], Decided]


@dataclass(slots=True, eq=False)
class _Asked:
    """One step that is being decided, or was decided last."""

    step: int
    key: bytes
    """Of what was asked."""
    answer: asyncio.Future[Decided]
    turns: list[Turn] = field(default_factory=list)
    """Those that are ready, where they are wanted as they come."""
    news: asyncio.Event = field(default_factory=asyncio.Event)


class _Place:
    """A session and what is going on in it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.used = time.monotonic()
        self.asked: _Asked | None = None

    @property
    def busy(self) -> bool:
        return self.asked is not None and not self.asked.answer.done()


class Sessions:
    """All sessions of a service; to be used from its event loop.

    Args:
        team: plays.
        settings: limits.
        on_change: told how many are open, and why one was closed (None for one that was opened).
    """

    def __init__(
        self,
        team: ServedTeam,
        settings: ServiceSettings,
        on_change: Callable[[int, str | None], None] = lambda count, why: None,
    ) -> None:
        self.team = team
        self.settings = settings
        self._places: dict[str, _Place] = {}
        self._opening = 0
        self._on_change = on_change
        self._openers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="open")
        """Apart from the turns, so that neither waits for the other."""
        self._threads = ThreadPoolExecutor(max_workers=64, thread_name_prefix="session")
        self._hands = ThreadPoolExecutor(max_workers=128, thread_name_prefix="agent")
        self._running: set[asyncio.Future[Decided]] = set()

    def __len__(self) -> int:
        return len(self._places)

    async def open(self, body: SessionBody) -> Session:
        """A new session.

        Raises:
            ServiceError: there are too many, or it took too long; then there is none.
            PreconcertError: what is asked for cannot be played.
        """
        if len(self._places) + self._opening >= self.settings.max_sessions:
            self.expire()
        if len(self._places) + self._opening >= self.settings.max_sessions:
            raise ServiceError(
                503,
                "too_many_sessions",
                f"{self.settings.max_sessions} sessions are open, which is the limit; close one, or try again later",
                retry_after=self.settings.retry_after_s,
            )
        name = secrets.token_urlsafe(16)
        work = self._openers.submit(Session, name, self.team, body, self.settings, self._hands)
        opening = asyncio.wrap_future(work)
        self._opening += 1
        try:
            await asyncio.wait({opening}, timeout=self.settings.timeout_s)
        except BaseException:
            self._abandon(work, opening)
            raise
        if not opening.done():
            self._abandon(work, opening)
            raise ServiceError(
                503,
                "timeout",
                f"the session was not open within {self.settings.timeout_s:g} s; it will not be: open another one",
                retry_after=self.settings.retry_after_s,
            )
        self._opening -= 1
        session = opening.result()
        self._places[name] = _Place(session)
        self._on_change(len(self._places), None)
        return session

    def _abandon(self, work: Future[Session], opening: asyncio.Future[Session]) -> None:
        """Nobody waits for this session any more. It counts until its thread is free again."""

        def over(done: asyncio.Future[Session]) -> None:
            self._opening -= 1
            if not done.cancelled() and done.exception() is None:
                done.result().close()

        opening.add_done_callback(over)
        work.cancel()  # where it has not begun

    def get(self, name: str) -> Session:
        """A session by its name.

        Raises:
            ServiceError: there is none.
        """
        return self._place(name).session

    def close(self, name: str) -> None:
        """Close a session; a turn that is being written is finished first.

        Raises:
            ServiceError: there is none.
        """
        self._drop(self._place(name), "asked")

    def expire(self) -> None:
        """Close what nobody has asked for in a long time."""
        now = time.monotonic()
        for place in list(self._places.values()):
            if not place.busy and now - place.used > self.settings.idle_s:
                self._drop(place, "idle")

    async def observe(self, name: str, body: ObserveBody) -> Decided:
        """The agents' turns in the client's world; see `Session.observe`."""
        session = self.get(name)
        return await self._settled(self._ask(name, body, lambda on_turn: session.observe(body, on_turn)))

    async def advance(self, name: str, body: AskBody) -> Decided:
        """One step in the service's own world; see `Session.advance`."""
        return await self._settled(self._ask(name, body, self.get(name).advance))

    async def stream(self, name: str, body: AskBody) -> AsyncIterator[Turn | Decided]:
        """The same, each turn as it is ready, then all of them.

        Raises:
            ServiceError: it took too long; what was already given stays right.
        """
        session = self.get(name)
        if isinstance(body, ObserveBody):
            asked = self._ask(name, body, lambda on_turn: session.observe(body, on_turn), live=True)
        else:
            asked = self._ask(name, body, session.advance, live=True)
        given = 0
        deadline = time.monotonic() + self.settings.timeout_s
        while not asked.answer.done():
            asked.news.clear()
            for turn in asked.turns[given:]:
                yield turn
                given += 1
            if asked.answer.done():
                break
            waits = asyncio.ensure_future(asked.news.wait())
            either: set[asyncio.Future[Any]] = {waits, asked.answer}
            left = max(0.0, deadline - time.monotonic())
            done, _ = await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            waits.cancel()
            if not done:
                raise self._late(asked)
        decided = asked.answer.result()
        already = {turn.agent for turn in asked.turns[:given]}
        for turn in decided.turns:
            if turn.agent not in already:
                yield turn
        yield decided

    async def written(self, patience_s: float) -> bool:
        """Wait for every turn that is being written: are all of them there in time?"""
        return not self._running or not (await asyncio.wait(self._running, timeout=patience_s))[1]

    async def finish(self) -> None:
        """Wait for every turn that is being written, and close all sessions."""
        if self._running:
            await asyncio.wait(self._running)
        for place in list(self._places.values()):
            self._drop(place, "shutdown")
        self._openers.shutdown(wait=True, cancel_futures=True)
        self._threads.shutdown(wait=True)
        self._hands.shutdown(wait=True)

    def _ask(self, name: str, body: AskBody, work: Work, live: bool = False) -> _Asked:
        """Begin to decide a step, or find it begun or decided."""
        place = self._place(name)
        place.used = time.monotonic()
        key = _key_of(body)
        last = place.asked
        same = last is not None and body.step == last.step and key == last.key
        if last is not None and same and (not last.answer.done() or last.answer.exception() is None):
            return last
        if place.busy:
            assert last is not None
            raise ServiceError(
                409,
                "busy",
                f"session {name!r} is writing the turns of step {last.step}; ask for that step again to get them",
                retry_after=self.settings.retry_after_s,
            )
        if body.step is not None and body.step != place.session.step:
            raise ServiceError(
                409, "conflict", f"step = {body.step}, but session {name!r} is at step {place.session.step}"
            )
        loop = asyncio.get_running_loop()
        asked = _Asked(place.session.step, key, loop.create_future())

        def told(turn: Turn) -> None:
            def tell() -> None:
                asked.turns.append(turn)
                asked.news.set()

            loop.call_soon_threadsafe(tell)

        answer: asyncio.Future[Decided] = loop.run_in_executor(self._threads, work, told if live else None)
        asked.answer = answer
        place.asked = asked
        self._running.add(answer)

        def over(done: asyncio.Future[Decided]) -> None:
            self._running.discard(done)
            done.exception()  # looked at, also where nobody waits any more
            place.used = time.monotonic()
            if self._places.get(name) is not place:
                place.session.close()

        answer.add_done_callback(over)
        return asked

    async def _settled(self, asked: _Asked) -> Decided:
        done, _ = await asyncio.wait({asked.answer}, timeout=self.settings.timeout_s)
        if not done:
            raise self._late(asked)
        return asked.answer.result()

    def _late(self, asked: _Asked) -> ServiceError:
        return ServiceError(
            503,
            "timeout",
            f"the turns of step {asked.step} took longer than {self.settings.timeout_s:g} s; they are still being "
            "written: ask for that step again to get them",
            retry_after=self.settings.retry_after_s,
        )

    def _place(self, name: str) -> _Place:
        place = self._places.get(name)
        if place is None:
            raise ServiceError(
                404,
                "no_session",
                f"no session {name[:64]!r}; it was closed, or nobody asked for it in {self.settings.idle_s:g} s",
            )
        return place

    def _drop(self, place: _Place, why: str) -> None:
        del self._places[place.session.id]
        if not place.busy:
            place.session.close()
        self._on_change(len(self._places), why)


def _key_of(body: AskBody) -> bytes:
    """What a repeated request has in common with the first: everything but how it is answered."""
    asked = body.model_dump_json(exclude={"stream", "plan", "prompts", "replay"})
    return hashlib.blake2b(f"{type(body).__name__} {asked}".encode(), digest_size=16).digest()
