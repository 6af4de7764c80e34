"""The application: routes of the service, their errors, its beginning and its end.

`create_app` takes whatever plays and whatever writes, so that tests run it on a model in their own process.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from preconcert import __version__
from preconcert.core import Episode, PreconcertError, Turn, describe, nearest
from preconcert.serving.engine import Embedded, Writer
from preconcert.serving.errors import ServiceError, clean, refusal_of
from preconcert.serving.guard import Guard, error_body, error_headers
from preconcert.serving.metrics import Metrics
from preconcert.serving.openai_routes import add_openai_routes
from preconcert.serving.reference import reference_page
from preconcert.serving.session import Decided, Session
from preconcert.serving.sessions import Sessions
from preconcert.serving.settings import ServiceSettings
from preconcert.serving.team import ServedTeam
from preconcert.serving.wire import (
    Answer,
    AskBody,
    ObserveBody,
    SeenBody,
    SessionAnswer,
    SessionBody,
    StepAnswer,
    StepBody,
    TurnAnswer,
)

_SWEEP_S = 5.0
"""Between looks for idle sessions, and at the engine."""


@dataclass(frozen=True, slots=True)
class Face:
    """What people see; made by the floors above."""

    page: str = "<!doctype html><title>preconcert</title><p>The API is described at <a href='/docs'>/docs</a>.</p>"
    """HTML of `/`."""
    replay: Callable[[Episode, bool], dict[str, Any]] | None = None
    """An episode as people read it; the flag says that it goes on."""


class Service:
    """What the routes share.

    Args:
        team: plays.
        settings: limits.
        writer: what writes.
        face: what people see.
        metrics: what is counted.
    """

    def __init__(
        self, team: ServedTeam, settings: ServiceSettings, writer: Writer, face: Face, metrics: Metrics
    ) -> None:
        self.team = team
        self.settings = settings
        self.writer = writer
        self.face = face
        self.metrics = metrics
        self.sessions = Sessions(team, settings, self._counted)
        self.closing = False

    def _counted(self, count: int, why: str | None) -> None:
        self.metrics.sessions.set(count)
        if why is None:
            self.metrics.opened.inc()
        else:
            self.metrics.closed.labels(why).inc()

    async def look_after(self) -> None:
        """Close idle sessions, now and then."""
        while True:
            self.sessions.expire()
            self.metrics.ready.set(self.writer.ready and not self.closing)
            await asyncio.sleep(min(_SWEEP_S, self.settings.idle_s / 2))

    def answer(self, session: Session, body: AskBody, decided: Decided) -> Answer:
        """One step as it is sent."""
        turns = tuple(TurnAnswer.of(turn, body.plan, body.prompts) for turn in decided.turns)
        for turn in turns:
            self.metrics.turn(turn)
        if decided.episode is None:
            return Answer(session=session.id, step=decided.step, turns=turns)
        episode = decided.episode
        last = {agent: each.turns[decided.step].reward for agent, each in episode.trajectories.items()}
        wanted = isinstance(body, StepBody) and body.replay
        return StepAnswer(
            session=session.id,
            step=decided.step,
            turns=turns,
            rewards=last,
            observations={agent: SeenBody.of(each.final_observation) for agent, each in episode.trajectories.items()},
            done=decided.done,
            success=episode.success,
            state=episode.states[-1],
            board=_board(session),
            replay=self.face.replay(episode, not decided.done) if wanted and self.face.replay else None,
        )

    def described(self, session: Session, replay: bool = False) -> SessionAnswer:
        """A session as it is sent."""
        spec = session.state.spec
        own = session.body.language is None
        draw = self.face.replay if own and replay else None
        return SessionAnswer(
            id=session.id,
            task=spec.task if own else None,
            params=dict(spec.params),
            instance=spec.seed,
            seed=session.body.seed,
            split=spec.split,
            temperature=session.temperature,
            plan=None if session.body.plan is None else session.body.plan.model_dump(mode="json"),
            agents=dict(session.assignment),
            step=session.step,
            horizon=session.horizon,
            done=session.done,
            observations={agent: SeenBody.of(seen) for agent, seen in session.first.items()},
            channel=self.team.channel.model_dump(mode="json"),
            replay=None if draw is None else draw(session.so_far(), not session.done),
        )


def create_app(
    team: ServedTeam,
    settings: ServiceSettings | None = None,
    writer: Writer | None = None,
    face: Face | None = None,
    metrics: Metrics | None = None,
) -> FastAPI:
    """The service as an ASGI application. Its end closes the team's model and the writer.

    Args:
        team: plays.
        settings: limits.
        writer: what writes; the embedded model if None.
        face: what people see.
        metrics: what is counted, where the team's model counts too.
    """
    settings, metrics = settings or ServiceSettings(), metrics or Metrics()
    if team.model.meter is None:
        team.model.meter = metrics.model_call
    metrics.agents = frozenset(team.assignment)
    service = Service(team, settings, writer or Embedded(), face or Face(), metrics)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(service.look_after())
        try:
            yield
        finally:
            service.closing = True
            watching.cancel()
            if not service.writer.ready:
                service.writer.give_up()
            if not await service.sessions.written(settings.timeout_s):
                await asyncio.to_thread(service.writer.close)  # an engine that hangs; who waits for it is told
            await service.sessions.finish()
            await asyncio.to_thread(team.model.close)
            await asyncio.to_thread(service.writer.close)

    app = FastAPI(
        title="preconcert",
        version=__version__,
        description=(
            f"A team that plays {team.task}. Open a session, then either say what the agents observe (`observe`) or "
            "let the service play its own world (`step`). Every agent also answers as a model of the OpenAI-compatible "
            "API."
        ),
        lifespan=life,
        docs_url=None,  # theirs load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    _add_errors(app)
    _add_pages(app, service)
    _add_sessions(app, service)
    add_openai_routes(app, team, settings, service.writer)
    return app


def _add_pages(app: FastAPI, service: Service) -> None:
    team, settings = service.team, service.settings

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return service.face.page

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def reference() -> str:
        return reference_page(app.openapi())

    @app.get("/health", tags=["service"])
    async def health() -> dict[str, Any]:
        """Does the process answer?"""
        return {"status": "ok", "version": __version__, "engine": service.writer.name}

    @app.get("/ready", tags=["service"])
    async def ready() -> dict[str, Any]:
        """Can turns be written now? 503 while the engine starts, and at the end."""
        if service.closing or not service.writer.ready:
            why = "the service is going down" if service.closing else f"{service.writer.name} is being started"
            raise ServiceError(503, "not_ready", why, retry_after=settings.retry_after_s)
        return {"status": "ready", "sessions": len(service.sessions)}

    @app.get("/metrics", tags=["service"], response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        service.metrics.ready.set(service.writer.ready and not service.closing)
        return Response(service.metrics.text(), headers={"content-type": service.metrics.content_type})

    @app.get("/v1/agents", tags=["sessions"])
    async def agents() -> dict[str, Any]:
        """Who plays, what can be said, and what the service allows."""
        language = team.language
        return {
            "task": team.task,
            "params": team.params,
            "agents": [{"name": name, "adapter": adapter} for name, adapter in team.assignment.items()],
            "adapters": list(team.model.adapters),
            "actions": list(language.actions),
            "message": [{"name": slot.name, "choices": list(slot.choices)} for slot in language.message],
            "forecast": [{"name": slot.name, "choices": list(slot.choices)} for slot in language.forecast],
            "spans": team.agents.spans.model_dump(mode="json"),
            "context": team.agents.context.value,
            "channel": team.channel.model_dump(mode="json"),
            "plans": team.world is not None,
            "engine": service.writer.name,
            "limits": {
                "sessions": settings.max_sessions,
                "context_tokens": team.model.max_context,
                "body_bytes": settings.max_body,
                "idle_s": settings.idle_s,
                "timeout_s": settings.timeout_s,
                "steps": settings.max_steps,
            },
        }


def _add_sessions(app: FastAPI, service: Service) -> None:
    sessions = service.sessions

    @app.post("/v1/sessions", tags=["sessions"], status_code=201, response_model=SessionAnswer)
    async def open_session(body: SessionBody, replay: bool = False) -> Response:
        """Open a session: an episode of the team's task, or of a world of your own with its own words."""
        if service.closing:
            after = service.settings.retry_after_s
            raise ServiceError(503, "not_ready", "the service is going down", retry_after=after)
        session = await sessions.open(body)
        return _sent(service.described(session, replay), 201)

    @app.get("/v1/sessions/{name}", tags=["sessions"], response_model=SessionAnswer)
    async def show_session(name: str) -> Response:
        """A session, and where it stands."""
        return _sent(service.described(sessions.get(name)))

    @app.delete("/v1/sessions/{name}", tags=["sessions"], status_code=204, response_class=Response)
    async def close_session(name: str) -> Response:
        """Close a session."""
        sessions.close(name)
        return Response(status_code=204)

    @app.post("/v1/sessions/{name}/observe", tags=["sessions"], response_model=Answer)
    async def observe(name: str, body: ObserveBody, request: Request) -> Response:
        """The agents' turns for what they see in your world; as one answer, or as events `turn` … `done`."""
        if _wants_events(body, request):
            return await _events(service, name, body)
        decided = await sessions.observe(name, body)
        return _sent(service.answer(sessions.get(name), body, decided))

    @app.post("/v1/sessions/{name}/step", tags=["sessions"], response_model=StepAnswer)
    async def step(name: str, request: Request, body: StepBody | None = None) -> Response:
        """One step of the service's own world: the agents' turns, and what came of them."""
        asked = body or StepBody()
        if _wants_events(asked, request):
            return await _events(service, name, asked)
        decided = await sessions.advance(name, asked)
        return _sent(service.answer(sessions.get(name), asked, decided))


async def _events(service: Service, name: str, body: AskBody) -> Response:
    """A step as server-sent events. What is refused before the first turn is an ordinary error."""
    session = service.sessions.get(name)
    coming = service.sessions.stream(name, body)
    first = await anext(coming)

    async def events() -> AsyncIterator[bytes]:
        each: Turn | Decided = first
        try:
            while True:
                if isinstance(each, Turn):
                    yield _event("turn", TurnAnswer.of(each, body.plan, body.prompts).model_dump_json())
                else:
                    yield _event("done", service.answer(session, body, each).model_dump_json())
                    return
                each = await anext(coming)
        except PreconcertError as error:
            yield _event("error", error_body(refusal_of(error)).decode())

    return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})


def _event(kind: str, data: str) -> bytes:
    return f"event: {kind}\ndata: {data}\n\n".encode()


def _sent(answer: BaseModel, status: int = 200) -> Response:
    # Written by pydantic at once: going through plain values first takes as long as a turn of a small model.
    return Response(answer.model_dump_json(), status, media_type="application/json")


def _wants_events(body: AskBody, request: Request) -> bool:
    return body.stream or "text/event-stream" in request.headers.get("accept", "")


def _board(session: Session) -> tuple[str, ...]:
    draw = getattr(session.state.env, "board", None)
    return () if draw is None else tuple(str(row) for row in draw())


def _add_errors(app: FastAPI) -> None:
    def refused(error: ServiceError) -> Response:
        return Response(error_body(error), error.status, headers=error_headers(error))

    async def ours(request: Request, error: Exception) -> Response:
        return refused(refusal_of(error))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return refused(_misfit(request, error))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        if error.status_code == 404:
            paths = [getattr(route, "path", "") for route in app.routes]
            return refused(ServiceError(404, "not_found", f"no path {path[:128]!r}; {nearest(path, paths)}"))
        if error.status_code == 405:
            return refused(ServiceError(405, "wrong_method", f"{request.method} is not what {path!r} takes"))
        return refused(ServiceError(error.status_code, "invalid_request", str(error.detail)))

    app.add_exception_handler(PreconcertError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


class _Errors:
    """The errors of a body, without the place that all of them have in common."""

    def __init__(self, found: list[dict[str, Any]]) -> None:
        self.found = found

    def errors(self, *, include_url: bool = True) -> list[dict[str, Any]]:
        """As pydantic lists them."""
        return self.found


def _misfit(request: Request, error: RequestValidationError) -> ServiceError:
    found = [dict(each) for each in error.errors()]
    first = found[0]
    where, *rest = first["loc"]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", first["msg"])
        return ServiceError(400, "invalid_json", f"the body is no JSON: {why}")
    if where != "body":
        return ServiceError(422, "invalid_request", f"{where} {'.'.join(map(str, rest))}: {first['msg']}")
    field = getattr(request.scope.get("route"), "body_field", None)
    annotation = getattr(getattr(field, "field_info", None), "annotation", None)
    model = next(
        (each for each in (annotation, *getattr(annotation, "__args__", ())) if _is_model(each)), BaseModel
    )
    if not isinstance(error.body, dict):
        keys = ", ".join(model.model_fields)
        return ServiceError(422, "invalid_request", f"the body must be a JSON object with keys of {keys}")
    for each in found:
        each["loc"] = tuple(each["loc"][1:])
    return ServiceError(422, "invalid_request", clean(describe(_Errors(found), model, error.body))[:1000])


def _is_model(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, BaseModel)
