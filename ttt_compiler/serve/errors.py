"""Why the server refuses a request: one class per reason, each with its HTTP status.

May be changed here: new classes and wording. ``code`` is what programs compare, so it never changes.
"""

from __future__ import annotations

from typing import Any

from ttt_compiler.errors import TTTError


class ServeError(TTTError):
    """Base class: a request that cannot be served, and what to send instead.

    Attributes:
        status: of the HTTP response.
        code: for programs.
        param: the field of the request that is to blame, if one is.
        retry: whether the same request may work later; clients that retry by themselves ask this.
    """

    status = 400
    code = "invalid_request"
    param: str | None = None
    retry = False

    def to_dict(self) -> dict[str, Any]:
        """The answer's JSON, in OpenAI's format."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class InvalidRequestError(ServeError):
    """A field of the request is wrong."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class TooLargeError(ServeError):
    """The body is longer than the server reads."""

    status, code = 413, "too_large"


class UnknownModelError(ServeError):
    """The request names another model than the one served."""

    status, code, param = 404, "model_not_found", "model"


class UnknownSessionError(ServeError):
    """No session of this name."""

    status, code, param = 404, "session_not_found", "session"


class SessionExistsError(ServeError):
    """A fork would overwrite a session."""

    status, code, param = 409, "session_exists", "session"


class ConversationConflictError(ServeError):
    """The messages contradict what the session has read; nothing was read."""

    status, code, param = 409, "session_conflict", "messages"


class ContextLengthError(ServeError):
    """Conversation and reply do not fit into the model's context."""

    code, param = "context_length_exceeded", "messages"


class BusyError(ServeError):
    """No room for one more session in memory."""

    status, code, retry = 503, "sessions_full", True


class StoredSessionError(ServeError):
    """A saved session is damaged, or of another model; the files are untouched."""

    status, code, param = 500, "session_unreadable", "session"


class CancelledError(ServeError):
    """The client has gone, or the server stops; the session stands where it stood before the request."""

    status, code, retry = 499, "cancelled", True


class FailedError(ServeError):
    """Something else went wrong; the session stands where it stood before the request."""

    status, code = 500, "internal_error"

    def __init__(self, message: str = "the server's log says why") -> None:
        super().__init__(f"the request failed inside of the server and changed nothing: {message}")
