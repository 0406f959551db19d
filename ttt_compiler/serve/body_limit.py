"""No request body larger than a limit is read. May be changed here: the limit."""

from __future__ import annotations

import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Bytes. The longest contexts have some hundred thousand tokens of a few bytes each.
MOST_BODY = 8 << 20


class BodyLimit:
    """ASGI middleware: 413, in OpenAI's format, once a body grows beyond ``most`` bytes."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what is received; the application never sees a body that is too large."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        parts: list[Message] = []
        size = 0
        while True:
            message = await receive()
            parts.append(message)
            size += len(message.get("body", b""))
            if size > self.most:
                await self._refuse(send)
                return
            if message["type"] != "http.request" or not message.get("more_body", False):
                break

        async def replayed() -> Message:
            return parts.pop(0) if parts else await receive()

        await self.app(scope, replayed, send)

    async def _refuse(self, send: Send) -> None:
        said = f"the request has more than {self.most} bytes: send less text"
        error = {"message": said, "type": "invalid_request_error", "param": None, "code": "too_large"}
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
