"""What the service counts, for Prometheus. Each service has a registry of its own."""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from preconcert.serving.wire import TurnAnswer

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The service's figures."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.agents: Collection[str] = ()
        """Those that are counted by name: the team's; clients may invent others."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "preconcert_requests", "Requests answered.", ["method", "route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "preconcert_request_seconds",
            "From a request's first byte to its answer's last.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.running = Gauge(
            "preconcert_requests_running", "Requests being answered, those of open paths left out.", registry=registry
        )
        self.disconnects = Counter(
            "preconcert_disconnects", "Clients that did not wait for their answer.", registry=registry
        )
        self.turns = Counter("preconcert_turns", "Turns written.", ["agent", "malformed"], registry=registry)
        self.tokens = Counter(
            "preconcert_tokens", "Tokens read (prompt) and written (completion).", ["kind"], registry=registry
        )
        self.sessions = Gauge("preconcert_sessions", "Sessions open.", registry=registry)
        self.opened = Counter("preconcert_sessions_opened", "Sessions opened.", registry=registry)
        self.closed = Counter("preconcert_sessions_closed", "Sessions closed.", ["why"], registry=registry)
        self.calls = Histogram(
            "preconcert_model_seconds", "Of one call of the model.", buckets=_SECONDS, registry=registry
        )
        self.rows = Histogram(
            "preconcert_model_rows", "Sequences in one call of the model.", buckets=_ROWS, registry=registry
        )
        self.restarts = Counter(
            "preconcert_engine_restarts", "How often the engine was started again.", registry=registry
        )
        self.ready = Gauge("preconcert_ready", "1 while turns can be written.", registry=registry)
        # Memory, processor time and open files of this process.
        ProcessCollector(registry=self.registry)

    def model_call(self, rows: int, seconds: float, tokens: int) -> None:
        """One call of the model: rows, seconds, new tokens."""
        self.rows.observe(rows)
        self.calls.observe(seconds)
        self.tokens.labels("completion").inc(tokens)

    def turn(self, turn: TurnAnswer) -> None:
        """One turn that was written."""
        self.turns.labels(turn.agent if turn.agent in self.agents else "other", str(turn.malformed).lower()).inc()
        self.tokens.labels("prompt").inc(turn.prompt_tokens)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)
