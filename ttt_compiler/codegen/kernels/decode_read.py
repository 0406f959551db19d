"""One token of every row meets its matrix: dense, factored, and chunks that wait to be written.

``y = h W^T`` of rows with a matrix of their own, which read it once and nothing else; ``h W0^T`` (from
:mod:`.base_apply`, read once for the batch) plus ``sum (h . k) v`` over factored rows for the others; and the
same sum over complete chunks that may still be taken back. W is rounded to the operands' dtype as the scan
does it, so decoding reads what a prefill reads. May be changed here: the schedule.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_compiler.codegen.kernels.decode_plan import FOLDED, FROM, MEMBER, READ, WAIT_FIRST, WAITING
from ttt_compiler.codegen.layout import StateTensors, factored_capacity, factored_rows


@triton.jit
def dense_apply_kernel(h, w, plan, partial, B, F, D, SPLIT, stride_h, BO: tl.constexpr, BI: tl.constexpr):
    """One block of outputs of one row, one share of F; see :func:`decode_read`."""
    i_b = tl.program_id(1).to(tl.int64)
    i_s = tl.program_id(2)
    slot = tl.load(plan + i_b * 14)
    if slot < 0:
        return
    o64 = (tl.program_id(0) * BO + tl.arange(0, BO)).to(tl.int64)
    m_o = o64 < D
    acc = tl.zeros((BO, BI), dtype=tl.float32)
    for start in range(i_s * SPLIT, tl.minimum((i_s + 1) * SPLIT, F), BI):
        i64 = (start + tl.arange(0, BI)).to(tl.int64)
        m_i = i64 < F
        x = tl.load(h + i_b * stride_h + i64, mask=m_i, other=0.0)
        tile = tl.load(
            w + (slot * D + o64[:, None]) * F + i64[None, :], mask=m_o[:, None] & m_i[None, :], other=0.0
        )
        acc += tile.to(x.dtype).to(tl.float32) * x.to(tl.float32)[None, :]
    tl.store(partial + (i_s * tl.cast(B, tl.int64) + i_b) * D + o64, tl.sum(acc, 1), mask=m_o)


@triton.jit
def scores_kernel(
    h,
    rows,
    tail_h,
    lanes,
    plan,
    scores,
    F,
    A,
    N,
    ROOM,
    SLOT_ROWS,
    stride_h,
    CHUNK: tl.constexpr,
    DECAY: tl.constexpr,
    HAS_LANES: tl.constexpr,
    BT: tl.constexpr,
    BI: tl.constexpr,
):
    """``h . k`` of some keys of one row: factored ones, then those of waiting chunks, which decay."""
    i_b = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BT + tl.arange(0, BT)
    folded = tl.load(plan + i_b * 14 + 1)
    waiting = tl.load(plan + i_b * 14 + 5)
    old = r < folded
    token = r - ROOM
    late = (token >= 0) & (token < waiting * CHUNK)
    if tl.max((old | late).to(tl.int32), 0) == 0:
        return
    acc = tl.zeros((BT, BI), dtype=tl.float32)
    slot = tl.load(plan + i_b * 14 + 2)
    member = tl.load(plan + i_b * 14 + 12)
    column = (tl.load(plan + i_b * 14 + 4) + tl.where(late, token, 0)) % A
    if HAS_LANES:
        lane = tl.load(lanes + member * A + column, mask=late, other=0).to(tl.int64)
    else:
        lane = member + tl.zeros((BT,), dtype=tl.int64)
    p_old = rows + slot * SLOT_ROWS + r.to(tl.int64) * F
    p_late = tail_h + (lane * A + column) * F
    for start in range(0, F, BI):
        i = start + tl.arange(0, BI)
        m_i = i < F
        x = tl.load(h + i_b * stride_h + i, mask=m_i, other=0.0)
        a = tl.load(p_old[:, None] + i[None, :], mask=old[:, None] & m_i[None, :], other=0.0)
        b = tl.load(p_late[:, None] + i[None, :], mask=late[:, None] & m_i[None, :], other=0.0)
        key = tl.where(late[:, None], b.to(tl.float32), a.to(tl.float32))
        acc += key * x.to(tl.float32)[None, :]
    weight = tl.full((BT,), 1.0, dtype=tl.float32)
    if DECAY != 1.0:
        for c in range(1, waiting):
            weight = tl.where(late & (token < c * CHUNK), weight * DECAY, weight)
    tl.store(scores + i_b * N + r, tl.sum(acc, 1) * weight, mask=old | late)


@triton.jit
def combine_kernel(
    base,
    dense,
    rows,
    tail_v,
    scores,
    bias,
    plan,
    y,
    B,
    D,
    N,
    ROOM,
    PLACES,
    SLOT_ROWS,
    VALUES,
    BASE_SHARES: tl.constexpr,
    DENSE_SHARES: tl.constexpr,
    CHUNK: tl.constexpr,
    DECAY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
):
    """One block of outputs of one row."""
    i_b = tl.program_id(1).to(tl.int64)
    o64 = (tl.program_id(0) * BO + tl.arange(0, BO)).to(tl.int64)
    m_o = o64 < D
    out = plan + i_b * 14
    first = tl.zeros((BO,), dtype=tl.float32)
    if tl.load(out + 3) != 0:
        for s in range(BASE_SHARES):
            first += tl.load(base + (s * tl.cast(B, tl.int64) + i_b) * D + o64, mask=m_o, other=0.0)
    # W - W0 of factored rows, or all of W.
    acc = first
    if tl.load(out) >= 0:
        acc = tl.zeros((BO,), dtype=tl.float32)
        for s in range(DENSE_SHARES):
            acc += tl.load(dense + (s * tl.cast(B, tl.int64) + i_b) * D + o64, mask=m_o, other=0.0)
    folded = tl.load(out + 1)
    values = rows + tl.load(out + 2) * SLOT_ROWS + VALUES
    for t0 in range(0, folded, BT):
        r = t0 + tl.arange(0, BT)
        x = tl.load(scores + i_b * N + r, mask=r < folded, other=0.0)
        u = tl.load(
            values + r.to(tl.int64)[:, None] * D + o64[None, :],
            mask=(r < folded)[:, None] & m_o[None, :],
            other=0.0,
        )
        acc += tl.sum(x[:, None] * u.to(tl.float32), 0)
    waiting = tl.load(out + 5)
    if DECAY != 1.0:
        if tl.load(out + 13) != 0:
            for _ in range(waiting):
                acc = first + DECAY * (acc - first)
    done = tl.load(out + 4) // CHUNK
    member = tl.load(out + 12)
    for c in range(waiting):
        place = (done + c) % PLACES
        # A name of its own: the loop above counts in 64 bits.
        for t1 in range(0, CHUNK, BT):
            r = t1 + tl.arange(0, BT)
            x = tl.load(scores + i_b * N + ROOM + c * CHUNK + r, mask=r < CHUNK, other=0.0)
            at = ((member * PLACES + place) * CHUNK + r)[:, None] * D + o64[None, :]
            u = tl.load(tail_v + at, mask=(r < CHUNK)[:, None] & m_o[None, :], other=0.0).to(tl.float32)
            # NaN marks a chunk that will not be written.
            acc += tl.sum(tl.where(u == u, x[:, None] * u, 0.0), 0)
    if HAS_BIAS:
        acc += tl.load(bias + o64, mask=m_o, other=0.0).to(tl.float32)
    tl.store(y + i_b * D + o64, acc.to(y.dtype.element_ty), mask=m_o)


def decode_read(
    h: Tensor,
    base: Tensor,
    bias: Tensor | None,
    state: StateTensors,
    plan: Tensor,
    chunk: int,
    *,
    decay: float,
    shares: int,
    outer: int,
    inner: int,
    tokens: int,
) -> Tensor:
    """Launch the three kernels.

    Args:
        h: ``[B, F]``, the last dimension contiguous.
        base: fp32 ``[S, B, D]``, shares of ``h W0^T`` of the rows that need it.
        bias: ``[D]`` or None.
        state: the site's tensors; ``tail_v`` holds v of every waiting chunk.
        plan: of :func:`~ttt_compiler.codegen.kernels.decode_plan.decode_plan`.
        chunk: C.
        decay: gamma.
        shares: into how many parts F is split.
        outer: BO.
        inner: BI.
        tokens: keys that are read at once.

    Returns:
        ``y [B, D]`` in h's dtype.
    """
    count, width = h.shape
    slots, depth, _ = state.w.shape
    split = triton.cdiv(triton.cdiv(width, shares), inner) * inner
    shares = triton.cdiv(width, split)
    dense = torch.empty(shares, count, depth, dtype=torch.float32, device=h.device)
    dense_apply_kernel[(triton.cdiv(depth, outer), count, shares)](
        h, state.w, plan, dense, count, width, depth, split, h.stride(0), BO=outer, BI=inner, num_warps=4
    )
    room, places = factored_capacity(depth, width), state.tail_v.shape[1] // chunk
    total = room + places * chunk
    scores = torch.empty(count, total, dtype=torch.float32, device=h.device)
    rows = state.w.view(-1).view(state.tail_h.dtype)
    slot_rows = rows.numel() // slots
    scores_kernel[(triton.cdiv(total, tokens), count)](
        h,
        rows,
        state.tail_h,
        state.lanes,
        plan,
        scores,
        width,
        state.capacity,
        total,
        room,
        slot_rows,
        h.stride(0),
        CHUNK=chunk,
        DECAY=decay,
        HAS_LANES=state.lanes.shape[1] > 0,
        BT=tokens,
        BI=inner,
        num_warps=4,
    )
    y = h.new_empty(count, depth)
    combine_kernel[(triton.cdiv(depth, outer), count)](
        base,
        dense,
        rows,
        state.tail_v,
        scores,
        bias,
        plan,
        y,
        count,
        depth,
        total,
        room,
        places,
        slot_rows,
        room * width,
        BASE_SHARES=base.shape[0],
        DENSE_SHARES=shares,
        CHUNK=chunk,
        DECAY=decay,
        HAS_BIAS=bias is not None,
        BT=tokens,
        BO=outer,
        num_warps=4,
    )
    return y


def naive_decode_read(
    h: Tensor,
    base: Tensor,
    bias: Tensor | None,
    state: StateTensors,
    plan: Tensor,
    chunk: int,
    *,
    decay: float,
) -> Tensor:
    """What the kernels compute, row by row, in fp64."""
    out = []
    for b, row in enumerate(plan.tolist()):
        x, of_base = h[b].double(), base.double().sum(0)[b]
        y = of_base
        if row[READ] >= 0:
            y = state.w[row[READ]].to(h.dtype).double() @ x
        elif row[FOLDED]:
            keys, values = factored_rows(state.w[row[FROM]], state.tail_h.dtype, row[FOLDED])
            y = of_base + (keys.double() @ x) @ values.double()
        if decay != 1.0 and row[WAITING]:
            y = of_base + decay ** row[WAITING] * (y - of_base)
        for c in range(row[WAITING]):
            first = row[WAIT_FIRST] + c * chunk
            columns = torch.arange(first, first + chunk) % state.capacity
            lanes = state.lanes[row[MEMBER], columns].long() if state.lanes.shape[1] else row[MEMBER]
            place = first // chunk % (state.tail_v.shape[1] // chunk) * chunk
            v = state.tail_v[row[MEMBER], place : place + chunk].double()
            if not v.isnan().any():
                y = y + decay ** (row[WAITING] - 1 - c) * (state.tail_h[lanes, columns].double() @ x) @ v
        out.append(y if bias is None else y + bias)
    return torch.stack(out).to(h.dtype)
