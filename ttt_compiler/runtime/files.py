"""Files that survive crashes, and files that are only data.

May be changed here: how bytes reach the disk. Nothing read here is ever executed: tensors are
safetensors, everything else JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ttt_compiler.errors import TTTError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends without an error."""
    final = Path(path)
    fd, name = tempfile.mkstemp(prefix=f".{final.name}.", dir=final.parent)
    os.close(fd)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.replace(final)
        directory = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Write tensors with a JSON header, atomically."""
    from safetensors.torch import save_file

    flat = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with replacing(path) as temporary:
        save_file(flat, temporary, metadata={"ttt": json.dumps(dict(header), sort_keys=True)})


def write_json(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(dict(data), indent=2, sort_keys=True) + "\n")


def read_tensors(
    path: str | os.PathLike[str], error: type[TTTError]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON header of a file of :func:`write_tensors`; an absent header is empty.

    Raises:
        error: the file is missing, truncated, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as f:
            metadata = f.metadata() or {}
            # Cloned: a file that changes under a memory map must not change the tensors.
            tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as e:
        raise error(f"{path}: cannot be read as safetensors ({e}); nothing was changed") from e
    return tensors, parse_json(metadata.get("ttt", "{}"), path, error)


def read_json(path: str | os.PathLike[str], error: type[TTTError]) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        error: missing, or not a JSON object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise error(f"{path}: cannot be read ({e}); nothing was changed") from e
    return parse_json(text, path, error)


def parse_json(text: str, where: object, error: type[TTTError]) -> dict[str, Any]:
    """A JSON object from text, or ``error``."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise error(f"{where}: its header is no JSON ({e}); nothing was changed") from e
    if not isinstance(data, dict):
        raise error(f"{where}: its header is no JSON object; nothing was changed")
    return data


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
