"""``ttt::fast_weight_step`` on CPU as an operator in C++: a step of one token never enters Python.

Between two chunk borders a decode step is one read of W and one entry of the tail per row. In Python that is
a loop over rows that costs more than the read of a small W; and with the caches full of W, Python around one
call of C++ still costs 60 microseconds. So the operator itself is in C++ (``op.cpp``), from the arguments
that torch hands over to y. It enters Python, by ``ttt::fast_weight_rest``, for all that ``decode.cpp``
leaves: calls of several tokens, first tokens, padding, and what a chunk's end needs of it. May be changed
here: when it is built and loaded. From then on torch calls it for CPU tensors, in front of Python's kernel.
"""

from __future__ import annotations

import contextvars
import ctypes
import functools
import os
import threading
from pathlib import Path

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu import native
from ttt_compiler.codegen.cpu.native.units import bits_of, units
from ttt_compiler.codegen.layout import spread_tokens
from ttt_compiler.compat.processor import build_cpp
from ttt_compiler.spec import SiteSpec

_FILES = ("operands", "op")
# It calls the loops and has none: torch's headers compile in half of the time so.
_FLAGS = ("-O1", "-g0")


def start() -> None:
    """Build it meanwhile: a call of several tokens comes first, and single ones follow."""
    if native.library() is not None:
        _building(os.getpid())


def load() -> bool:
    """Whether torch calls it from now on; waits until it is built."""
    if native.library() is None:
        return False
    _building(os.getpid()).join()
    return _loaded()


@functools.cache
def _building(process: int) -> threading.Thread:
    """The thread that builds it; of each process, since a fork has no threads of its parent's."""
    # Inductor's settings of this caller hold in its thread too.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(_loaded,), daemon=True)
    thread.start()
    return thread


@functools.cache
def _loaded() -> bool:
    """Builds and loads it, upon which torch calls it, and gives it the loops; until then it asks Python."""
    here = Path(__file__).parent
    built = build_cpp("\n".join((here / f"{x}.cpp").read_text() for x in _FILES), *_FLAGS)
    if built is None:
        return False
    loops = native.library()
    for kind, name in enumerate(native.NAMES.values()):
        built.bind_decode(ctypes.c_int(kind), ctypes.cast(getattr(loops, f"decode_{name}"), ctypes.c_void_p))
    native.on_use(lambda used: built.use_decode(ctypes.c_int(used)))
    return True


def step_constants(spec: SiteSpec) -> Tensor:
    """What ``op.cpp`` knows of a site: C, S, the bits of the write scale, how many units of v, and these."""
    of = units(spec.chunk)
    site = [spec.chunk, spread_tokens(spec), bits_of(spec.write_scale), len(of)]
    return torch.tensor([*site, *(x for unit in of for x in unit)], dtype=torch.int64)
