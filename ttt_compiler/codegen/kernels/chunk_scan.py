"""The chunk scan on GPUs: every program owns one tile of W and keeps it on the chip for the whole scan.

``y_i = q_i W_i^T; W_{i+1} = base + decay (W_i - base) + v_i^T k_i`` for q, k ``[B, T, I]``,
v ``[B, T, O]`` and W ``[O, I]``. Forward it is called with q = k = h; the gradients are scans as well, two of
them in reverse (``codegen/lowering_gpu.py``), so this is the only kernel of the scan.

A tile ``[BO, BI]`` depends on v's columns and k's columns of its own alone, so programs never wait for one
another, and W moves once per scan instead of twice per chunk. Per tile of tokens q is read once and serves
apply and update: the update accumulates into the fp32 tile while the apply reads its copy from the chunk's
start, rounded to the operands' dtype. The price is the reduction over I: a program adds its share of y into
its own slice of ``partial [S, B, T, O]`` and the sum over S is a pointwise kernel after it, into which
Inductor fuses what follows (bias, residual). A program walks every S-th tile of I, so S is free: enough to
fill the device. Everything is deterministic. Bytes: ``codegen/cost_model.py``.

May be changed here: the schedule. The layout of ``table`` is :mod:`ttt_compiler.codegen.kernels.chunk_table`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_compiler.codegen.kernels.chunk_table import CONTINUES, FRESH, PADDING, SKIPPED
from ttt_compiler.codegen.kernels.tiles import Tile


@triton.jit
def chunk_scan_kernel(
    q,
    k,
    v,
    base,
    table,
    init,
    init_slot,
    final,
    final_slot,
    partial,
    B,
    T,
    O,
    I,
    stride_qb,
    stride_qt,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    stride_bo,
    stride_bi,
    stride_tb,
    stride_tk,
    CHUNK: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_INIT: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    WRITE_ALL: tl.constexpr,
    GROUPS: tl.constexpr,
    ACCUMULATES: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of W, and then every S-th one after it; see :func:`chunk_scan_partial` for the arguments."""
    i_o = tl.program_id(0)
    i_g = tl.program_id(1)
    i_b = tl.program_id(2)
    b64 = i_b.to(tl.int64)
    r_m = tl.arange(0, BM)
    r_i = tl.arange(0, BI)
    r_o = i_o * BO + tl.arange(0, BO)
    m_o = r_o < O
    o64 = r_o.to(tl.int64)
    # template: begin
    q_b = q + b64 * stride_qb
    # template: end
    v_b = v + b64 * stride_vb
    if not SHARED:
        k_b = k + b64 * stride_kb
    if HAS_TABLE:
        starts = table + b64 * stride_tb
        n = tl.load(starts + T + 1)
    else:
        n = (T + CHUNK - 1) // CHUNK
    for i_i in range(i_g, (I + BI - 1) // BI, GROUPS):
        m_i = i_i * BI + r_i < I
        i64 = (i_i * BI + r_i).to(tl.int64)
        m_w = m_o[:, None] & m_i[None, :]
        if HAS_BASE:
            w = tl.load(base + o64[:, None] * stride_bo + i64[None, :] * stride_bi, mask=m_w, other=0.0).to(
                tl.float32
            )
        else:
            w = tl.zeros((BO, BI), dtype=tl.float32)
        if HAS_INIT:
            slot = b64
            if HAS_SLOTS:
                slot = tl.load(init_slot + i_b).to(tl.int64)
            if slot >= 0:
                w = tl.load(init + (slot * O + o64[:, None]) * I + i64[None, :], mask=m_w, other=0.0)
        for j in range(n):
            if REVERSE:
                i_c = n - 1 - j
            else:
                i_c = j
            if HAS_TABLE:
                start = tl.load(starts + i_c)
                stop = tl.load(starts + i_c + 1)
                kind = tl.load(starts + stride_tk + i_c)
                after = tl.load(starts + stride_tk + i_c + 1) & 3
                skipped = kind >= 4
                kind = kind & 3
                # A document's last chunk is read by nobody; in reverse it is the first of its document.
                if REVERSE:
                    first = (after != 0) & (j > 0)
                    writes = kind != 2
                else:
                    first = (kind != 0) & (j > 0)
                    writes = (after == 0) & (kind != 2)
                if HAS_INIT and not REVERSE:
                    first = kind != 0
                if HAS_FINAL:
                    writes = (kind != 2) & (WRITE_ALL | (stop - start == CHUNK))
                if first:
                    if HAS_BASE:
                        w = tl.load(
                            base + o64[:, None] * stride_bo + i64[None, :] * stride_bi, mask=m_w, other=0.0
                        ).to(tl.float32)
                    else:
                        w = tl.zeros((BO, BI), dtype=tl.float32)
            else:
                start = i_c * CHUNK
                stop = tl.minimum(start + CHUNK, T)
                if HAS_FINAL:
                    writes = WRITE_ALL | (stop - start == CHUNK)
                else:
                    writes = j < n - 1
            read = w.to(v.dtype.element_ty)
            if DECAY != 1.0:
                if writes:
                    if HAS_BASE:
                        # Read again: a second tile of the same size would not fit beside w.
                        anchor = tl.load(
                            base + o64[:, None] * stride_bo + i64[None, :] * stride_bi, mask=m_w, other=0.0
                        ).to(tl.float32)
                        w = anchor + DECAY * (w - anchor)
                    else:
                        w = DECAY * w
            if HAS_TABLE and not REVERSE:
                writes = writes & (skipped == 0)
            if writes:
                for t0 in range(start, stop, BM):
                    m_m = r_m < stop - t0
                    t64 = tl.cast(t0, tl.int64)
                    # template: begin at_b, at_t = i_b.to(INDEX_DTYPE), (t0 + r_m[:, None]).to(INDEX_DTYPE)
                    # template: at_i = (i_i * BI + r_i[None, :]).to(INDEX_DTYPE)
                    # template: m_x = m_m[:, None] & m_i[None, :]
                    # template: {{load_q}}
                    x = tl.load(
                        q_b + t64 * stride_qt + i_i * BI + (r_m[:, None] * stride_qt + r_i[None, :]),
                        mask=m_m[:, None] & m_i[None, :],
                        other=0.0,
                    )
                    # template: end
                    acc = tl.dot(x, tl.trans(read), input_precision=PRECISION)
                    if HAS_TABLE and REVERSE:
                        # What was not written has no gradient, not even through a NaN of its own.
                        acc = tl.where(skipped, 0.0, acc)
                    m_y = m_m[:, None] & m_o[None, :]
                    if ACCUMULATES:
                        p_y = partial + ((i_g * B + b64) * T + t64) * O + (r_m[:, None] * O + r_o[None, :])
                        if i_i != i_g:
                            acc += tl.load(p_y, mask=m_y, other=0.0)
                    # template: begin to_g, to_b = i_g.to(INDEX_DTYPE), i_b.to(INDEX_DTYPE)
                    # template: to_t, to_o = (t0 + r_m[:, None]).to(INDEX_DTYPE), r_o[None, :].to(INDEX_DTYPE)
                    # template: {{store_y}}
                    p_y = partial + ((i_g * B + b64) * T + t64) * O + (r_m[:, None] * O + r_o[None, :])
                    tl.store(p_y, acc, mask=m_y)
                    # template: end
                    if not SHARED:
                        x = tl.load(
                            k_b + t64 * stride_kt + i_i * BI + (r_m[:, None] * stride_kt + r_i[None, :]),
                            mask=m_m[:, None] & m_i[None, :],
                            other=0.0,
                        )
                    u = tl.load(
                        v_b + t64 * stride_vt + (r_m[:, None] * stride_vt + r_o[None, :]), mask=m_y, other=0.0
                    )
                    w = tl.dot(tl.trans(u), x, w, input_precision=PRECISION)
            else:
                for t0 in range(start, stop, BM):
                    m_m = r_m < stop - t0
                    t64 = tl.cast(t0, tl.int64)
                    # template: begin at_b, at_t = i_b.to(INDEX_DTYPE), (t0 + r_m[:, None]).to(INDEX_DTYPE)
                    # template: at_i = (i_i * BI + r_i[None, :]).to(INDEX_DTYPE)
                    # template: m_x = m_m[:, None] & m_i[None, :]
                    # template: {{load_q}}
                    x = tl.load(
                        q_b + t64 * stride_qt + i_i * BI + (r_m[:, None] * stride_qt + r_i[None, :]),
                        mask=m_m[:, None] & m_i[None, :],
                        other=0.0,
                    )
                    # template: end
                    acc = tl.dot(x, tl.trans(read), input_precision=PRECISION)
                    if HAS_TABLE and REVERSE:
                        # What was not written has no gradient, not even through a NaN of its own.
                        acc = tl.where(skipped, 0.0, acc)
                    m_y = m_m[:, None] & m_o[None, :]
                    if ACCUMULATES:
                        p_y = partial + ((i_g * B + b64) * T + t64) * O + (r_m[:, None] * O + r_o[None, :])
                        if i_i != i_g:
                            acc += tl.load(p_y, mask=m_y, other=0.0)
                    # template: begin to_g, to_b = i_g.to(INDEX_DTYPE), i_b.to(INDEX_DTYPE)
                    # template: to_t, to_o = (t0 + r_m[:, None]).to(INDEX_DTYPE), r_o[None, :].to(INDEX_DTYPE)
                    # template: {{store_y}}
                    p_y = partial + ((i_g * B + b64) * T + t64) * O + (r_m[:, None] * O + r_o[None, :])
                    tl.store(p_y, acc, mask=m_y)
                    # template: end
        if HAS_FINAL:
            to = b64
            if HAS_SLOTS:
                to = tl.load(final_slot + i_b).to(tl.int64)
            if to >= 0:
                tl.store(final + (to * O + o64[:, None]) * I + i64[None, :], w, mask=m_w)
        # The next tile of I adds to what this one stored, possibly by other threads.
        tl.debug_barrier()


@dataclass(frozen=True)
class Carried:
    """States that rows start from or leave behind.

    Attributes:
        states: fp32 ``[L, O, I]``.
        slots: int32 ``[B]``, which of them is row b's; -1 starts from the base, or stores nothing.
    """

    states: Tensor
    slots: Tensor


def chunk_scan_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor | None,
    table: Tensor | None,
    chunk: int,
    tile: Tile,
    groups: int,
    *,
    decay: float = 1.0,
    reverse: bool = False,
    init: Carried | None = None,
    final: Carried | None = None,
    precision: str = "ieee",
) -> Tensor:
    """Launch the scan.

    Args:
        q: ``[B, T, I]``, the last dimension contiguous, as of k and v.
        k: ``[B, T, I]``; the same tensor as q when they are equal, which then is read once.
        v: ``[B, T, O]``.
        base: ``[O, I]`` of any strides, or None for zeros.
        table: of :func:`chunk_table`, or None: chunks of C tokens from the first token on.
        chunk: C.
        tile: the schedule.
        groups: S, programs that share the columns of W.
        decay: gamma.
        reverse: from the last chunk to the first.
        init: what rows start from, instead of the base.
        final: where rows leave what they have written: complete chunks forward, all chunks in reverse.
        precision: of products of fp32 operands: ``"ieee"``, ``"tf32"`` or ``"tf32x3"``.

    Returns:
        fp32 ``[S, B, T, O]``, whose sum over S is y.
    """
    batch, length, inner = q.shape
    outer = v.shape[-1]
    partial = torch.empty(groups, batch, length, outer, dtype=torch.float32, device=q.device)
    if partial.numel() == 0 and (final is None or batch == 0):
        return partial
    arguments: dict[str, Any] = scan_constants(
        chunk, tile, inner, groups, decay=decay, reverse=reverse, shared=k is q, precision=precision
    )
    grid = (triton.cdiv(outer, tile.outer), groups, batch)
    strides = (0, 0) if base is None else base.stride()
    shared_table = table is not None and table.shape[0] == 1
    chunk_scan_kernel[grid](
        q,
        None if k is q else k,
        v,
        base,
        table,
        None if init is None else init.states,
        None if init is None else init.slots,
        None if final is None else final.states,
        None if final is None else final.slots,
        partial,
        batch,
        length,
        outer,
        inner,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        *strides,
        0 if table is None or shared_table else table.stride(0),
        0 if table is None else table.stride(1),
        **arguments,
        HAS_BASE=base is not None,
        HAS_TABLE=table is not None,
        HAS_INIT=init is not None,
        HAS_FINAL=final is not None,
        HAS_SLOTS=True,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return partial


def scan_constants(
    chunk: int,
    tile: Tile,
    inner: int,
    groups: int,
    *,
    decay: float,
    reverse: bool,
    shared: bool,
    precision: str,
) -> dict[str, Any]:
    """Compile-time arguments that launches and templates share.

    Raises:
        ValueError: a program would have no tile, and leave its output unwritten.
    """
    if not 1 <= groups <= -(-inner // tile.inner):
        raise ValueError(f"{groups} programs cannot share {-(-inner // tile.inner)} tiles")
    return {
        "CHUNK": chunk,
        "DECAY": decay,
        "REVERSE": reverse,
        "SHARED": shared,
        "WRITE_ALL": reverse,
        "GROUPS": groups,
        "ACCUMULATES": groups * tile.inner < inner,
        "BM": tile.tokens,
        "BO": tile.outer,
        "BI": tile.inner,
        "PRECISION": precision,
    }


def naive_chunk_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor | None,
    table: Tensor | None,
    chunk: int,
    *,
    decay: float = 1.0,
    reverse: bool = False,
    init: Carried | None = None,
    final: Carried | None = None,
) -> Tensor:
    """What the kernel computes, chunk by chunk, in the operands' dtype: ``y [B, T, O]``."""
    batch, length, inner = q.shape
    zero = q.new_zeros(v.shape[-1], inner) if base is None else base
    y = q.new_empty(batch, length, v.shape[-1])
    for b in range(batch):
        chunks = _chunks(table, b, length, chunk)
        w, carried = zero, init is not None and int(init.slots[b]) >= 0
        if init is not None and carried:
            w = init.states[int(init.slots[b])].to(q.dtype)
        order = list(range(len(chunks)))[:: -1 if reverse else 1]
        for i in order:
            start, stop, flags = chunks[i]
            kind, skipped = flags % SKIPPED, flags >= SKIPPED
            document_ends = i + 1 == len(chunks) or chunks[i + 1][2] % SKIPPED != CONTINUES
            if kind == PADDING or (document_ends and reverse) or (kind == FRESH and not reverse):
                w = zero
            y[b, start:stop] = 0.0 if reverse and skipped else q[b, start:stop] @ w.t()
            if final is None:
                writes = reverse or not document_ends
            else:
                writes = reverse or stop - start == chunk
            if writes and kind != PADDING:
                w = zero + decay * (w - zero)
                if reverse or not skipped:
                    w = w + v[b, start:stop].t() @ k[b, start:stop]
        if final is not None and int(final.slots[b]) >= 0:
            final.states[int(final.slots[b])] = w.to(final.states.dtype)
    return y


def _chunks(table: Tensor | None, b: int, length: int, chunk: int) -> list[tuple[int, int, int]]:
    """First token, end and kind of every chunk of row b."""
    if table is None:
        return [(i, min(i + chunk, length), CONTINUES) for i in range(0, length, chunk)]
    starts, kinds = table[b if table.shape[0] > 1 else 0].tolist()
    return [(starts[i], starts[i + 1], kinds[i]) for i in range(starts[length + 1])]
