"""``h W0^T`` for some tokens of a batch: W0 is read once for all of them, and not at all when none needs it.

Serves decoding, where it is the share that all rows have in common, and padding. The reduction over F may be
split so that a narrow output still fills the device; who reads the result adds the shares up. May be changed
here: the schedule.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def base_apply_kernel(
    h,
    base,
    need,
    partial,
    M,
    F,
    D,
    SPLIT,
    stride_h,
    stride_bo,
    stride_bi,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one share; see :func:`base_apply`."""
    i_s = tl.program_id(2)
    r_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    m_m = (r_m < M) & (tl.load(need + r_m, mask=r_m < M, other=0) != 0)
    if tl.max(m_m.to(tl.int32), 0) == 0:
        return
    o64 = (tl.program_id(1) * BO + tl.arange(0, BO)).to(tl.int64)
    m_o = o64 < D
    acc = tl.zeros((BM, BO), dtype=tl.float32)
    for start in range(i_s * SPLIT, tl.minimum((i_s + 1) * SPLIT, F), BI):
        i64 = (start + tl.arange(0, BI)).to(tl.int64)
        m_i = i64 < F
        x = tl.load(h + r_m[:, None] * stride_h + i64[None, :], mask=m_m[:, None] & m_i[None, :], other=0.0)
        u = tl.load(
            base + o64[:, None] * stride_bo + i64[None, :] * stride_bi,
            mask=m_o[:, None] & m_i[None, :],
            other=0.0,
        )
        acc = tl.dot(x, tl.trans(u.to(x.dtype)), acc, input_precision=PRECISION)
    to = partial + (i_s * tl.cast(M, tl.int64) + r_m[:, None]) * D + o64[None, :]
    tl.store(to, acc, mask=m_m[:, None] & m_o[None, :])


def base_apply(
    h: Tensor,
    base: Tensor,
    need: Tensor,
    *,
    tokens: int,
    outer: int,
    inner: int,
    shares: int,
    warps: int = 4,
    precision: str = "ieee",
) -> Tensor:
    """Launch.

    Args:
        h: ``[M, F]``, the last dimension contiguous.
        base: ``[D, F]`` of any strides.
        need: bool or int ``[M]``: which tokens are wanted; the others stay undefined.
        tokens: BM, a power of two from 16 on.
        outer: BO.
        inner: BI.
        shares: into how many parts F is split.
        warps: of a program.
        precision: of products of fp32 operands.

    Returns:
        fp32 ``[S, M, D]``, to be added up over S.
    """
    count, width = h.shape
    depth = base.shape[0]
    split = triton.cdiv(triton.cdiv(width, shares), inner) * inner
    shares = triton.cdiv(width, split)
    partial = torch.empty(shares, count, depth, dtype=torch.float32, device=h.device)
    # Blocks of tokens may be more than the 65,535 that the other axes of a grid take.
    base_apply_kernel[(triton.cdiv(count, tokens), triton.cdiv(depth, outer), shares)](
        h,
        base,
        need,
        partial,
        count,
        width,
        depth,
        split,
        h.stride(0),
        *base.stride(),
        BM=tokens,
        BO=outer,
        BI=inner,
        PRECISION=precision,
        num_warps=warps,
        num_stages=3,
    )
    return partial


def naive_base_apply(h: Tensor, base: Tensor) -> Tensor:
    """The sum over the shares, for all tokens, in the operands' dtype."""
    return h @ base.to(h.dtype).t()
