"""A row's unwritten tokens and the new ones behind them, in one buffer.

What is read from the ring is read here and nowhere else in a call of several tokens, so that new entries may
overwrite old ones afterwards. May be changed here: how rows are copied; which token stands where is decided
in :mod:`ttt_compiler.codegen.gpu.sequence`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def gather_tokens_kernel(
    tail,
    x,
    place,
    out,
    square,
    S,
    T,
    X,
    stride_xb,
    stride_xt,
    CLEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token; see :func:`gather_tokens`."""
    i_s = tl.program_id(0)
    i_b = tl.program_id(1)
    item = i_b.to(tl.int64) * S + i_s
    at = tl.load(place + item)
    r = tl.arange(0, BLOCK)
    to = out + item * X
    if at >= 0:
        # Below T are tokens of the call, behind them entries of the ring, which may have another dtype.
        is_new = at + tl.zeros((BLOCK,), dtype=tl.int64) < T
        p_new = x + i_b.to(tl.int64) * stride_xb + at * stride_xt
        p_old = tail + (at - T) * X
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, X, BLOCK):
            m = start + r < X
            new = tl.load(p_new + start + r, mask=m & is_new, other=0.0).to(out.dtype.element_ty)
            old = tl.load(p_old + start + r, mask=m & (is_new == 0), other=0.0).to(out.dtype.element_ty)
            row = tl.where(is_new, new, old)
            tl.store(to + start + r, row, mask=m)
            if CLEAN:
                total += row.to(tl.float32) * row.to(tl.float32)
        if CLEAN:
            norm = tl.sum(total, 0)
            tl.store(square + item, norm)
            if not (norm < float("inf")):
                tl.debug_barrier()
                for start in range(0, X, BLOCK):
                    tl.store(
                        to + start + r, tl.zeros((BLOCK,), dtype=out.dtype.element_ty), mask=start + r < X
                    )
    else:
        for start in range(0, X, BLOCK):
            tl.store(to + start + r, tl.zeros((BLOCK,), dtype=out.dtype.element_ty), mask=start + r < X)
        if CLEAN:
            tl.store(square + item, 0.0)


def gather_tokens(tail: Tensor, x: Tensor, place: Tensor, *, clean: bool) -> tuple[Tensor, Tensor]:
    """Rows of the ring and of the call by number.

    Args:
        tail: ``[L, A, X]``, contiguous.
        x: ``[B, T, X]``, the last dimension contiguous; the result has its dtype.
        place: int64 ``[B, S]``, contiguous: below T a token of x, from T on ``T + lane * A + column``; -1 for
            zeros.
        clean: whether a token with NaN or Inf becomes zeros, so that products with zero stay zero.

    Returns:
        ``[B, S, X]``, and with ``clean`` fp32 ``[B, S]``, the sums of squares before (else empty).
    """
    batch, size = place.shape
    width = x.shape[2]
    out = x.new_empty(batch, size, width)
    square = torch.empty(batch, size if clean else 0, dtype=torch.float32, device=x.device)
    gather_tokens_kernel[(size, batch)](
        tail,
        x,
        place,
        out,
        square,
        size,
        x.shape[1],
        width,
        x.stride(0),
        x.stride(1),
        CLEAN=clean,
        BLOCK=min(BLOCK, triton.next_power_of_2(width)),
        num_warps=4,
    )
    return out, square


def naive_gather_tokens(tail: Tensor, x: Tensor, place: Tensor, *, clean: bool) -> tuple[Tensor, Tensor]:
    """What the kernel computes, token by token."""
    batch, size = place.shape
    out, square = x.new_zeros(batch, size, x.shape[2]), torch.zeros(batch, size if clean else 0)
    entries = tail.flatten(0, 1)
    for b in range(batch):
        for s, at in enumerate(place[b].tolist()):
            if at >= 0:
                out[b, s] = x[b, at] if at < x.shape[1] else entries[at - x.shape[1]]
            if clean:
                square[b, s] = out[b, s].float().square().sum()
                if not square[b, s].isfinite():
                    out[b, s] = 0
    return out, square
