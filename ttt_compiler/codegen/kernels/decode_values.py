"""v of chunks that one token makes due, or that wait without it: computed on the device when there is any.

Launches whose programs exit at once when no row has such a chunk: v = conv(t) @ P, the norms of its rows, and
what :mod:`.decode_controls` makes of them. Which chunks they are follows from the plan, so nothing is asked
on the host. May be changed here: the schedule; what v is, is
:func:`ttt_compiler.codegen.reference.increment`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_compiler.codegen.kernels.decode_controls import Blocks, apply_controls
from ttt_compiler.codegen.kernels.decode_items import chunk_of, entries
from ttt_compiler.codegen.kernels.decode_plan import FORM, MEMBER, NONE, UNCACHED, WAIT_FIRST, WAITING
from ttt_compiler.codegen.layout import StateTensors
from ttt_compiler.spec import SiteSpec


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
    active, member, first, to = chunk_of(plan, tl.program_id(1), CACHE, PLACES, CHUNK)
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
                at = entries(lanes, member, first + tl.where(inside, s, 0), A, inside, HAS_LANES)
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
    active, member, first, to = chunk_of(plan, i_n, CACHE, PLACES, CHUNK)
    if not active:
        return
    r = tl.program_id(0) * BT + tl.arange(0, BT)
    m = r < CHUNK
    at = entries(lanes, member, first + r, A, m, HAS_LANES)
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
    chunk = spec.chunk
    places = max(state.tail_v.shape[1] // chunk, 1) if cache else 1
    count = len(plan) * places
    f, d, dt = state.w.shape[2], state.w.shape[1], state.tail_t.shape[2]
    squares = torch.empty(count, 2 * chunk, dtype=torch.float32, device=v.device)
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
        num_warps=blocks.warps,
        **here,
    )
    squares_kernel[(rows, count)](
        state.tail_h, state.lanes, plan, v, squares, state.capacity, f, d, BT=bt, BK=blocks.depth, **here
    )
    verdict = apply_controls(
        v,
        squares,
        w0,
        spec,
        state,
        plan,
        write_jobs,
        blocks,
        rows,
        bt,
        cache=cache,
        tiny=tiny,
        precision=precision,
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
