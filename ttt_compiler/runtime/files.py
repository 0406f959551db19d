"""Files that are only data, and that say when they are damaged.

Tensors are safetensors, everything else JSON; nothing read here is ever executed, and nothing is believed
before it was checked. Files written here carry a SHA-256 over every byte of theirs, header included (the
digits themselves count as zeros); it is in the ``__metadata__`` of safetensors, where other readers
ignore it. It tells damage, not forgery: who can write the file can write the checksum.

Reading takes no more memory than the file is long, plus its header, which has a limit of its own. May be
changed here: the checks, the checksum (then give it another name, and keep reading the old one).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ttt_compiler.errors import TTTError
from ttt_compiler.runtime.atomic import replacing

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]

ALGORITHM = "sha256"
CHECKSUM, HEADER = "ttt_checksum", "ttt"
# In the header too: a damaged name of the one would otherwise look like a file of old that has none.
MARK = "checksum"
UNSIGNED = "0" * 64
MAX_HEADER = 16 * 2**20
PIECE = 8 * 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _DamagedError(Exception):
    """Why a file cannot be read; the caller's error names the file."""


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    error: type[TTTError],
    *,
    private: bool = False,
) -> None:
    """Write tensors with a JSON header and a checksum, atomically (see ``atomic.py``).

    Raises:
        error: it cannot be written; what stood there is untouched.
    """
    # Wide dtypes first, so that each tensor lies aligned for readers that map the file.
    names = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    text = json.dumps({**header, MARK: ALGORITHM}, sort_keys=True, allow_nan=False)
    content: dict[str, Any] = {
        "__metadata__": {CHECKSUM: f"{ALGORITHM}:{UNSIGNED}", "format": "pt", HEADER: text}
    }
    end = 0
    for name in names:
        x = tensors[name]
        if x.dtype not in DTYPE_NAMES:
            raise error(f"{path}: {name} is of {x.dtype}, which cannot be stored; nothing was changed")
        begin, end = end, end + x.numel() * x.dtype.itemsize
        content[name] = {
            "dtype": DTYPE_NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(content, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise error(f"{path}: its header would take {len(raw)} bytes; nothing was changed")
    digest = hashlib.sha256()
    with replacing(path, error, private=private) as temporary, temporary.open("r+b") as f:
        for piece in (struct.pack("<Q", len(raw)), raw):
            digest.update(piece)
            f.write(piece)
        for name in names:
            # One at a time: a copy of all of them beside the running sequence might not fit.
            data = _bytes(tensors[name].detach().cpu().contiguous())
            for start in range(0, len(data), PIECE):
                digest.update(data[start : start + PIECE])
                f.write(data[start : start + PIECE])
        # Last of all: before this the file is not valid, however much of it reached the disk.
        f.seek(8 + raw.index(UNSIGNED.encode()))
        f.write(digest.hexdigest().encode())


def read_tensors(
    path: str | os.PathLike[str], error: type[TTTError]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON header of a file of :func:`write_tensors`, or of any safetensors file.

    A checksum is checked where there is one: files of earlier versions and of others have none. An absent
    header is empty.

    Raises:
        error: missing, truncated, damaged, not safetensors.
    """
    with _opened(path, error) as f:
        raw, shapes, metadata, data = _read_header(f)
        header = _header(metadata)
        signed = _signed(raw, metadata, header)
        digest = hashlib.sha256(struct.pack("<Q", len(raw)))
        digest.update(raw.replace(signed, UNSIGNED.encode()) if signed else raw)
        tensors = {name: _read_tensor(f, name, *shapes[name], digest) for name in data}
        if f.read(1):
            raise _DamagedError("it grew while it was read")
        if signed and digest.hexdigest().encode() != signed:
            raise _DamagedError("its checksum does not match: it was damaged on disk or on its way")
    return tensors, header


def read_header(path: str | os.PathLike[str], error: type[TTTError]) -> tuple[dict[str, Any], Shapes]:
    """JSON header, shapes and dtypes of a file, at once and in little memory, its checksum unchecked.

    Raises:
        error: as :func:`read_tensors`.
    """
    with _opened(path, error) as f:
        raw, shapes, metadata, _ = _read_header(f)
        header = _header(metadata)
        _signed(raw, metadata, header)
    return header, shapes


def write_json(path: str | os.PathLike[str], data: Mapping[str, Any], error: type[TTTError]) -> None:
    """Write JSON, atomically.

    Raises:
        error: it cannot be written; what stood there is untouched.
    """
    text = json.dumps(dict(data), indent=2, sort_keys=True) + "\n"
    with replacing(path, error) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str], error: type[TTTError]) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        error: missing, too long, or not a JSON object.
    """
    with _opened(path, error, "cannot be read") as f:
        raw = f.read(MAX_HEADER + 1)
        if len(raw) > MAX_HEADER:
            raise _DamagedError(f"it is longer than {MAX_HEADER} bytes")
        text = raw.decode()
    return parse_json(text, path, error)


def parse_json(text: str | bytes, where: object, error: type[TTTError]) -> dict[str, Any]:
    """A JSON object from text, without repeated keys; or ``error``."""
    try:
        return _object(text)
    except (ValueError, RecursionError) as e:
        raise error(f"{where}: its header is no JSON ({e}); nothing was changed") from e


def expect_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[tuple[int, ...], Any]],
    where: object,
    error: type[TTTError],
) -> None:
    """Raise ``error`` unless names, shapes and dtypes are exactly the ``expected`` ones."""
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or extra:
        raise error(f"{where}: missing {sorted(missing)}, unexpected {sorted(extra)}; nothing was changed")
    for name, (shape, dtype) in expected.items():
        x = tensors[name]
        if tuple(x.shape) != shape or x.dtype != dtype:
            raise error(
                f"{where}: {name} is {tuple(x.shape)} {x.dtype}, expected {shape} {dtype}; nothing "
                "was changed"
            )


@contextlib.contextmanager
def _opened(
    path: str | os.PathLike[str], error: type[TTTError], what: str = "cannot be read as safetensors"
) -> Iterator[BinaryIO]:
    """A regular file to read from; whatever goes wrong inside is ``error``."""
    try:
        # Without waiting: a pipe of that name would never answer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as f:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise _DamagedError("it is no regular file")
            yield f
    except (_DamagedError, OSError, ValueError, RecursionError, MemoryError) as e:
        raise error(f"{path}: {what} ({e}); nothing was changed") from e


def _read_header(f: BinaryIO) -> tuple[bytes, Shapes, dict[str, str], list[str]]:
    """Raw header, shapes, metadata, and the names in the order of their bytes; sizes are all checked."""
    length = os.fstat(f.fileno()).st_size
    start = f.read(8)
    if len(start) < 8:
        raise _DamagedError(f"it is {length} bytes long")
    (size,) = struct.unpack("<Q", start)
    if size > min(length - 8, MAX_HEADER):
        raise _DamagedError(f"its header of {size} bytes does not fit into {length} bytes, or is too long")
    raw = f.read(size)
    content = _object(raw)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _DamagedError("its metadata is no mapping of text")
    shapes: Shapes = {}
    places = []
    for name, entry in content.items():
        if not name.isprintable():
            raise _DamagedError(f"a tensor is called {name[:40]!a}")
        shapes[name], place = _entry(name, entry)
        places.append((*place, name))
    places.sort()
    end = 0
    for begin, stop, name in places:
        if begin != end:
            raise _DamagedError(f"{name} overlaps another tensor or leaves a gap")
        end = stop
    if end != length - 8 - size:
        raise _DamagedError(f"its tensors take {end} bytes, it holds {length - 8 - size}")
    return raw, shapes, metadata, [name for *_, name in places]


def _entry(name: str, entry: object) -> tuple[tuple[tuple[int, ...], torch.dtype], tuple[int, int]]:
    """Shape and dtype, begin and end of one tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _DamagedError(f"{name} is no description of a tensor")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise _DamagedError(f"{name} has an unknown dtype")
    shape, place = entry["shape"], entry["data_offsets"]
    for numbers in (shape, place):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise _DamagedError(f"{name} has a shape or place that is no list of sizes")
    # Zero times too much is nothing, but torch would overflow on its way there.
    if len(shape) > 32 or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise _DamagedError(f"{name} has an impossible shape")
    if len(place) != 2 or place[1] - place[0] != math.prod(shape) * dtype.itemsize:
        raise _DamagedError(f"{name} has a shape that does not match its bytes")
    return (tuple(shape), dtype), (place[0], place[1])


def _header(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        return _object(metadata.get(HEADER, "{}"))
    except (ValueError, RecursionError) as e:
        raise _DamagedError(f"its header is no JSON: {e}") from e


def _signed(raw: bytes, metadata: Mapping[str, str], header: dict[str, Any]) -> bytes | None:
    """The digits of the checksum, taking its mark out of ``header``; None for a file without one."""
    mark, checksum = header.pop(MARK, None), metadata.get(CHECKSUM)
    if mark is None and checksum is None:
        return None
    match = re.fullmatch(r"([a-z0-9]+):([0-9a-f]{64})", checksum or "", re.ASCII)
    if match is not None and match[1] == mark and mark != ALGORITHM:
        raise _DamagedError(f"its checksum is of a kind that this version does not know: {mark}")
    if match is None or match[1] != mark or raw.count(match[2].encode()) != 1:
        raise _DamagedError("its checksum does not match: it is damaged or missing")
    return match[2].encode()


def _read_tensor(
    f: BinaryIO, name: str, shape: tuple[int, ...], dtype: torch.dtype, digest: hashlib._Hash
) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    try:
        x = torch.empty(size, dtype=torch.uint8)
    except RuntimeError as e:
        raise _DamagedError(f"{name} takes {size} bytes, more than there is memory") from e
    data = _bytes(x)
    for start in range(0, size, PIECE):
        piece = data[start : start + PIECE]
        done = 0
        while done < len(piece):
            got = f.readinto(piece[done:])  # type: ignore[attr-defined]
            if not got:
                raise _DamagedError("it shrank while it was read")
            done += got
        digest.update(piece)
    if dtype is torch.bool and bool((x > 1).any()):
        raise _DamagedError(f"{name} holds bytes that are neither true nor false")
    return x.view(dtype).reshape(shape)


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, not a copy."""
    data: memoryview = x.reshape(-1).view(torch.uint8).numpy().data
    return data


def _object(text: str | bytes) -> dict[str, Any]:
    """A JSON object without repeated keys: two readers could take different ones.

    Raises:
        ValueError: it is something else.
        RecursionError: it is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a key occurs twice")
        return out

    text = text.decode() if isinstance(text, bytes) else text
    data = json.loads(text, object_pairs_hook=unique)
    if not isinstance(data, dict):
        raise ValueError("no JSON object")
    return data
