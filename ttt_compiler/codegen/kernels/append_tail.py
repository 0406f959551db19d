"""New tokens go into the ring; programs with nothing to keep exit at once.

May be changed here: how rows are copied; which token is kept where is decided by the caller.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def append_tail_kernel(
    x, tail, token, entry, N, T, X, stride_xb, stride_xt, BLOCK: tl.constexpr, DEPTH: tl.constexpr
):
    """Some of one row's entries; see :func:`append_tail`."""
    i_b = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, BLOCK)
    for i in range(DEPTH):
        i_n = tl.program_id(0) * DEPTH + i
        if i_n < N:
            at = tl.load(token + i_b * N + i_n)
            if at >= 0:
                to = tail + tl.load(entry + i_b * N + i_n) * X
                source = x + i_b * stride_xb + at * stride_xt
                for start in range(0, X, BLOCK):
                    m = start + r < X
                    row = tl.load(source + start + r, mask=m, other=0.0)
                    tl.store(to + start + r, row.to(tail.dtype.element_ty), mask=m)


def append_tail(x: Tensor, tail: Tensor, token: Tensor, entry: Tensor) -> None:
    """``tail[entry[b, n]] = x[b, token[b, n]]`` where the token is not negative.

    Args:
        x: ``[B, T, X]``, the last dimension contiguous.
        tail: ``[L, A, X]``, contiguous, changed in place.
        token: int64 ``[B, N]``, contiguous, as entry; -1 keeps nothing.
        entry: int64 ``[B, N]``, ``lane * A + column``; no two kept tokens have the same.
    """
    batch, count = token.shape
    width = x.shape[2]
    depth = 1 if count == 1 else 4
    append_tail_kernel[(triton.cdiv(count, depth), batch)](
        x,
        tail,
        token,
        entry,
        count,
        x.shape[1],
        width,
        x.stride(0),
        x.stride(1),
        BLOCK=min(BLOCK, triton.next_power_of_2(width)),
        DEPTH=depth,
        num_warps=4,
    )


def naive_append_tail(x: Tensor, tail: Tensor, token: Tensor, entry: Tensor) -> None:
    """What the kernel does, entry by entry."""
    entries = tail.flatten(0, 1)
    for b in range(len(token)):
        for at, to in zip(token[b].tolist(), entry[b].tolist(), strict=True):
            if at >= 0:
                entries[to] = x[b, at].to(tail.dtype)
