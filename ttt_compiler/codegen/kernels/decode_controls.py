"""The update controls on the chunks of one token: unit keys, limits, and chunks with NaN or Inf.

The norm of a write is that of its Gram matrices, ``||u^T k||^2 = <u u^T, k k^T>``: no product of W's size
is made unless rows cancel (:mod:`.exact_norm`). Programs without a chunk exit at once. May be changed here:
the schedule; what the controls mean is :func:`ttt_compiler.codegen.reference.increment`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_compiler.codegen.kernels.decode_items import chunk_of, entries
from ttt_compiler.codegen.kernels.exact_norm import exact_norm, summed, sums_of_squares
from ttt_compiler.codegen.layout import StateTensors
from ttt_compiler.spec import SiteSpec

# Columns of the verdict on a chunk, fp32.
FINITE, CLIPPED, NORM = range(3)


@triton.jit
def gram_kernel(
    tail_h,
    lanes,
    plan,
    v,
    squares,
    gram,
    A,
    F,
    D,
    UNIT: tl.constexpr,
    TINY: tl.constexpr,
    HAS_LANES: tl.constexpr,
    CACHE: tl.constexpr,
    PLACES: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile's share of ``||u^T k||^2 = <u u^T, k k^T>``: ``gram [N, TILES^2]``."""
    i_n = tl.program_id(1)
    active, member, first, to = chunk_of(plan, i_n, CACHE, PLACES, CHUNK)
    if not active:
        return
    i = tl.program_id(0)
    r_a = (i // TILES) * BT + tl.arange(0, BT)
    r_b = (i % TILES) * BT + tl.arange(0, BT)
    m_a = r_a < CHUNK
    m_b = r_b < CHUNK
    at_a = entries(lanes, member, first + r_a, A, m_a, HAS_LANES)
    at_b = entries(lanes, member, first + r_b, A, m_b, HAS_LANES)
    of_v = tl.zeros((BT, BT), dtype=tl.float32)
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        m_k = (k < D)[None, :]
        x = tl.load(v + (to * CHUNK + r_a)[:, None] * D + k[None, :], mask=m_a[:, None] & m_k, other=0.0)
        z = tl.load(v + (to * CHUNK + r_b)[:, None] * D + k[None, :], mask=m_b[:, None] & m_k, other=0.0)
        of_v = tl.dot(x, tl.trans(z), of_v, input_precision=PRECISION)
    of_k = tl.zeros((BT, BT), dtype=tl.float32)
    for k0 in range(0, F, BK):
        k = k0 + tl.arange(0, BK)
        m_k = (k < F)[None, :]
        x = tl.load(tail_h + at_a[:, None] * F + k[None, :], mask=m_a[:, None] & m_k, other=0.0)
        z = tl.load(tail_h + at_b[:, None] * F + k[None, :], mask=m_b[:, None] & m_k, other=0.0)
        x = x.to(v.dtype.element_ty)
        of_k = tl.dot(x, tl.trans(z.to(v.dtype.element_ty)), of_k, input_precision=PRECISION)
    if UNIT:
        row = squares + i_n.to(tl.int64) * 2 * CHUNK + CHUNK
        n_a = tl.sqrt(tl.load(row + r_a, mask=m_a, other=1.0))
        n_b = tl.sqrt(tl.load(row + r_b, mask=m_b, other=1.0))
        of_v = of_v / tl.where(n_a > TINY, n_a, 1.0)[:, None] / tl.where(n_b > TINY, n_b, 1.0)[None, :]
    total = tl.sum(tl.sum(of_v * of_k, 1), 0)
    tl.store(gram + i_n.to(tl.int64) * TILES * TILES + i, total)


@triton.jit
def base_squares_kernel(
    base,
    plan,
    total,
    B,
    O,
    I,
    stride_bo,
    stride_bi,
    PROGRAMS: tl.constexpr,
    BP: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
):
    """Shares of ``||W0||^2``; W0 is not read while no row has a chunk."""
    j = tl.arange(0, BP)
    some = tl.load(plan + j.to(tl.int64) * 14 + 9, mask=j < B, other=0) != 0
    some = some | (tl.load(plan + j.to(tl.int64) * 14 + 5, mask=j < B, other=0) != 0)
    if tl.max(some.to(tl.int32), 0) == 0:
        return
    tiles_i = (I + BI - 1) // BI
    acc = tl.zeros((BO, BI), dtype=tl.float32)
    for i in range(tl.program_id(0), tiles_i * ((O + BO - 1) // BO), PROGRAMS):
        o64 = ((i // tiles_i) * BO + tl.arange(0, BO)).to(tl.int64)
        i64 = ((i % tiles_i) * BI + tl.arange(0, BI)).to(tl.int64)
        m = (o64 < O)[:, None] & (i64 < I)[None, :]
        x = tl.load(base + o64[:, None] * stride_bo + i64[None, :] * stride_bi, mask=m, other=0.0)
        acc += x.to(tl.float32) * x.to(tl.float32)
    tl.store(total + tl.program_id(0), tl.sum(tl.sum(acc, 1), 0))


@triton.jit
def control_kernel(
    plan,
    v,
    squares,
    gram,
    exact,
    base_squares,
    verdict,
    write_jobs,
    D,
    MAX_NORM,
    MAX_RATIO,
    UNIT: tl.constexpr,
    LIMITED: tl.constexpr,
    RELATIVE: tl.constexpr,
    TINY: tl.constexpr,
    CACHE: tl.constexpr,
    PLACES: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    SHARES: tl.constexpr,
    CP: tl.constexpr,
    GP: tl.constexpr,
    SP: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Scale some tokens' v, or give the chunk up."""
    i_n = tl.program_id(1)
    active, _, _, to = chunk_of(plan, i_n, CACHE, PLACES, CHUNK)
    if not active:
        return
    row = squares + i_n.to(tl.int64) * 2 * CHUNK
    sum_v, sum_h = sums_of_squares(row, UNIT, TINY, CHUNK, CP)
    finite = (sum_v < float("inf")) & (sum_h < float("inf"))
    norm = tl.sqrt(sum_v) * tl.sqrt(sum_h)
    clipped = norm < 0.0
    factor = tl.where(clipped, norm, 1.0)
    if LIMITED:
        square = summed(gram + i_n.to(tl.int64) * TILES * TILES, TILES * TILES, GP)
        i = tl.arange(0, SP)
        shares = tl.load(exact + i_n.to(tl.int64) * SHARES + i, mask=i < SHARES, other=0.0)
        if tl.min(shares, 0) >= 0.0:
            square = tl.sum(shares, 0)
        norm = tl.sqrt(square)
        limit = tl.cast(MAX_NORM, tl.float32)
        if RELATIVE:
            limit = tl.minimum(limit, MAX_RATIO * tl.sqrt(summed(base_squares, SHARES, SP)))
        clipped = norm > limit
        factor = tl.where(clipped, limit / norm, 1.0)
        norm = tl.minimum(norm, limit)
    if tl.program_id(0) == 0:
        out = verdict + i_n.to(tl.int64) * 4
        tl.store(out, finite.to(tl.float32))
        tl.store(out + 1, clipped.to(tl.float32))
        tl.store(out + 2, norm)
        if not CACHE:
            tl.store(write_jobs + i_n.to(tl.int64) * 8 + 6, finite.to(tl.int64))
    # Where nothing is scaled and nothing is wrong, v stays as it is.
    if UNIT | LIMITED | (finite == 0):
        r = tl.program_id(0) * BT + tl.arange(0, BT)
        m = r < CHUNK
        scale = tl.zeros((BT,), dtype=tl.float32) + factor
        if UNIT:
            size = tl.sqrt(tl.load(row + CHUNK + r, mask=m, other=1.0))
            scale = scale / tl.where(size > TINY, size, 1.0)
        for k0 in range(0, D, BK):
            k = k0 + tl.arange(0, BK)
            at = v + (to * CHUNK + r)[:, None] * D + k[None, :]
            x = tl.load(at, mask=m[:, None] & (k < D)[None, :], other=0.0).to(tl.float32) * scale[:, None]
            # NaN marks a chunk that will not be written.
            x = tl.where(finite, x, float("nan"))
            tl.store(at, x.to(v.dtype.element_ty), mask=m[:, None] & (k < D)[None, :])


@dataclass(frozen=True)
class Blocks:
    """How the kernels share out their work: tokens, columns, depth of a tile; programs, warps."""

    tokens: int
    columns: int
    depth: int
    programs: int
    warps: int


def apply_controls(
    v: Tensor,
    squares: Tensor,
    w0: Tensor,
    spec: SiteSpec,
    state: StateTensors,
    plan: Tensor,
    write_jobs: Tensor,
    blocks: Blocks,
    rows: int,
    tokens: int,
    *,
    cache: bool,
    tiny: float,
    precision: str,
) -> Tensor:
    """Launch; see :func:`~ttt_compiler.codegen.kernels.decode_values.decode_values`, which tests hold it to.

    Args:
        v: as there; scaled in place, or NaN where the chunk is given up.
        squares: fp32 ``[N, 2 C]``, squared norms of the rows of v and h.
        w0: as there, and the next five.
        spec: constants.
        state: tensors.
        plan: of the token.
        write_jobs: of the token.
        blocks: the schedule.
        rows: blocks of tokens in a chunk.
        tokens: tokens in such a block.
        cache: as there, and the rest.
        tiny: see there.
        precision: see there.

    Returns:
        fp32 ``[N, 4]``.
    """
    rule, chunk, count = spec.rule, spec.chunk, len(squares)
    places = count // len(plan)
    f, d = state.w.shape[2], state.w.shape[1]
    verdict = torch.empty(count, 4, dtype=torch.float32, device=v.device)
    here = {"CACHE": cache, "PLACES": places, "CHUNK": chunk, "BT": tokens, "BK": blocks.depth}
    gram = exact = base_squares = None
    if rule.limited:
        gram = torch.empty(count, rows * rows, dtype=torch.float32, device=v.device)
        gram_kernel[(rows * rows, count)](
            state.tail_h,
            state.lanes,
            plan,
            v,
            squares,
            gram,
            state.capacity,
            f,
            d,
            UNIT=rule.keys == "unit",
            TINY=tiny,
            HAS_LANES=state.lanes.shape[1] > 0,
            TILES=rows,
            PRECISION=precision,
            **here,
        )
        exact = exact_norm(
            v,
            squares,
            gram,
            state,
            plan,
            blocks.programs,
            unit=rule.keys == "unit",
            tiny=tiny,
            cache=cache,
            chunk=chunk,
        )
    if rule.max_ratio is not None:
        base_squares = torch.empty(blocks.programs, dtype=torch.float32, device=v.device)
        base_squares_kernel[(blocks.programs,)](
            w0,
            plan,
            base_squares,
            len(plan),
            d,
            f,
            *w0.stride(),
            PROGRAMS=blocks.programs,
            BP=triton.next_power_of_2(max(len(plan), 2)),
            BO=32,
            BI=64,
        )
    control_kernel[(rows, count)](
        plan,
        v,
        squares,
        gram,
        exact,
        base_squares,
        verdict,
        write_jobs,
        d,
        float("inf") if rule.max_norm is None else rule.max_norm,
        0.0 if rule.max_ratio is None else rule.max_ratio,
        UNIT=rule.keys == "unit",
        LIMITED=rule.limited,
        RELATIVE=rule.max_ratio is not None,
        TINY=tiny,
        TILES=rows,
        SHARES=blocks.programs,
        CP=triton.next_power_of_2(chunk),
        GP=triton.next_power_of_2(rows * rows),
        SP=triton.next_power_of_2(blocks.programs),
        **here,
    )
    return verdict
