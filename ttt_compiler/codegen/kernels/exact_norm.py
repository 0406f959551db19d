"""The norm of a write from the write itself, where its Gram matrices cannot say it.

``||u^T k||^2 = <u u^T, k k^T>`` is cheap, but of rows that cancel it leaves little but rounding errors, and a
limit on them would not hold. Then, and only then, the product of W's size is computed, tile by tile, and not
kept. May be changed here: the schedule, and from where on the Gram form is trusted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_compiler.codegen.kernels.decode_items import chunk_of, entries
from ttt_compiler.codegen.layout import StateTensors
from ttt_compiler.codegen.reference import CANCELLED

_DOUBT: tl.constexpr = tl.constexpr(CANCELLED * torch.finfo(torch.float32).eps)


@triton.jit
def sums_of_squares(row, UNIT: tl.constexpr, TINY: tl.constexpr, CHUNK: tl.constexpr, CP: tl.constexpr):
    """``||u||^2`` and ``||k||^2`` of a chunk, from the squared norms of its rows of v and h."""
    c = tl.arange(0, CP)
    of_v = tl.load(row + c, mask=c < CHUNK, other=0.0)
    of_h = tl.load(row + CHUNK + c, mask=c < CHUNK, other=0.0)
    if UNIT:
        of_v = of_v / tl.where(tl.sqrt(of_h) > TINY, of_h, 1.0)
    return tl.sum(of_v, 0), tl.sum(of_h, 0)


@triton.jit
def summed(shares, SHARES: tl.constexpr, BLOCK: tl.constexpr):
    """What several programs have left, added up."""
    i = tl.arange(0, BLOCK)
    return tl.sum(tl.load(shares + i, mask=i < SHARES, other=0.0), 0)


@triton.jit
def exact_norm_kernel(
    tail_h,
    lanes,
    plan,
    v,
    squares,
    gram,
    exact,
    A,
    F,
    D,
    UNIT: tl.constexpr,
    TINY: tl.constexpr,
    HAS_LANES: tl.constexpr,
    CACHE: tl.constexpr,
    PLACES: tl.constexpr,
    CHUNK: tl.constexpr,
    SHARES: tl.constexpr,
    CP: tl.constexpr,
    GP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """One program's share of ``||u^T k||^2``, where the Gram form is in doubt: ``exact [N, PROGRAMS]``."""
    i_n = tl.program_id(1)
    active, member, first, to = chunk_of(plan, i_n, CACHE, PLACES, CHUNK)
    if not active:
        return
    row = squares + i_n.to(tl.int64) * 2 * CHUNK
    sum_v, sum_h = sums_of_squares(row, UNIT, TINY, CHUNK, CP)
    square = summed(gram + i_n.to(tl.int64) * SHARES, SHARES, GP)
    if not square < _DOUBT * sum_v * sum_h:
        # Who reads the shares learns it from here: two kernels may round a borderline case differently.
        tl.store(exact + i_n.to(tl.int64) * PROGRAMS + tl.program_id(0), -1.0)
        return
    tiles_f = (F + BK - 1) // BK
    total = tl.zeros((BK, BK), dtype=tl.float32)
    for i in range(tl.program_id(0), tiles_f * ((D + BK - 1) // BK), PROGRAMS):
        r_d = (i // tiles_f) * BK + tl.arange(0, BK)
        r_f = (i % tiles_f) * BK + tl.arange(0, BK)
        acc = tl.zeros((BK, BK), dtype=tl.float32)
        for start in range(0, CHUNK, BT):
            r = start + tl.arange(0, BT)
            m = r < CHUNK
            at = entries(lanes, member, first + r, A, m, HAS_LANES)
            m_d = m[:, None] & (r_d < D)[None, :]
            x = tl.load(v + (to * CHUNK + r)[:, None] * D + r_d[None, :], mask=m_d, other=0.0)
            m_f = m[:, None] & (r_f < F)[None, :]
            z = tl.load(tail_h + at[:, None] * F + r_f[None, :], mask=m_f, other=0.0)
            z = z.to(v.dtype.element_ty).to(tl.float32)
            x = x.to(tl.float32)
            if UNIT:
                size = tl.sqrt(tl.load(row + CHUNK + r, mask=m, other=1.0))
                x = x / tl.where(size > TINY, size, 1.0)[:, None]
            acc = tl.dot(tl.trans(x), z, acc, input_precision="ieee")
        total += acc * acc
    tl.store(exact + i_n.to(tl.int64) * PROGRAMS + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


def exact_norm(
    v: Tensor,
    squares: Tensor,
    gram: Tensor,
    state: StateTensors,
    plan: Tensor,
    programs: int,
    *,
    unit: bool,
    tiny: float,
    cache: bool,
    chunk: int,
) -> Tensor:
    """Launch.

    Args:
        v: as in :func:`~ttt_compiler.codegen.kernels.decode_values.decode_values`.
        squares: fp32 ``[N, 2 C]``, squared norms of the rows of v and h.
        gram: fp32 ``[N, S]``, shares of the Gram form.
        state: the site's tensors.
        plan: of the token.
        programs: for each chunk.
        unit: whether the rows of h count with norm one.
        tiny: rows of h below that norm are as they are.
        cache: for waiting chunks.
        chunk: C.

    Returns:
        fp32 ``[N, programs]``, to be added up; -1 where the Gram form is trusted.
    """
    count, shares = gram.shape
    exact = torch.empty(count, programs, dtype=torch.float32, device=v.device)
    exact_norm_kernel[(programs, count)](
        state.tail_h,
        state.lanes,
        plan,
        v,
        squares,
        gram,
        exact,
        state.capacity,
        state.w.shape[2],
        state.w.shape[1],
        UNIT=unit,
        TINY=tiny,
        HAS_LANES=state.lanes.shape[1] > 0,
        CACHE=cache,
        PLACES=count // len(plan),
        CHUNK=chunk,
        SHARES=shares,
        CP=triton.next_power_of_2(chunk),
        GP=triton.next_power_of_2(shares),
        PROGRAMS=programs,
        BT=16,
        BK=32,
        num_warps=4,
    )
    return exact
