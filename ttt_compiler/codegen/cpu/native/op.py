"""``ttt::fast_weight_step`` on CPU as an operator in C++: a step of one token never enters Python.

Between two chunk borders a decode step is one read of W and one entry of the tail per row. In Python that is
a loop over rows that costs more than the read of a small W; and with the caches full of W, Python around one
call of C++ still costs 60 microseconds. So the operator itself is in C++ (``op.cpp``), from the arguments
that torch hands over to y. It enters Python, by ``ttt::fast_weight_rest``, for all that ``decode.cpp``
leaves: calls of several tokens, first tokens, padding, and what a chunk's end needs of it. May be changed
here: when it is built and loaded. From then on torch calls it for CPU tensors, in front of Python's kernel.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from pathlib import Path

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu import native
from ttt_compiler.codegen.cpu.native.units import bits_of, units
from ttt_compiler.codegen.layout import spread_tokens
from ttt_compiler.compat.processor import begin_cpp, build_cpp
from ttt_compiler.spec import SiteSpec

_FILES = ("operands", "op")
# It calls the loops and has none: torch's headers compile in half of the time so.
_FLAGS = ("-O1", "-g0")
_lock = threading.Lock()


@functools.cache
def start() -> None:
    """Compile it meanwhile: a call of several tokens comes first, and single ones follow."""
    if native.library() is not None:
        begin_cpp(_source(), *_FLAGS)


def load() -> bool:
    """Whether torch calls it from now on; waits until it is built."""
    with _lock:
        return _loaded()


@functools.cache
def _loaded() -> bool:
    """Builds and loads it, upon which torch calls it, and gives it the loops; until then it asks Python."""
    loops = native.library()
    built = None if loops is None else build_cpp(_source(), *_FLAGS, what="the step of one token")
    if built is None:
        return False
    for kind, name in enumerate(native.NAMES.values()):
        built.bind_decode(ctypes.c_int(kind), ctypes.cast(getattr(loops, f"decode_{name}"), ctypes.c_void_p))
    native.on_use(lambda used: built.use_decode(ctypes.c_int(used)))
    return True


def _source() -> str:
    here = Path(__file__).parent
    return "\n".join((here / f"{x}.cpp").read_text() for x in _FILES)


def step_constants(spec: SiteSpec) -> Tensor:
    """What ``op.cpp`` knows of a site: C, S, the bits of the write scale, how many units of v, and these."""
    of = units(spec.chunk)
    site = [spec.chunk, spread_tokens(spec), bits_of(spec.write_scale), len(of)]
    return torch.tensor([*site, *(x for unit in of for x in unit)], dtype=torch.int64)
