"""Complete chunks are written into slots: ``W = base + decay (W - base) + v^T k``, chunk by chunk.

One launch for the batch. A row has few programs; each takes every n-th tile of W, keeps it on the chip while
all due chunks of the row pass, and exits at once when none is due. A tile is read and stored by one program
alone, so a slot is updated in place. Rows that were factored start from ``base + V^T H``. May be changed
here: the schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_compiler.codegen.kernels.tiles import Tile
from ttt_compiler.codegen.layout import factored_capacity

# Columns of ``jobs``.
MEMBER, K_START, CHUNKS, SOURCE, TARGET, FOLDED, WRITTEN, V_START = range(8)
JOB_COLUMNS = 8


@triton.jit
def write_chunks_kernel(
    w,
    base,
    k,
    lanes,
    v,
    staged,
    jobs,
    O,
    I,
    A,
    M,
    CAPACITY,
    stride_bo,
    stride_bi,
    CHUNK: tl.constexpr,
    DECAY: tl.constexpr,
    HAS_LANES: tl.constexpr,
    HAS_STAGED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every n-th tile of one row's W; see :func:`write_chunks` for the arguments."""
    i_b = tl.program_id(1).to(tl.int64)
    job = jobs + i_b * 8
    target = tl.load(job + 4)
    if target < 0:
        return
    member = tl.load(job)
    k_start = tl.load(job + 1)
    chunks = tl.load(job + 2)
    source = tl.load(job + 3)
    folded = tl.load(job + 5)
    written = tl.load(job + 6)
    v_start = tl.load(job + 7)
    r_m = tl.arange(0, BM)
    tiles_i = (I + BI - 1) // BI
    for i in range(tl.program_id(0), tiles_i * ((O + BO - 1) // BO), PROGRAMS):
        o64 = ((i // tiles_i) * BO + tl.arange(0, BO)).to(tl.int64)
        i64 = ((i % tiles_i) * BI + tl.arange(0, BI)).to(tl.int64)
        m_o = o64 < O
        m_i = i64 < I
        m_w = m_o[:, None] & m_i[None, :]
        p_base = base + o64[:, None] * stride_bo + i64[None, :] * stride_bi
        if source >= 0:
            acc = tl.load(w + (source * O + o64[:, None]) * I + i64[None, :], mask=m_w, other=0.0)
        else:
            acc = tl.load(p_base, mask=m_w, other=0.0).to(tl.float32)
        if HAS_STAGED:
            rows = staged + i_b * CAPACITY * (O + I)
            for t0 in range(0, folded, BM):
                m64 = (t0 + r_m).to(tl.int64)
                m_m = m64 < folded
                x = tl.load(
                    rows + m64[:, None] * I + i64[None, :], mask=m_m[:, None] & m_i[None, :], other=0.0
                )
                u = tl.load(
                    rows + tl.cast(CAPACITY, tl.int64) * I + m64[:, None] * O + o64[None, :],
                    mask=m_m[:, None] & m_o[None, :],
                    other=0.0,
                )
                acc = tl.dot(tl.trans(u), x, acc, input_precision=PRECISION)
        for c in range(chunks):
            if DECAY != 1.0:
                anchor = tl.load(p_base, mask=m_w, other=0.0).to(tl.float32)
                acc = anchor + DECAY * (acc - anchor)
            if written != 0:
                # A name of its own: the loop above counts in 64 bits.
                for t1 in range(0, CHUNK, BM):
                    in_chunk = t1 + r_m < CHUNK
                    token = (c * CHUNK + t1 + r_m).to(tl.int64)
                    column = (k_start + token) % A
                    if HAS_LANES:
                        lane = tl.load(lanes + member * A + column, mask=in_chunk, other=0).to(tl.int64)
                    else:
                        lane = member + tl.zeros((BM,), dtype=tl.int64)
                    u = tl.load(
                        v + (i_b * M + v_start + token[:, None]) * O + o64[None, :],
                        mask=in_chunk[:, None] & m_o[None, :],
                        other=0.0,
                    )
                    x = tl.load(
                        k + (lane * A + column)[:, None] * I + i64[None, :],
                        mask=in_chunk[:, None] & m_i[None, :],
                        other=0.0,
                    )
                    acc = tl.dot(tl.trans(u), x.to(u.dtype), acc, input_precision=PRECISION)
        tl.store(w + (target * O + o64[:, None]) * I + i64[None, :], acc, mask=m_w)


@dataclass(frozen=True)
class Keys:
    """Hidden rows of chunks: a plain buffer, or the ring.

    Attributes:
        rows: ``[L, A, I]``, contiguous; token p of a row lies in column p mod A.
        lanes: int32 ``[L, A]``: which lane holds a row's entry, or None when every row uses its own.
    """

    rows: Tensor
    lanes: Tensor | None = None


def write_chunks(
    w: Tensor,
    base: Tensor,
    keys: Keys,
    v: Tensor,
    staged: Tensor | None,
    jobs: Tensor,
    chunk: int,
    tile: Tile,
    programs: int,
    *,
    decay: float = 1.0,
    precision: str = "ieee",
) -> None:
    """Launch the write.

    Args:
        w: fp32 ``[L, O, I]`` slots, changed in place.
        base: ``[O, I]`` of any strides.
        keys: hidden rows.
        v: ``[B, M, O]``, contiguous, of the operands' dtype.
        staged: of :func:`~ttt_compiler.codegen.kernels.own_slot.own_slot`, or None without factored rows.
        jobs: int64 ``[B, 8]``: MEMBER, the row of the keys; K_START, its first due token; CHUNKS, how many
            are due; SOURCE, the slot to start from, or -1 for the base; TARGET, the slot to store, or -1 for
            nothing; FOLDED, staged tokens to add first; WRITTEN, 0 when the due chunks only decay; V_START,
            where v of the first due token stands.
        chunk: C.
        tile: the schedule.
        programs: per row.
        decay: gamma.
        precision: of products of fp32 operands.
    """
    write_chunks_kernel[(programs, len(jobs))](
        w,
        base,
        keys.rows,
        keys.lanes,
        v,
        staged,
        jobs,
        w.shape[1],
        w.shape[2],
        keys.rows.shape[1],
        v.shape[1],
        factored_capacity(w.shape[1], w.shape[2]),
        *base.stride(),
        CHUNK=chunk,
        DECAY=decay,
        HAS_LANES=keys.lanes is not None,
        HAS_STAGED=staged is not None,
        PROGRAMS=programs,
        BM=tile.tokens,
        BO=tile.outer,
        BI=tile.inner,
        PRECISION=precision,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def naive_write_chunks(
    w: Tensor,
    base: Tensor,
    keys: Keys,
    v: Tensor,
    staged: Tensor | None,
    jobs: Tensor,
    chunk: int,
    *,
    decay: float = 1.0,
) -> None:
    """What the kernel does, row by row, in the slots' dtype."""
    _, o, i = w.shape
    size = keys.rows.shape[1]
    wide = base.to(w.dtype)
    for b, job in enumerate(jobs.tolist()):
        member, start, chunks, source, target, folded, written, v_start = job
        if target < 0:
            continue
        out = (w[source] if source >= 0 else wide).clone()
        if staged is not None and folded:
            h = staged[b, : folded * i].view(folded, i).to(w.dtype)
            x = staged[b, factored_capacity(o, i) * i :][: folded * o].view(folded, o).to(w.dtype)
            out += x.t() @ h
        for c in range(chunks):
            out = wide + decay * (out - wide)
            if written:
                tokens = torch.arange(c * chunk, (c + 1) * chunk)
                columns = (start + tokens) % size
                lanes = member if keys.lanes is None else keys.lanes[member, columns].long()
                out += v[b, v_start + tokens].to(w.dtype).t() @ keys.rows[lanes, columns].to(v.dtype).to(
                    w.dtype
                )
        w[target] = out
