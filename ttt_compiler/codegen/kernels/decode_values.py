"""v of chunks that one token makes due, or that wait without it: computed on the device when there is any.

Launches whose programs exit at once when no row has such a chunk: v = conv(t) @ P; norms of its rows; the
norm of the write, under a limit; and the scaling that the update controls ask for. Which chunks they are
follows from the plan, so nothing is asked on the host. May be changed here: the schedule; what v is, is
:func:`ttt_compiler.codegen.reference.increment`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_compiler.codegen.kernels.decode_plan import FORM, MEMBER, NONE, UNCACHED, WAIT_FIRST, WAITING
from ttt_compiler.codegen.layout import StateTensors
from ttt_compiler.spec import SiteSpec

# Columns of the verdict on a chunk, fp32.
FINITE, CLIPPED, NORM = range(3)


@triton.jit
def _chunk_of(plan, i_n, CACHE: tl.constexpr, PLACES: tl.constexpr, CHUNK: tl.constexpr):
    """Whether item n is a chunk, its row of the tables, its first token, and where its v goes."""
    row = plan + (i_n // PLACES).to(tl.int64) * 14
    member = tl.load(row + 12)
    first = tl.load(row + 4)
    if CACHE:
        i_c = i_n % PLACES
        index = first // CHUNK + i_c
        active = (i_c < tl.load(row + 5)) & (index >= tl.load(row + 11))
        first += i_c * CHUNK
        to = member * PLACES + index % PLACES
    else:
        active = tl.load(row + 9) != 0
        to = i_n.to(tl.int64)
    return active, member, first, to


@triton.jit
def _entries(lanes, member, token, A, mask, HAS_LANES: tl.constexpr):
    """Where tokens of a row stand in the ring."""
    column = token % A
    if HAS_LANES:
        lane = tl.load(lanes + member * A + column, mask=mask, other=0).to(tl.int64)
    else:
        lane = member + tl.zeros_like(column)
    return lane * A + column


@triton.jit
def values_kernel(
    tail_t,
    lanes,
    conv,
    proj,
    plan,
    v,
    A,
    DT,
    D,
    stride_pt,
    stride_pd,
    SCALE: tl.constexpr,
    KERNEL: tl.constexpr,
    HAS_PROJ: tl.constexpr,
    HAS_LANES: tl.constexpr,
    CACHE: tl.constexpr,
    PLACES: tl.constexpr,
    CHUNK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every n-th tile of one chunk's v, unscaled by the controls."""
    active, member, first, to = _chunk_of(plan, tl.program_id(1), CACHE, PLACES, CHUNK)
    if not active:
        return
    tiles_n = (D + BN - 1) // BN
    for i in range(tl.program_id(0), tiles_n * ((CHUNK + BM - 1) // BM), PROGRAMS):
        r_m = (i // tiles_n) * BM + tl.arange(0, BM)
        r_n = (i % tiles_n) * BN + tl.arange(0, BN)
        m_n = r_n < D
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in range(0, DT if HAS_PROJ else 1, BK):
            # Without P the channels of t are those of v.
            r_k = k0 + tl.arange(0, BK) if HAS_PROJ else r_n
            m_k = r_k < DT
            mixed = tl.zeros((BM, BK if HAS_PROJ else BN), dtype=tl.float32)
            for tap in tl.static_range(KERNEL):
                s = r_m + (tap - KERNEL // 2)
                inside = (s >= 0) & (s < CHUNK) & (r_m < CHUNK)
                at = _entries(lanes, member, first + tl.where(inside, s, 0), A, inside, HAS_LANES)
                x = tl.load(
                    tail_t + at[:, None] * DT + r_k[None, :], mask=inside[:, None] & m_k[None, :], other=0.0
                )
                c = tl.load(conv + r_k * KERNEL + tap, mask=m_k, other=0.0)
                mixed += x.to(v.dtype.element_ty).to(tl.float32) * c.to(tl.float32)[None, :]
            if HAS_PROJ:
                p = tl.load(
                    proj + r_k.to(tl.int64)[:, None] * stride_pt + r_n[None, :] * stride_pd,
                    mask=m_k[:, None] & m_n[None, :],
                    other=0.0,
                )
                p = (p.to(tl.float32) * SCALE).to(v.dtype.element_ty)
                acc = tl.dot(mixed.to(v.dtype.element_ty), p, acc, input_precision=PRECISION)
            else:
                acc = mixed.to(v.dtype.element_ty).to(tl.float32) * SCALE
        out = v + (to * CHUNK + r_m[:, None]) * D + r_n[None, :]
        tl.store(out, acc.to(v.dtype.element_ty), mask=(r_m < CHUNK)[:, None] & m_n[None, :])


@triton.jit
def squares_kernel(
    tail_h,
    lanes,
    plan,
    v,
    squares,
    A,
    F,
    D,
    HAS_LANES: tl.constexpr,
    CACHE: tl.constexpr,
    PLACES: tl.constexpr,
    CHUNK: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Squared norms of some tokens' v and h: ``squares [N, 2, C]``."""
    i_n = tl.program_id(1)
    active, member, first, to = _chunk_of(plan, i_n, CACHE, PLACES, CHUNK)
    if not active:
        return
    r = tl.program_id(0) * BT + tl.arange(0, BT)
    m = r < CHUNK
    at = _entries(lanes, member, first + r, A, m, HAS_LANES)
    sum_v = tl.zeros((BT, BK), dtype=tl.float32)
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(
            v + (to * CHUNK + r)[:, None] * D + k[None, :], mask=m[:, None] & (k < D)[None, :], other=0.0
        )
        sum_v += x.to(tl.float32) * x.to(tl.float32)
    sum_h = tl.zeros((BT, BK), dtype=tl.float32)
    for k0 in range(0, F, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(tail_h + at[:, None] * F + k[None, :], mask=m[:, None] & (k < F)[None, :], other=0.0)
        x = x.to(v.dtype.element_ty).to(tl.float32)
        sum_h += x * x
    row = squares + i_n.to(tl.int64) * 2 * CHUNK
    tl.store(row + r, tl.sum(sum_v, 1), mask=m)
    tl.store(row + CHUNK + r, tl.sum(sum_h, 1), mask=m)


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
    active, member, first, to = _chunk_of(plan, i_n, CACHE, PLACES, CHUNK)
    if not active:
        return
    i = tl.program_id(0)
    r_a = (i // TILES) * BT + tl.arange(0, BT)
    r_b = (i % TILES) * BT + tl.arange(0, BT)
    m_a = r_a < CHUNK
    m_b = r_b < CHUNK
    at_a = _entries(lanes, member, first + r_a, A, m_a, HAS_LANES)
    at_b = _entries(lanes, member, first + r_b, A, m_b, HAS_LANES)
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
    active, _, _, to = _chunk_of(plan, i_n, CACHE, PLACES, CHUNK)
    if not active:
        return
    row = squares + i_n.to(tl.int64) * 2 * CHUNK
    c = tl.arange(0, CP)
    of_v = tl.load(row + c, mask=c < CHUNK, other=0.0)
    of_h = tl.load(row + CHUNK + c, mask=c < CHUNK, other=0.0)
    if UNIT:
        of_v = of_v / tl.where(tl.sqrt(of_h) > TINY, of_h, 1.0)
    sum_v = tl.sum(of_v, 0)
    sum_h = tl.sum(of_h, 0)
    finite = (sum_v < float("inf")) & (sum_h < float("inf"))
    norm = tl.sqrt(sum_v) * tl.sqrt(sum_h)
    clipped = norm < 0.0
    factor = tl.where(clipped, norm, 1.0)
    if LIMITED:
        i = tl.arange(0, GP)
        shares = tl.load(gram + i_n.to(tl.int64) * TILES * TILES + i, mask=i < TILES * TILES, other=0.0)
        norm = tl.sqrt(tl.maximum(tl.sum(shares, 0), 0.0))
        limit = tl.cast(MAX_NORM, tl.float32)
        if RELATIVE:
            i = tl.arange(0, SP)
            of_base = tl.load(base_squares + i, mask=i < SHARES, other=0.0)
            limit = tl.minimum(limit, MAX_RATIO * tl.sqrt(tl.sum(of_base, 0)))
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
    """How the kernels share out their work: tokens, columns, depth of a tile; programs per chunk."""

    tokens: int
    columns: int
    depth: int
    programs: int


def decode_values(
    v: Tensor,
    w0: Tensor,
    conv: Tensor,
    proj: Tensor | None,
    spec: SiteSpec,
    state: StateTensors,
    plan: Tensor,
    write_jobs: Tensor,
    blocks: Blocks,
    *,
    cache: bool,
    tiny: float,
    precision: str = "ieee",
) -> Tensor:
    """Launch.

    Args:
        v: of the operands' dtype, contiguous: ``[B, C, D]`` for due chunks, ``tail_v`` for waiting ones.
        w0: ``[D, F]`` of any strides.
        conv: ``[Dt, 1, K]``, contiguous.
        proj: ``[Dt, D]`` of any strides, or None.
        spec: the site's constants.
        state: the site's tensors; the token of the call is in the ring.
        plan: of :func:`~ttt_compiler.codegen.kernels.decode_plan.decode_plan`.
        write_jobs: of the same; WRITTEN is set for due chunks.
        blocks: the schedule.
        cache: for waiting chunks whose v is not kept yet, instead of due ones.
        tiny: rows of h below that norm are written as they are.
        precision: of products of fp32 operands.

    Returns:
        fp32 ``[N, 4]``: FINITE, CLIPPED, NORM of the chunks there are; others undefined.
    """
    rule, chunk = spec.rule, spec.chunk
    places = max(state.tail_v.shape[1] // chunk, 1) if cache else 1
    count = len(plan) * places
    f, d, dt = state.w.shape[2], state.w.shape[1], state.tail_t.shape[2]
    empty = [torch.empty(count, n, dtype=torch.float32, device=v.device) for n in (2 * chunk, 4)]
    squares, verdict = empty
    here = {"HAS_LANES": state.lanes.shape[1] > 0, "CACHE": cache, "PLACES": places, "CHUNK": chunk}
    bt = min(blocks.tokens, max(16, triton.next_power_of_2(chunk)))
    rows = triton.cdiv(chunk, bt)
    values_kernel[(blocks.programs, count)](
        state.tail_t,
        state.lanes,
        conv,
        proj,
        plan,
        v,
        state.capacity,
        dt,
        d,
        *((0, 0) if proj is None else proj.stride()),
        SCALE=spec.write_scale,
        KERNEL=conv.shape[-1],
        HAS_PROJ=proj is not None,
        PROGRAMS=blocks.programs,
        BM=bt,
        BN=blocks.columns,
        BK=blocks.depth,
        PRECISION=precision,
        **here,
    )
    squares_kernel[(rows, count)](
        state.tail_h, state.lanes, plan, v, squares, state.capacity, f, d, BT=bt, BK=blocks.depth, **here
    )
    gram = base_squares = None
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
            TILES=rows,
            BT=bt,
            BK=blocks.depth,
            PRECISION=precision,
            **here,
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
    del here["HAS_LANES"]
    control_kernel[(rows, count)](
        plan,
        v,
        squares,
        gram,
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
        BT=bt,
        BK=blocks.depth,
        **here,
    )
    return verdict


def naive_decode_values(
    v: Tensor,
    w0: Tensor,
    conv: Tensor,
    proj: Tensor | None,
    spec: SiteSpec,
    state: StateTensors,
    plan: Tensor,
    *,
    cache: bool,
) -> Tensor:
    """What the kernels compute, chunk by chunk, by the CPU's function; the verdict's first column alone."""
    from ttt_compiler.codegen.cpu.controls import limited
    from ttt_compiler.codegen.reference import target, write_limit

    chunk = spec.chunk
    places = state.tail_v.shape[1] // chunk if cache else 1
    verdict = torch.zeros(len(plan) * places, 1)
    for n in range(len(verdict)):
        row = plan[n // places].tolist()
        index = row[WAIT_FIRST] // chunk + (n % places if cache else 0)
        active = row[FORM] != NONE
        if cache:
            active = n % places < row[WAITING] and index >= row[UNCACHED]
        if not active:
            continue
        columns = torch.arange(index * chunk, (index + 1) * chunk) % state.capacity
        lanes = state.lanes[row[MEMBER], columns].long() if state.lanes.shape[1] else row[MEMBER]
        h, t = (x[lanes, columns].to(v.dtype) for x in (state.tail_h, state.tail_t))
        raw = spec.write_scale * target(t, conv, proj)
        out, _ = limited(raw, h, write_limit(w0, spec.rule), spec.rule.keys == "unit")
        verdict[n] = bool(out.isfinite().all() & h.isfinite().all())
        place = v[n] if not cache else v[row[MEMBER]].unflatten(0, (places, chunk))[index % places]
        place.copy_(out) if verdict[n] else place.fill_(float("nan"))
    return verdict
