"""A row that stays factored gets a chunk: its old rows decay, or move with it, and new ones follow.

Programs of rows that write nothing, or a matrix, exit at once. Rows that stay in place decay in a launch
of their own: a row that moves may read the same slot, and programs of one launch run in any order. May be
changed here: how rows are copied; where they stand is :func:`ttt_compiler.codegen.layout.factored_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_compiler.codegen.kernels.decode_plan import FOLDED, FORM, FROM, MEMBER, ROWS, SLOT_AFTER, WAIT_FIRST
from ttt_compiler.codegen.kernels.write_chunks import WRITTEN
from ttt_compiler.codegen.layout import StateTensors, factored_capacity, factored_rows


@triton.jit
def factor_rows_kernel(
    rows,
    tail_h,
    lanes,
    v,
    plan,
    write_jobs,
    D,
    F,
    A,
    SLOT_ROWS,
    VALUES,
    CHUNK: tl.constexpr,
    DECAY: tl.constexpr,
    STAYING: tl.constexpr,
    HAS_LANES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every n-th token of one row: old tokens of rows that stay, or all others; see :func:`factor_rows`."""
    i_b = tl.program_id(1).to(tl.int64)
    row = plan + i_b * 14
    if tl.load(row + 9) != 2:
        return
    folded = tl.load(row + 1)
    source = rows + tl.load(row + 2) * SLOT_ROWS
    target = rows + tl.load(row + 10) * SLOT_ROWS
    first = tl.load(row + 4)
    member = tl.load(row + 12)
    moves = tl.load(row + 2) != tl.load(row + 10)
    token = tl.program_id(0).to(tl.int64)
    total = folded
    if STAYING:
        if moves:
            return
    else:
        if tl.load(write_jobs + i_b * 8 + 6) != 0:
            total += CHUNK
        if not moves:
            token += folded
    r = tl.arange(0, BLOCK)
    while token < total:
        if token < folded:
            if moves:
                for start in range(0, F, BLOCK):
                    m = start + r < F
                    x = tl.load(source + token * F + start + r, mask=m)
                    tl.store(target + token * F + start + r, x, mask=m)
            if moves | STAYING:
                for start in range(0, D, BLOCK):
                    m = start + r < D
                    x = tl.load(source + VALUES + token * D + start + r, mask=m)
                    x = (x.to(tl.float32) * DECAY).to(x.dtype)
                    tl.store(target + VALUES + token * D + start + r, x, mask=m)
        else:
            column = (first + token - folded) % A
            lane = member
            if HAS_LANES:
                lane = tl.load(lanes + member * A + column).to(tl.int64)
            for start in range(0, F, BLOCK):
                m = start + r < F
                x = tl.load(tail_h + (lane * A + column) * F + start + r, mask=m)
                tl.store(target + token * F + start + r, x, mask=m)
            for start in range(0, D, BLOCK):
                m = start + r < D
                x = tl.load(v + (i_b * CHUNK + token - folded) * D + start + r, mask=m)
                to = target + VALUES + token * D + start + r
                tl.store(to, x.to(rows.dtype.element_ty), mask=m)
        token += PROGRAMS


def factor_rows(
    state: StateTensors,
    v: Tensor,
    plan: Tensor,
    write_jobs: Tensor,
    chunk: int,
    programs: int,
    *,
    decay: float,
) -> None:
    """Launch.

    Args:
        state: the site's tensors; slots change.
        v: ``[B, C, D]``, contiguous.
        plan: of :func:`~ttt_compiler.codegen.kernels.decode_plan.decode_plan`.
        write_jobs: of the same, with WRITTEN.
        chunk: C.
        programs: per row.
        decay: gamma.
    """
    slots, d, f = state.w.shape
    rows = state.w.view(-1).view(state.tail_h.dtype)
    for staying in (False, True) if decay != 1.0 else (False,):
        factor_rows_kernel[(programs, len(plan))](
            rows,
            state.tail_h,
            state.lanes,
            v,
            plan,
            write_jobs,
            d,
            f,
            state.capacity,
            rows.numel() // slots,
            factored_capacity(d, f) * f,
            CHUNK=chunk,
            DECAY=decay,
            STAYING=staying,
            HAS_LANES=state.lanes.shape[1] > 0,
            PROGRAMS=programs,
            BLOCK=1024,
            num_warps=4,
        )


def naive_factor_rows(
    state: StateTensors, v: Tensor, plan: Tensor, write_jobs: Tensor, chunk: int, *, decay: float
) -> None:
    """What the kernel does, row by row."""
    stored = state.tail_h.dtype
    before = state.w.clone()
    for b, row in enumerate(plan.tolist()):
        if row[FORM] != ROWS:
            continue
        n = row[FOLDED]
        old_keys, old_values = factored_rows(before[row[FROM]], stored, n)
        keys, values = factored_rows(state.w[row[SLOT_AFTER]], stored, n + chunk)
        keys[:n], values[:n] = old_keys, old_values * decay
        if write_jobs[b, WRITTEN]:
            columns = torch.arange(row[WAIT_FIRST], row[WAIT_FIRST] + chunk) % state.capacity
            lanes = state.lanes[row[MEMBER], columns].long() if state.lanes.shape[1] else row[MEMBER]
            keys[n:], values[n:] = state.tail_h[lanes, columns], v[b]
