"""Served sessions on disk: what a session remembers and what it has read, always of the same moment.

``DIR/ID/session.json`` names the session's memory file (``ttt.Session.save``) with its SHA-256, and is
replaced atomically once that file is complete; only then the former one goes. So a crash leaves the state
before or after a request, and files that do not belong together are told apart. The record holds a SHA-256
of the rest of itself too, and what it says is checked before it is believed: the checksum tells damage and
edits, not a forger, who can compute it. May be changed here: the layout and the record; then raise
``VERSION``.
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
from ttt_compiler.runtime.files import MAX_HEADER, read_json
from ttt_compiler.runtime.session import Session
from ttt_compiler.serve.conversation import ROLES, Conversation, Message
from ttt_compiler.serve.errors import StoredSessionError

FORMAT, VERSION = "ttt-served-session", 2
RECORD = "session.json"
CHECKSUM = "checksum"
_MEMORY = re.compile(r"\d+\.ttt", re.ASCII)
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
        self._vocabulary = _vocabulary(model)
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
        text = json.dumps({**record, CHECKSUM: _checksum(record)})
        if len(text) > MAX_HEADER:
            file.unlink()
            raise SnapshotError(
                f"the session's messages and tokens take {len(text)} bytes, and {MAX_HEADER} can be saved"
            )
        with replacing(folder / RECORD, SnapshotError, private=True) as temporary:
            temporary.write_text(text, encoding="utf-8")
        for old in before:
            old.unlink(missing_ok=True)

    def load(self, name: str) -> Live:
        """Read a session.

        Raises:
            StoredSessionError: damaged, of another model, or its files do not belong together.
        """
        conversation, record = self._record(name)
        path = self._folder / name / record["file"]
        if not path.is_file():
            raise _unreadable(name, f"its memory file {path.name} is missing")
        if _digest(path) != record["sha256"]:
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
        """What was read, and ``Session.describe()`` at that time, without reading the session's memory.

        Raises:
            StoredSessionError: the record is damaged.
        """
        conversation, record = self._record(name)
        return conversation, record["session"]

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
            if record.pop(CHECKSUM, None) != _checksum(record):
                raise ValueError("its checksum does not fit: it is damaged or was edited")
            conversation = _conversation(record, self._vocabulary)
        except SnapshotError as e:
            raise _unreadable(name, str(e).replace(f"{self._folder}{os.sep}", "")) from e
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as e:
            raise _unreadable(name, f"{RECORD}: {e}") from e
        return conversation, record


def _conversation(record: dict[str, Any], vocabulary: int | None) -> Conversation:
    """What a record says was read and given.

    Raises:
        KeyError, TypeError, ValueError: the record is none.
    """
    if not isinstance(record["session"], dict):
        raise TypeError('"session" describes no session')
    if not isinstance(record["sha256"], str) or not _MEMORY.fullmatch(record["file"]):
        raise TypeError('"file" and "sha256" name no memory file')
    ids, messages = record["ids"], []
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise TypeError('"ids" is no list of tokens')
    if vocabulary is not None and max(ids, default=0) >= vocabulary:
        raise ValueError(f"the token {max(ids)} is not among the {vocabulary} of the model")
    for message in record["messages"]:
        if message.keys() != {"role", "content"} or message["role"] not in ROLES:
            raise TypeError('"messages" holds something else')
        message["content"].encode()  # without half characters, which no answer could show
        messages.append(Message(**message))
    if not ids or not messages or messages[-1].role != "assistant":
        raise ValueError("it does not end with a reply")
    return Conversation(tuple(messages), tuple(ids))


def _checksum(record: dict[str, Any]) -> str:
    """Of what a record says, however it is laid out."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _vocabulary(model: nn.Module) -> int | None:
    """Number of tokens that the model can read, if it says so."""
    find = getattr(model, "get_input_embeddings", None)
    table: Any = getattr(find() if find is not None else None, "weight", None)
    return None if table is None else len(table)


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


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _unreadable(name: str, why: str) -> StoredSessionError:
    return StoredSessionError(
        f"the saved session {name!r} cannot be continued: {why}. Serve it with the model and adapter it was "
        f"made with, or DELETE /v1/sessions/{name}"
    )
