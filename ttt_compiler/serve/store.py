"""Served sessions on disk: what a session remembers and what it has read, always of the same moment.

``DIR/ID/session.json`` names the session's memory file (``ttt.Session.save``) with its SHA-256, and is
replaced atomically once that file is complete; only then the former one goes. So a crash leaves the state
before or after a request, and files that do not belong together are told apart. May be changed here: the
layout and the record; then raise ``VERSION``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ttt_compiler.errors import SnapshotError, TTTError
from ttt_compiler.runtime.atomic import replacing
from ttt_compiler.runtime.files import read_json
from ttt_compiler.runtime.session import Session
from ttt_compiler.serve.conversation import Conversation, Message
from ttt_compiler.serve.errors import StoredSessionError

FORMAT, VERSION = "ttt-served-session", 1
RECORD = "session.json"
_FILE = re.compile(r"\d+\.ttt|\.(\d+\.ttt|session\.json)\..+")


@dataclass(frozen=True)
class Live:
    """A session in memory, between two requests. Nothing runs on it: requests run on forks."""

    session: Session
    conversation: Conversation = field(default_factory=Conversation)


class Store:
    """A folder of sessions, for one server at a time. Names are checked by the caller.

    Raises:
        TTTError: the folder cannot be used, or another server uses it.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self._folder, self._model = folder, model
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as e:
            raise TTTError(f"{folder}: sessions cannot be kept there ({e.strerror})") from e
        try:
            _lock(self._lock)
        except OSError as e:
            os.close(self._lock)
            raise TTTError(f"{folder}: another server keeps its sessions there; pass another folder") from e

    def close(self) -> None:
        """Let another server use the folder."""
        os.close(self._lock)

    def names(self) -> list[str]:
        """All saved sessions."""
        return sorted(p.parent.name for p in self._folder.glob(f"*/{RECORD}"))

    def has(self, name: str) -> bool:
        """Whether a session of this name is saved."""
        return (self._folder / name / RECORD).is_file()

    def save(self, name: str, live: Live) -> None:
        """Write a session; when this returns, a crash cannot lose it."""
        folder = self._folder / name
        folder.mkdir(exist_ok=True, mode=0o700)
        before = _ours(folder)
        number = 1 + max((int(p.stem) for p in before if p.stem.isdecimal()), default=0)
        file = folder / f"{number}.ttt"
        live.session.save(file)
        record = {
            "format": FORMAT,
            "version": VERSION,
            "name": name,
            "file": file.name,
            "sha256": _digest(file),
            "ids": live.conversation.ids,
            "messages": [asdict(m) for m in live.conversation.messages],
            "session": live.session.describe(),
        }
        record["record_sha256"] = _sealed(record)
        with replacing(folder / RECORD, SnapshotError, private=True) as temporary:
            temporary.write_text(json.dumps(record), encoding="utf-8")
        for old in before:
            old.unlink(missing_ok=True)

    def load(self, name: str) -> Live:
        """Read a session.

        Raises:
            StoredSessionError: damaged, of another model, or its files do not belong together.
        """
        conversation, record = self._record(name)
        path = self._folder / name / str(record.get("file"))
        if path.parent != self._folder / name or not path.is_file():
            raise _unreadable(name, f"its memory file {path.name} is missing")
        if _digest(path) != record.get("sha256"):
            raise _unreadable(name, f"{path.name} is not the file that {RECORD} was written with")
        try:
            session = Session.load(self._model, path)
        except SnapshotError as e:
            raise _unreadable(name, str(e).replace(f"{self._folder}{os.sep}", "")) from e
        ahead = [len(conversation.ids) - seen for seen in session.tokens_seen]
        if ahead not in ([0], [1]):
            raise _unreadable(
                name, f"its memory has {session.tokens_seen} tokens, its record {len(conversation.ids)}"
            )
        return Live(session, conversation)

    def describe(self, name: str) -> tuple[Conversation, dict[str, Any]]:
        """What was read, and ``Session.describe()`` at that time, without reading the session's memory."""
        conversation, record = self._record(name)
        return conversation, dict(record["session"])

    def delete(self, name: str) -> None:
        """Forget a session."""
        # The record first: without it there is no session, whatever else is left.
        folder = self._folder / name
        (folder / RECORD).unlink(missing_ok=True)
        for file in _ours(folder):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's files stay
            folder.rmdir()

    def _record(self, name: str) -> tuple[Conversation, dict[str, Any]]:
        try:
            record = read_json(self._folder / name / RECORD, SnapshotError)
            if record.get("format") != FORMAT or record.get("version") != VERSION:
                raise TypeError(f"is no record of version {VERSION}")
            # A file system that ignores case would give one session for two names.
            if record.get("name") != name:
                raise TypeError(f"belongs to the session {record.get('name')!r}")
            if record.get("record_sha256") != _sealed(record):
                raise TypeError("was changed after it was written: its checksum does not fit")
            if not isinstance(record.get("session"), dict):
                raise TypeError("does not describe its session")
            messages = tuple(Message(str(m["role"]), str(m["content"])) for m in record["messages"])
            ids = tuple(int(i) for i in record["ids"])
        except SnapshotError as e:
            raise _unreadable(name, str(e).replace(f"{self._folder}{os.sep}", "")) from e
        except (KeyError, TypeError, ValueError) as e:
            raise _unreadable(name, f"{RECORD}: {e}") from e
        return Conversation(messages, ids), record


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _ours(folder: Path) -> list[Path]:
    """Memory files of a session, and temporary files that a crash left."""
    return [p for p in folder.glob("*") if _FILE.fullmatch(p.name)]


def _sealed(record: dict[str, Any]) -> str:
    """Checksum of a record but for the checksum itself."""
    rest = {k: v for k, v in record.items() if k != "record_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _unreadable(name: str, why: str) -> StoredSessionError:
    return StoredSessionError(
        f"the saved session {name!r} cannot be continued: {why}. Serve it with the model and adapter it was "
        f"made with, or DELETE /v1/sessions/{name}"
    )
