"""Which session a request runs on, and what becomes of it.

A request runs on a fork of its session, which takes the session's place once the reply is complete and on
disk. Whatever ends it before that (an error, a client that leaves, a crash) leaves the session as it was.
Requests on one session run in the order they came in; those on different ones side by side. May be changed
here: the life of a session. All of it runs in one event loop, but for what ``to_thread`` and the worker do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
from collections.abc import AsyncIterator, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ttt_compiler.errors import TTTError
from ttt_compiler.serve.conversation import (
    ChatTemplate,
    Conversation,
    Message,
    Mode,
    new_messages,
)
from ttt_compiler.serve.engine import Engine, Reply
from ttt_compiler.serve.errors import (
    CancelledError,
    FailedError,
    InvalidRequestError,
    ServeError,
    SessionExistsError,
    UnknownSessionError,
)
from ttt_compiler.serve.residents import Residents
from ttt_compiler.serve.sampling import Sampling
from ttt_compiler.serve.store import Live, Store
from ttt_compiler.serve.worker import Worker

_NAME = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,64}", re.ASCII)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What a chat completion asks for. ``session`` None: a session that is dropped afterwards."""

    messages: tuple[Message, ...]
    session: str | None = None
    mode: Mode = "auto"
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Finished:
    """A complete reply.

    Attributes:
        reply: what was generated.
        prompt: tokens of the conversation before it.
        cached: how many of these the session had read before the request.
    """

    reply: Reply
    prompt: int
    cached: int


class Turn:
    """A request on its way.

    Attributes:
        task: gives :class:`Finished`, or raises; then the session is as it was.
        started: done when the request is accepted and its session is its own.
    """

    task: asyncio.Task[Finished]

    def __init__(self) -> None:
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.cancelled = threading.Event()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()

    def cancel(self) -> None:
        """Stop soon, unless the reply is complete."""
        self.cancelled.set()

    async def pieces(self) -> AsyncIterator[str]:
        """Text as it comes; ends with the task."""
        while (piece := await self._pieces.get()) is not None:
            yield piece

    def show(self, piece: str | None) -> None:
        """Hand on a piece of text; None ends them."""
        if piece != "":
            self._pieces.put_nowait(piece)


@dataclass
class _Entry:
    """A named session's place in the order of requests."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    live: Live | None = None


class Sessions:
    """All sessions of a server. Make it in the event loop that uses it.

    Args:
        engine: runs the model.
        template: renders messages.
        store: where named sessions are kept; None keeps them in memory alone.
        limit: sessions in memory at most. A running request holds a fork beside its session.
    """

    def __init__(self, engine: Engine, template: ChatTemplate, store: Store | None, limit: int) -> None:
        self._engine, self._template, self._store = engine, template, store
        self._worker = Worker()
        self._residents = Residents(limit, evictable=store is not None)
        self._entries: dict[str, _Entry] = {}
        self._turns: set[Turn] = set()
        self._closed = False

    @property
    def healthy(self) -> bool:
        """Whether requests are being served."""
        return self._worker.alive and not self._closed

    def start(self, request: Request) -> Turn:
        """Accept a request; its place among those on its session is taken now.

        Raises:
            InvalidRequestError: the session's name is none.
        """
        if request.session is not None:
            check_name(request.session)
        turn = Turn()
        if self._closed:
            turn.cancel()
        self._turns.add(turn)
        turn.task = asyncio.create_task(self._run(turn, request))
        turn.task.add_done_callback(lambda task: self._ended(turn, task))
        return turn

    async def names(self) -> list[str]:
        """All named sessions, in memory or saved."""
        saved = [] if self._store is None else await asyncio.to_thread(self._store.names)
        return sorted({*saved, *(name for name, e in self._entries.items() if e.live is not None)})

    async def describe(self, name: str) -> dict[str, Any]:
        """What a session has read and holds, JSON-ready, between two requests.

        Raises:
            UnknownSessionError: there is none.
        """
        check_name(name)
        entry = self._entries.get(name)
        live = entry.live if entry is not None else None
        if live is not None:
            conversation, numbers = live.conversation, live.session.describe()
        elif self._store is not None and self._store.has(name):
            conversation, numbers = await asyncio.to_thread(self._store.describe, name)
        else:
            raise _unknown(name)
        messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
        return {
            **numbers,  # first: from a file, and never in place of what follows
            "id": name,
            "object": "session",
            "in_memory": live is not None,
            "conversation_tokens": len(conversation.ids),
            "messages": messages,
        }

    async def delete(self, name: str) -> None:
        """Forget a session, after the requests it has.

        Raises:
            UnknownSessionError: there is none.
        """
        async with self._hold(check_name(name)) as entry:
            if not self._exists(name, entry):
                raise _unknown(name)
            entry.live = None
            self._residents.remove(name)
            if self._store is not None:
                await asyncio.to_thread(self._store.delete, name)

    async def fork(self, name: str, target: str) -> None:
        """Make a session ``target`` that stands where ``name`` stands after the requests it has.

        Raises:
            UnknownSessionError, SessionExistsError, BusyError: nothing changed.
        """
        check_name(name), check_name(target)
        async with self._hold(name) as entry:
            if not self._exists(name, entry):
                raise _unknown(name)
            live = entry.live
            if live is None:
                assert self._store is not None
                live = await asyncio.to_thread(self._store.load, name)
        async with self._hold(target) as entry:
            if self._exists(target, entry):
                raise SessionExistsError(
                    f"there is a session {target!r} already. Delete it, or fork to another"
                )
            with self._resident(target, entry):
                branch = Live(await asyncio.to_thread(live.session.fork), live.conversation)
                await self._commit(target, entry, branch)

    async def close(self) -> None:
        """Cancel what runs and let go of the folder; sessions are saved after each request already."""
        self._closed = True
        for turn in self._turns:
            turn.cancel()
        if self._turns:
            await asyncio.wait([turn.task for turn in self._turns])
        self._worker.stop()
        if self._store is not None:
            self._store.close()

    async def _run(self, turn: Turn, request: Request) -> Finished:
        try:
            return await self._serve(turn, request)
        except ServeError:
            raise
        except Exception as e:
            _log.exception("a request failed; its session stands where it stood before")
            raise (FailedError(str(e)) if isinstance(e, TTTError) else FailedError()) from e

    async def _serve(self, turn: Turn, request: Request) -> Finished:
        name = request.session
        if name is None:
            key = object()
            with self._resident(key, _Entry()):
                finished, _ = await self._reply(turn, request, Live(self._engine.new_session()))
            return finished
        async with self._hold(name) as entry:
            if turn.cancelled.is_set():
                raise CancelledError("the request was cancelled before its turn came")
            with self._resident(name, entry):
                if entry.live is None and self._store is not None and self._store.has(name):
                    entry.live = await asyncio.to_thread(self._store.load, name)
                live = entry.live or Live(self._engine.new_session())
                fork = Live(await asyncio.to_thread(live.session.fork), live.conversation)
                finished, after = await self._reply(turn, request, fork)
                await self._commit(name, entry, after)
        return finished

    async def _reply(self, turn: Turn, request: Request, live: Live) -> tuple[Finished, Live]:
        """Advance ``live``, which nobody else has; returns it with the conversation after the reply."""
        session, before = live.session, live.conversation
        new = new_messages(before.messages, request.messages, request.mode)
        self._engine.check_size(len(before.ids), [m.content for m in new])
        render = self._template.following if before.messages else self._template.first
        args = (before.messages, new) if before.messages else (new,)
        ids = (*before.ids, *await asyncio.to_thread(render, *args))
        limit = self._engine.max_tokens(len(ids), request.sampling)
        seen = session.tokens_seen[0]
        if len(ids) == seen:
            raise InvalidRequestError("the messages hold no token to read", "messages")
        turn.started.set_result(None)
        replies: list[Reply] = []
        steps = self._engine.steps(session, ids[seen:], request.sampling, limit, ids[:seen])
        await self._worker.run(
            steps, lambda x: replies.append(x) if isinstance(x, Reply) else turn.show(x), turn.cancelled
        )
        (reply,) = replies
        messages = (*before.messages, *new, Message("assistant", reply.text))
        after = Live(session, Conversation(messages, (*ids, *reply.ids)))
        return Finished(reply, len(ids), seen), after

    async def _commit(self, name: str, entry: _Entry, live: Live) -> None:
        """From here on the session stands where ``live`` stands, after a crash too."""
        if self._store is not None:
            await asyncio.to_thread(self._store.save, name, live)
        entry.live = live

    @contextlib.asynccontextmanager
    async def _hold(self, name: str) -> AsyncIterator[_Entry]:
        """Wait for a session and keep others from it."""
        entry = self._entries.setdefault(name, _Entry())
        entry.users += 1
        try:
            async with entry.lock:
                yield entry
        finally:
            entry.users -= 1
            self._forget_if_idle(name, entry)

    @contextlib.contextmanager
    def _resident(self, key: Hashable, entry: _Entry) -> Iterator[None]:
        """Room in memory for a session while it is used, and after that if it is still there."""
        gone = self._residents.admit(key)
        if isinstance(gone, str):
            self._entries[gone].live = None
            self._forget_if_idle(gone, self._entries[gone])
        try:
            yield
        finally:
            if entry.live is None:
                self._residents.remove(key)
            else:
                self._residents.rest(key)

    def _forget_if_idle(self, name: str, entry: _Entry) -> None:
        if not entry.users and entry.live is None:
            self._entries.pop(name, None)

    def _exists(self, name: str, entry: _Entry) -> bool:
        return entry.live is not None or (self._store is not None and self._store.has(name))

    def _ended(self, turn: Turn, task: asyncio.Task[Finished]) -> None:
        self._turns.discard(turn)
        if not task.cancelled():
            task.exception()  # looked at, even when the client has gone
        turn.show(None)


def check_name(name: str) -> str:
    """The name, which is safe to be a folder's.

    Raises:
        InvalidRequestError: it is not.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{name[:80]!r} is no name of a session: 1 to 64 of A-Z a-z 0-9 _ . - and no dot in front",
            "session",
        )
    return name


def _unknown(name: str) -> UnknownSessionError:
    return UnknownSessionError(f"there is no session {name!r}. GET /v1/sessions lists all")
