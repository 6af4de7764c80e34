"""Limits of the service. Everything that a client can make grow has one."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ServiceSettings(BaseModel):
    """What the service allows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    api_key: str | None = None
    """Asked of every request as `Authorization: Bearer KEY`; None asks for none."""
    max_sessions: int = Field(256, ge=1)
    """Open at once; beyond, 503 until one is closed or expires."""
    idle_s: float = Field(600.0, gt=0)
    """A session that nobody asked anything of for so long is closed."""
    max_body: int = Field(262_144, ge=1024)
    """Bytes of a request's body."""
    body_timeout_s: float = Field(15.0, gt=0)
    """In which a request's body must have come."""
    max_context: int = Field(4096, ge=8)
    """Tokens of prompt and answer together; never more than the model takes."""
    timeout_s: float = Field(120.0, gt=0)
    """Until a request is answered with 503. The turn goes on being written: asking again for the same step gets it."""
    max_requests: int = Field(256, ge=1)
    """Being answered at once; beyond, 503."""
    max_steps: int = Field(1000, ge=1)
    """Of a session whose world is the client's, or whose task has parameters of the client's; rounds of talk count."""
    max_plan: int = Field(4096, ge=1)
    """What one planned turn may cost: turns sampled from the policy and steps of the world model, together."""
    retry_after_s: int = Field(2, ge=1)
    """What a 503 asks to wait."""
