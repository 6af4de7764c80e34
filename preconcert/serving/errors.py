"""What the service refuses: a status, a type that programs read, and one line that people read."""

from __future__ import annotations

from preconcert.core import ConfigError, EngineAwayError, EnvError, GrammarError, ModelError, PreconcertError


class ServiceError(PreconcertError):
    """An answer that is an error.

    Args:
        status: of HTTP.
        type: for programs; lower case with underscores.
        message: one line that names the thing and the value.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(self, status: int, type: str, message: str, retry_after: int | None = None) -> None:
        self.status, self.type, self.retry_after = status, type, retry_after
        super().__init__(status, type, message, retry_after)

    def __str__(self) -> str:
        return str(self.args[2])


class ContextTooLongError(ModelError):
    """A prompt that the model, or the service, does not take."""


class EngineDownError(EngineAwayError):
    """The engine died and has not come back in time."""


def refusal_of(error: Exception) -> ServiceError:
    """What an exception of the package means to a client.

    Raises:
        Exception: the same one, where it is nobody's request that is at fault.
    """
    match error:
        case ServiceError():
            return error
        case ContextTooLongError():
            return ServiceError(422, "context_too_long", str(error))
        case EngineAwayError():
            return ServiceError(503, "engine_down", str(error), retry_after=5)
        case ConfigError() | GrammarError() | EnvError() | ModelError():
            return ServiceError(422, "invalid_request", str(error))
    raise error


def clean(text: str) -> str:
    """One line that can be sent: no line breaks, and no halves of characters."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode("utf-8").split())
