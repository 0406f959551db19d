"""No request body larger than a limit is read.

FastAPI's own ``max_body_size`` does not do: a declared length that is too large is answered in plain text,
whatever the handlers of errors say, and clients expect OpenAI's format. May be changed here: the default.
"""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ttt_compiler.serve.errors import TooLargeError

# Bytes. The longest contexts have some hundred thousand tokens of a few bytes each.
MAX_BODY = 8 * 2**20


class BodyLimit:
    """ASGI middleware: reads no more of a body than ``most`` bytes, and hands it on when it is whole."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it; the application never sees a body that is too large."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = int(dict(scope["headers"]).get(b"content-length", b"0"))
        body, more = bytearray(), True
        while more and max(declared, len(body)) <= self._most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if max(declared, len(body)) > self._most:
            error = TooLargeError(
                f"the body has more than {self._most} bytes (--max-body). Send less, or several requests"
            )
            return await JSONResponse(error.to_dict(), error.status)(scope, receive, send)
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return await self._app(scope, replay, send)
