"""How vLLM is run: the settings alone, which need no vLLM."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class VLLMSettings(BaseModel):
    """An engine of our own, or a server that is running."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str | None = None
    """An OpenAI-compatible vLLM server started with `preconcert`'s flags; null: an engine of our own."""
    max_context: int | None = Field(None, ge=8)
    """Longest context in tokens; null: the model's own limit, at most 4096."""
    max_rows: int = Field(256, ge=1)
    """Sequences at once."""
    memory: float = Field(0.5, gt=0)
    """On a GPU the share of the card's memory; on a CPU GiB of key-value cache."""
    prefix_caching: bool = True
    """Keep what prompts have in common."""
    latents: bool = False
    """Take prompts as embeddings, which latent messages need."""
    timeout_s: float = Field(120.0, gt=0)
    """Longest wait for an answer, in seconds."""
    retries: int = Field(5, ge=0)
    """How often a call is repeated after the server went away or the engine died, with longer and longer pauses."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs that share one copy of the base."""
    max_adapters: int = Field(8, ge=1)
    """Adapters held at once."""
    api_key: str | None = None
    """Sent to the server at `url`."""
