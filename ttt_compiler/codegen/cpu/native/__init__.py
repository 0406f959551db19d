"""Loops in C++, built on first use by the compiler that Inductor uses: one library of all files here.

Only what torch has no operation for, or where calling its operations costs more than they do. Every caller
has another way for when there is no compiler. May be changed here: the files of the library and the
signatures of what they export; ``ttt-compiler doctor`` says whether there is a compiler.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from ttt_compiler.compat.processor import build_cpp

# Dtypes of operands, as the names of exported functions end.
NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_FILES = ("numbers", "conv", "decode")
# (pointers, sizes, ints) that a function takes, and what it returns.
_SIGNATURES = {"conv": ((3, 4, 1), None), "decode": ((11, 8, 2), ctypes.c_int)}


@functools.cache
def function(name: str, dtype: torch.dtype) -> Any:
    """``name`` for operands of ``dtype``, or None if there is none."""
    found = library()
    return None if found is None or dtype not in NAMES else getattr(found, f"{name}_{NAMES[dtype]}")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions, or None without a compiler."""
    here = Path(__file__).parent
    built: ctypes.CDLL | None = build_cpp("\n".join((here / f"{x}.cpp").read_text() for x in _FILES))
    if built is not None:
        for start, ((pointers, sizes, ints), returned) in _SIGNATURES.items():
            for name in NAMES.values():
                function = getattr(built, f"{start}_{name}")
                function.argtypes = (
                    [ctypes.c_void_p] * pointers + [ctypes.c_int64] * sizes + [ctypes.c_int] * ints
                )
                function.restype = returned
    return built
