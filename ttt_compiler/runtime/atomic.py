"""Files that take their name only when they are whole.

A file is written beside the place where it belongs and renamed over it at the end, so a reader finds the
old one or the new one, whatever kills the writer, and a full disk leaves the old one as it was.

Rules, all tested in ``tests/runtime/test_crash.py``:

- The temporary is called ``.NAME.<16 hex digits>.tmp`` and locked while its writer lives. The next save of
  the same name removes those that nobody holds, so a killed writer leaves one file until then at most. On
  file systems without locks nothing can be told about a temporary, and none is removed.
- A file that existed keeps its permissions. A new one gets ``0666`` without the umask's bits, as any
  program's would; a ``private`` one ``0600``, because keys and values give away the text that was read.
- A symbolic link is replaced, not followed.

May be changed here: how bytes reach the disk, never what they mean.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from ttt_compiler.errors import TTTError

try:
    import fcntl
except ImportError:  # Windows, where a file that somebody holds open cannot be removed anyway.
    fcntl = None  # type: ignore[assignment]

LONGEST_NAME = 200
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], error: type[TTTError], *, private: bool = False
) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends without an error.

    Args:
        path: where the file belongs.
        error: what to raise when it cannot be written.
        private: a new file is readable by its owner alone.

    Raises:
        error: no space, no permission, no such directory. What stood at ``path`` is untouched.
    """
    final = Path(path)
    handle: int | None = None
    temporary: Path | None = None
    if "\0" in str(final) or not final.name:
        raise error(f"{str(final)!a}: cannot be written: no name for a file; nothing was changed")
    try:
        if final.exists() and not final.is_file():
            raise error(f"{final}: cannot be written: a folder or a device stands there; nothing was changed")
        _remove_abandoned(final)
        temporary, handle = _claim(final, 0o600 if private else 0o666)
        yield temporary
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        with contextlib.suppress(FileNotFoundError):
            # As late as this: a file that may not be written could not be filled.
            temporary.chmod(stat.S_IMODE(final.stat().st_mode) & 0o777)
        temporary.replace(final)
        _sync_directory(final.parent)
    except OSError as e:
        hint = "free space or save to another place; " if e.errno in NO_SPACE else ""
        raise error(f"{path}: cannot be written ({e.strerror or e}); {hint}nothing was changed") from e
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _claim(final: Path, mode: int) -> tuple[Path, int | None]:
    """A new temporary of ``final``, and the handle whose lock says that its writer lives."""
    while True:
        temporary = final.with_name(f"{_prefix(final)}{secrets.token_hex(8)}.tmp")
        # Created with the mode that it will have: asking for the umask would mean to change it for a moment.
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        if fcntl is None:
            os.close(handle)
            return temporary, None
        if _lock(handle) is not False and _is(temporary, handle):
            return temporary, handle
        # Another writer took it for abandoned before it was locked.
        os.close(handle)


def _remove_abandoned(final: Path) -> None:
    """Remove what killed writers of ``final`` left behind. Never fails: at worst it removes nothing."""
    pattern = re.compile(re.escape(_prefix(final)) + "[0-9a-f]{16}[.]tmp")
    with contextlib.suppress(OSError), os.scandir(final.parent) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_unlocked(Path(entry.path))


def _remove_unlocked(temporary: Path) -> None:
    if fcntl is None:
        temporary.unlink()
        return
    handle = os.open(temporary, os.O_RDWR | os.O_NONBLOCK)
    try:
        if _lock(handle) and _is(temporary, handle):
            temporary.unlink()
    finally:
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Whether the lock was free and is ours now; None where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is(path: Path, handle: int) -> bool:
    """Whether ``path`` still names the file that ``handle`` opened."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(handle))
    return False


def _prefix(final: Path) -> str:
    name = final.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}."


def _sync_directory(directory: Path) -> None:
    """Make the rename survive a power cut, where the file system can."""
    # An error here comes too late to say that nothing was changed, and the file is whole either way.
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
