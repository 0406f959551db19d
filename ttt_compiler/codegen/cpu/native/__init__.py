"""Loops in C++, built on first use by the compiler that Inductor uses: one library of all files here.

Only what torch has no operation for, or where calling its operations costs more than they do. Every caller
has another way for when there is no compiler; what only C++ does (v ahead of a chunk's end, writes that are
spread) is not begun then. May be changed here: the files of the library and the signatures of what they
export; ``ttt-compiler doctor`` says whether there is a compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ttt_compiler.compat.processor import block_product, build_cpp, product_dtype

# Dtypes of operands, as the names of exported functions end.
NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_FILES = (
    "operands",
    "numbers",
    "panels",
    "blocks",
    "products",
    "conv",
    "dots",
    "squares",
    "pairs",
    "values",
    "spread",
    "units",
    "decode",
)
_unused = 0
_lock = threading.RLock()
_listeners: list[Callable[[bool], None]] = []
_INT, _SIZE, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_FLOAT = ctypes.c_float
# Per function of one dtype: what it takes, what it returns, and the dtypes that there are.
_SIGNATURES: dict[str, tuple[list[Any], Any, tuple[str, ...]]] = {
    "conv": ([_POINTER] * 3 + [_SIZE] * 4 + [_INT], None, tuple(NAMES.values())),
    "taps": ([_POINTER] * 3 + [_SIZE] * 4 + [_INT], None, tuple(NAMES.values())),
    # Called by the operator alone (op.cpp).
    "decode": ([_POINTER, _POINTER, _INT], _INT, tuple(NAMES.values())),
    "spread": ([_POINTER] * 5 + [_SIZE] * 9 + [_INT], None, tuple(NAMES.values())),
    "units": ([_POINTER, _POINTER, _SIZE, _SIZE], None, tuple(NAMES.values())),
    "squares": ([_POINTER, _SIZE, _INT], ctypes.c_double, tuple(NAMES.values())),
    "blocks": ([_POINTER] * 7 + [_SIZE] * 3 + [_INT] * 4, _INT, ("float32", "bfloat16")),
    "wideblocks": ([_POINTER] * 7 + [_SIZE] * 3 + [_INT] * 4, _INT, ("bfloat16", "float16")),
    "panels": ([_POINTER] * 6 + [_SIZE] * 3 + [_INT], _INT, ("bfloat16",)),
    "pack": ([_POINTER] * 2 + [_SIZE] * 2 + [_INT], None, ("bfloat16",)),
    "pack_turned": ([_POINTER] * 2 + [_SIZE] * 2 + [_INT], None, ("bfloat16",)),
}


def is_used() -> bool:
    """Whether the functions may be called: always, but inside of :func:`unused`."""
    return not _unused


@contextlib.contextmanager
def unused() -> Iterator[None]:
    """As if there was no compiler, in all threads: to compare with it, and for other code on CPU tensors."""
    _leave_unused(1)
    try:
        yield
    finally:
        _leave_unused(-1)


def _leave_unused(more: int) -> None:
    global _unused
    with _lock:
        _unused += more
        for listener in _listeners:
            listener(not _unused)


def on_use(listener: Callable[[bool], None]) -> None:
    """Call ``listener`` with what holds now, and whenever that changes."""
    with _lock:
        _listeners.append(listener)
        listener(not _unused)


def function(name: str, dtype: torch.dtype) -> Any:
    """``name`` for operands of ``dtype``, or None if there is none."""
    return None if _unused else _function(name, dtype)


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    found = library()
    if found is None or NAMES.get(dtype) not in _SIGNATURES[name][2]:
        return None
    return getattr(found, f"{name}_{NAMES[dtype]}")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions, or None without a compiler."""
    here = Path(__file__).parent
    built: ctypes.CDLL | None = build_cpp("\n".join((here / f"{x}.cpp").read_text() for x in _FILES))
    if built is not None:
        for name, (taken, returned, dtypes) in _SIGNATURES.items():
            for dtype in dtypes:
                function = getattr(built, f"{name}_{dtype}")
                function.argtypes, function.restype = taken, returned
        built.multiply.argtypes, built.multiply.restype = [*[_POINTER] * 4, _FLOAT], _INT
        built.bind_pairs.argtypes, built.bind_pairs.restype = [_POINTER] * 2, _INT
        addresses = block_product(torch.bfloat16)
        if addresses is not None and product_dtype(torch.bfloat16) == torch.bfloat16:
            built.bind_pairs(*addresses)
    return built
