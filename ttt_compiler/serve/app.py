"""The HTTP of the server: routes, errors in OpenAI's format, server-sent events.

May be changed here: routes. What a session is belongs to ``sessions.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ttt_compiler.serve.body_limit import MAX_BODY, BodyLimit
from ttt_compiler.serve.errors import (
    CancelledError,
    FailedError,
    InvalidRequestError,
    ServeError,
    UnknownModelError,
)
from ttt_compiler.serve.schemas import Answer, ChatRequest, ForkRequest
from ttt_compiler.serve.sessions import Sessions, Turn


def build_app(model_name: str, make_sessions: Callable[[], Sessions], *, max_body: int = MAX_BODY) -> FastAPI:
    """The application.

    Args:
        model_name: what requests call the model.
        make_sessions: called in the event loop when the server starts.
        max_body: bytes of a request at most.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.sessions = make_sessions()
        yield
        await app.state.sessions.close()

    # Redirects of trailing slashes would be answers without a body.
    app = FastAPI(title="ttt_compiler", lifespan=lifespan, redirect_slashes=False)
    _add_errors(app)
    app.add_middleware(BodyLimit, most=max_body)

    def sessions() -> Sessions:
        found: Sessions = app.state.sessions
        return found

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        if body.model != model_name:
            raise _unknown_model(body.model, model_name)
        turn = sessions().start(body.to_request())
        answer = Answer(f"chatcmpl-{uuid.uuid4().hex}", body)
        try:
            await _unless_gone(request, turn, turn.started if body.stream else turn.task)
            if body.stream and not (turn.task.done() and turn.task.exception()):
                return _TurnResponse(turn, _events(turn, answer, body.wants_usage))
            return JSONResponse(answer.whole(turn.task.result()))
        except BaseException:
            turn.cancel()
            raise

    entry = {"id": model_name, "object": "model", "created": 0, "owned_by": "ttt_compiler"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != model_name:
            raise _unknown_model(name, model_name)
        return entry

    @app.get("/v1/sessions")
    async def list_sessions() -> dict[str, Any]:
        data = [{"id": name, "object": "session"} for name in await sessions().names()]
        return {"object": "list", "data": data}

    @app.get("/v1/sessions/{name}")
    async def describe(name: str) -> dict[str, Any]:
        return await sessions().describe(name)

    @app.delete("/v1/sessions/{name}")
    async def delete(name: str) -> dict[str, Any]:
        await sessions().delete(name)
        return {"id": name, "object": "session.deleted", "deleted": True}

    @app.post("/v1/sessions/{name}/fork")
    async def fork(name: str, body: ForkRequest) -> dict[str, Any]:
        await sessions().fork(name, body.session)
        return await sessions().describe(body.session)

    @app.get("/health", response_model=None)
    async def health() -> Response:
        healthy = sessions().healthy
        return JSONResponse({"status": "ok" if healthy else "stopping"}, 200 if healthy else 503)

    return app


class _TurnResponse(StreamingResponse):
    """Server-sent events of a turn; a client that goes, at whatever point, cancels it."""

    def __init__(self, turn: Turn, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._turn = turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._turn.cancel()


async def _events(turn: Turn, answer: Answer, usage: bool) -> AsyncIterator[str]:
    yield _event(answer.chunk({"role": "assistant", "content": ""}))
    async for piece in turn.pieces():
        yield _event(answer.chunk({"content": piece}))
    try:
        finished = turn.task.result()
    except ServeError as e:
        # The status is long sent; clients take this event for an error.
        yield _event(e.to_dict())
        return
    yield _event(answer.chunk({}, finished.reply.finish_reason))
    if usage:
        yield _event(answer.usage(finished))
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def _unless_gone(request: Request, turn: Turn, until: asyncio.Future[Any]) -> None:
    """Wait until ``until`` is done or the turn has failed.

    Raises:
        CancelledError: the client has gone before that.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.create_task(gone())
    try:
        await asyncio.wait({watch, until, turn.task}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
    if not until.done() and not turn.task.done():
        raise CancelledError("the client has gone")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ServeError)
    async def refused(_: Request, e: ServeError) -> JSONResponse:
        # OpenAI's client repeats 409 and 5xx by itself, which helps only where waiting does.
        headers = {"x-should-retry": "true" if e.retry else "false"}
        return JSONResponse(e.to_dict(), e.status, headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, e: RequestValidationError) -> JSONResponse:
        first = e.errors()[0]
        where = _place(first, e.body)
        message = first["msg"].removeprefix("Value error, ")
        error = InvalidRequestError(f"{where}: {message}" if where else message, where or None)
        return JSONResponse(error.to_dict(), error.status)

    @app.exception_handler(HTTPException)
    async def other(request: Request, e: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {e.detail}"
        return JSONResponse(InvalidRequestError(message).to_dict(), e.status_code, e.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, e: Exception) -> JSONResponse:
        # uvicorn logs the traceback.
        return JSONResponse(FailedError().to_dict(), 500, {"x-should-retry": "false"})


def _unknown_model(asked: str, served: str) -> UnknownModelError:
    return UnknownModelError(f"the model {asked!r} is not served here, {served!r} is")


def _place(error: dict[str, Any], body: Any) -> str:
    """Where in the body an error is: of pydantic's path, the part that leads through what was sent."""
    kept = []
    # The path through a union names its branches too, and that of bad JSON is a number of bytes.
    for step in error["loc"][1:] if isinstance(body, dict) else ():
        if isinstance(body, dict) and (step in body or error["type"] == "missing"):
            body = body.get(step)
        elif isinstance(body, list) and isinstance(step, int):
            body = body[step]
        else:
            continue
        kept.append(str(step))
    return ".".join(kept)
