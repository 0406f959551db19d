"""The counters after one token: the plan, and what became of the chunk that was due.

May be changed here: with the columns of the plan, or of the state's tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_compiler.codegen.kernels import decode_controls as verdict_of
from ttt_compiler.codegen.kernels import decode_plan as plan_of
from ttt_compiler.codegen.layout import (
    CACHED,
    CLIPPED,
    DONE,
    FACTORED,
    LAST,
    PEAK,
    SEEN,
    SKIPPED,
    SLOT,
    TOTAL,
    WRITES,
    StateTensors,
)


@triton.jit
def decode_finish_kernel(rows, norms, plan, verdict, CHUNK: tl.constexpr):
    """One row; see :func:`decode_finish`."""
    i_b = tl.program_id(0).to(tl.int64)
    out = plan + i_b * 14
    seen = tl.load(out + 7)
    if seen < 0:
        return
    row = rows + tl.load(out + 12) * 8
    norm = norms + tl.load(out + 12) * 3
    first = tl.load(out + 6) != 0
    due = tl.load(out + 8)
    form = tl.load(out + 9)
    waiting = tl.load(out + 5)
    writes = tl.where(first, 0, tl.load(row + 2))
    factored = tl.where(first, 0, tl.load(row + 3))
    skipped = tl.where(first, 0, tl.load(row + 5))
    clipped = tl.where(first, 0, tl.load(row + 6))
    last = tl.where(first, 0.0, tl.load(norm))
    peak = tl.where(first, 0.0, tl.load(norm + 1))
    total = tl.where(first, 0.0, tl.load(norm + 2))
    if form != 0:
        written = tl.load(verdict + i_b * 4) != 0
        size = tl.load(verdict + i_b * 4 + 2)
        writes += written.to(tl.int64)
        skipped += (written == 0).to(tl.int64)
        clipped += (written & (tl.load(verdict + i_b * 4 + 1) != 0)).to(tl.int64)
        factored = tl.where(form == 2, factored + tl.where(written, CHUNK, 0), 0)
        last = tl.where(written, size, last)
        peak = tl.where(written, tl.maximum(size, peak), peak)
        total = tl.where(written, total + size, total)
        tl.store(row + 4, tl.load(out + 10))
    tl.store(row, seen)
    tl.store(row + 1, tl.load(out + 4) // CHUNK + due)
    tl.store(row + 2, writes)
    tl.store(row + 3, factored)
    tl.store(row + 5, skipped)
    tl.store(row + 6, clipped)
    # Chunks that were complete before this token have their v by now.
    tl.store(row + 7, tl.where(waiting > due, waiting - due, 0))
    tl.store(norm, last)
    tl.store(norm + 1, peak)
    tl.store(norm + 2, total)


def decode_finish(state: StateTensors, plan: Tensor, verdict: Tensor, chunk: int) -> None:
    """Launch.

    Args:
        state: the site's tensors; counters and norms change.
        plan: of :func:`~ttt_compiler.codegen.kernels.decode_plan.decode_plan`.
        verdict: of :func:`~ttt_compiler.codegen.kernels.decode_values.decode_values` on due chunks.
        chunk: C.
    """
    decode_finish_kernel[(len(plan),)](state.rows, state.norms, plan, verdict, CHUNK=chunk, num_warps=1)


def naive_decode_finish(state: StateTensors, plan: Tensor, verdict: Tensor, chunk: int) -> None:
    """What the kernel does, row by row."""
    for b, out in enumerate(plan.tolist()):
        if out[plan_of.SEEN_AFTER] < 0:
            continue
        row, norm = state.rows[out[plan_of.MEMBER]], state.norms[out[plan_of.MEMBER]]
        if out[plan_of.FIRST]:
            slot = int(row[SLOT])
            row.zero_()
            norm.zero_()
            row[SLOT] = slot
        row[SEEN] = out[plan_of.SEEN_AFTER]
        row[DONE] = out[plan_of.WAIT_FIRST] // chunk + out[plan_of.DUE]
        row[CACHED] = max(out[plan_of.WAITING] - out[plan_of.DUE], 0)
        if out[plan_of.FORM] == plan_of.NONE:
            continue
        row[SLOT] = out[plan_of.SLOT_AFTER]
        written = bool(verdict[b, verdict_of.FINITE])
        row[FACTORED] = row[FACTORED] + written * chunk if out[plan_of.FORM] == plan_of.ROWS else 0
        row[WRITES] += written
        row[SKIPPED] += not written
        row[CLIPPED] += written and bool(verdict[b, verdict_of.CLIPPED])
        if written:
            norm[LAST] = verdict[b, verdict_of.NORM]
            norm[PEAK] = torch.maximum(norm[PEAK], norm[LAST])
            norm[TOTAL] += norm[LAST]
