"""One thread runs all calls of the model; requests take turns, one call each.

May be changed here: whose turn it is. A job is an iterator of steps, so a request that comes in waits for
one step of every other request, never for a whole reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from ttt_compiler.serve.errors import CancelledError


class Worker:
    """The thread. Start it in the event loop whose coroutines call :meth:`run`."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ttt-serve", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are being run."""
        return self._thread.is_alive()

    async def run(
        self, steps: Iterator[Any], on_item: Callable[[Any], None], cancelled: threading.Event
    ) -> None:
        """Run all steps; ``on_item`` gets every item, in the event loop.

        When this returns or raises, the thread has let go of the iterator.

        Raises:
            CancelledError: ``cancelled`` was set.
        """
        job = _Job(steps, on_item, cancelled)
        self._inbox.put(job)
        await job.done

    def stop(self) -> None:
        """End the thread after the jobs it has."""
        self._inbox.put(None)

    def _work(self) -> None:
        turns: deque[_Job] = deque()
        stopping = False
        while turns or not stopping:
            with contextlib.suppress(queue.Empty):
                # Waits only when there is nothing else to do.
                while True:
                    job = self._inbox.get(block=not turns and not stopping)
                    if job is None:
                        stopping = True
                    else:
                        turns.append(job)
            if turns:
                job = turns.popleft()
                if job.step():
                    turns.append(job)


class _Job:
    def __init__(
        self, steps: Iterator[Any], on_item: Callable[[Any], None], cancelled: threading.Event
    ) -> None:
        self._steps, self._on_item, self._cancelled = steps, on_item, cancelled
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self._loop.create_future()

    def step(self) -> bool:
        """One step; False after the last one."""
        try:
            if self._cancelled.is_set():
                raise CancelledError("the request was cancelled; the session stands where it stood before it")
            item = next(self._steps)
        except StopIteration:
            self._send(self._settle, None)
        except BaseException as e:
            # Whatever it was, the thread must live on for the other requests.
            self._send(self._settle, e if isinstance(e, Exception) else RuntimeError(repr(e)))
        else:
            return self._send(self._on_item, item)
        return False

    def _send(self, call: Callable[..., None], *args: Any) -> bool:
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return False
        return True

    def _settle(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)
