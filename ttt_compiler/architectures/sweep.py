"""Audit many architectures, each in a child process: none can take the others with it.

A child imports torch and transformers once and audits many types; one that crashes, or is killed because
a type takes too long, loses that type alone. May be changed here: limits, and how children are fed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ttt_compiler
from ttt_compiler.architectures.audit import Audit, audit

SECONDS = 300.0
GIBIBYTES = 8.0
# What torch and transformers keep of one model after another adds up.
TYPES_PER_CHILD = 25
_CHILD = "from ttt_compiler.architectures.sweep import child; child({gibibytes})"


def sweep(
    types: Sequence[str], *, jobs: int = 1, seconds: float = SECONDS, gibibytes: float = GIBIBYTES
) -> Iterator[Audit]:
    """Audits of these types as they finish; which one is first depends on time, what it says does not.

    Args:
        types: model types of transformers.
        jobs: how many children run at once; they share the cores.
        seconds: that one type may take.
        gibibytes: of memory that one child may take.
    """
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[Audit | BaseException] = queue.SimpleQueue()
    for name in types:
        todo.put(name)
    jobs = max(1, min(jobs, len(types)))
    feeders = [_Feeder(todo, done, jobs, seconds, gibibytes) for _ in range(jobs)]
    for feeder in feeders:
        feeder.start()
    try:
        for _ in types:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        for feeder in feeders:
            feeder.stop()


class _Feeder(threading.Thread):
    """Hands one type after another to a child of its own, and gets a new child when that one is gone."""

    def __init__(
        self,
        todo: queue.SimpleQueue[str],
        done: queue.SimpleQueue[Audit | BaseException],
        jobs: int,
        seconds: float,
        gibibytes: float,
    ) -> None:
        super().__init__(daemon=True)
        self.todo, self.done = todo, done
        self.jobs, self.seconds, self.gibibytes = jobs, seconds, gibibytes
        self.stopped = threading.Event()
        self.process: subprocess.Popen[str] | None = None
        self.given = 0

    def run(self) -> None:
        try:
            while not self.stopped.is_set():
                try:
                    name = self.todo.get_nowait()
                except queue.Empty:
                    break
                self.done.put(self._audit(name))
        except BaseException as e:
            self.done.put(e)
        finally:
            self._end_child()

    def stop(self) -> None:
        """End the child, and with it the thread."""
        self.stopped.set()
        if self.process is not None:
            self.process.kill()
        self.join()

    def _audit(self, name: str) -> Audit:
        if self.process is None or self.given >= TYPES_PER_CHILD:
            self._end_child()
            self._start_child()
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        too_long = threading.Event()

        def end() -> None:
            too_long.set()
            process.kill()

        timer = threading.Timer(self.seconds, end)
        timer.start()
        try:
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        self.given += 1
        code = None if answer else process.wait()
        if not answer or too_long.is_set():
            self._end_child()
        if code is None:
            return _decoded(answer)
        reason = f"took more than {self.seconds:.0f} s" if too_long.is_set() else _ending(code)
        return Audit(name, traced=f"not audited: {reason}")

    def _start_child(self) -> None:
        code = _CHILD.format(gibibytes=self.gibibytes)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            env=_environment(self.jobs),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.given = 0
        if self.stopped.is_set():
            self.process.kill()  # stop() saw the child before this one
        assert self.process.stdout is not None
        if not self.process.stdout.readline() and not self.stopped.is_set():
            raise RuntimeError(f"a child process that audits does not start: {_ending(self.process.wait())}")

    def _end_child(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def child(gibibytes: float) -> None:
    """Audit every type that is named on standard input; one line of JSON each on standard output."""
    import transformers  # noqa: F401  (before the first type's time starts)

    answers = os.fdopen(os.dup(1), "w")
    # What models print is no answer.
    os.dup2(2, 1)
    _limit_memory(gibibytes)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(dataclasses.asdict(audit(line.strip()))), file=answers, flush=True)


def _limit_memory(gibibytes: float) -> None:
    """Let an allocation fail that is too large, before the machine ends some process of its own choice."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    limit = int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _environment(jobs: int) -> dict[str, str]:
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    paths = [str(Path(ttt_compiler.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    own = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    return {"OMP_NUM_THREADS": threads, **os.environ, **own}


def _decoded(answer: str) -> Audit:
    fields: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(answer).items()}
    return Audit(**fields)


def _ending(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    return f"its process was ended by {signal.Signals(-code).name}"
