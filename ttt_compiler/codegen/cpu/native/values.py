"""v of a few tokens of a chunk by a single call: reading P is what it costs.

Measured for 8 tokens and a P of 1024 x 1024 that is not in the cache: half of the time of oneDNN and MKL,
which pack P first; and the calls around it, each of which misses the cache too, are one. May be changed here:
what is called.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu import native
from ttt_compiler.spec import state_dtype

# Elements of P from which on more than one thread reads it.
_MANY = 1 << 16


def values_of(
    t: Tensor,
    h: Tensor,
    first: int,
    conv: Tensor,
    proj: Tensor | None,
    scale: float,
    out: Tensor,
    columns: tuple[int, int],
) -> tuple[float, float]:
    """``out = (scale * conv(t) @ proj).T`` of some tokens and columns; there must be a compiler.

    Args:
        t: contiguous ``[r, Dt]``, consecutive rows of a chunk: those tokens, and what their taps reach of it.
        h: contiguous ``[m, F]``, those tokens' hidden rows.
        first: which row of ``t`` is the first of the m tokens.
        conv: ``[Dt, 1, K]``.
        proj: ``[Dt, D]`` or None.
        scale: eta.
        out: ``[D, m]`` with rows in one piece.
        columns: which of the D are made, from and to.

    Returns:
        Norms of those columns of v, and, with the first column, of h, else 0: Inf if a number is NaN or Inf,
        or if the squares are beyond the state's dtype.
    """
    function = native.function("values", t.dtype)
    assert function is not None, "v of a few tokens is made in C++"
    conv = conv.to(t.dtype).contiguous()
    proj = None if proj is None else proj.to(t.dtype).contiguous()
    squares = (ctypes.c_double * 2)()
    function(
        t.data_ptr(),
        h.data_ptr(),
        conv.data_ptr(),
        None if proj is None else proj.data_ptr(),
        out.data_ptr(),
        ctypes.addressof(squares),
        len(t),
        first,
        len(h),
        t.shape[1],
        h.shape[1],
        len(out),
        *columns,
        conv.shape[-1],
        out.stride(0),
        scale,
        torch.get_num_threads() if proj is not None and proj.numel() >= _MANY else 1,
    )
    most = torch.finfo(state_dtype(t.dtype)).max
    of_v, of_h = (math.sqrt(x) if x <= most else math.inf for x in squares)
    return of_v, of_h
