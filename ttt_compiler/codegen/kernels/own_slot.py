"""Before a row writes: its matrix moves out of a slot that others read, its factored rows out of the way.

One launch for the batch, of few programs per row, which exit at once when the row stays where it is. A row
that is moved reads its old slot, which nobody writes in this launch: free slots are read by no row. May be
changed here: how bytes are copied; who moves where is decided by the caller.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_compiler.codegen.layout import factored_capacity, factored_rows

# What happens to a row's slot.
STAY, MOVE, STAGE = 0, 1, 2
BLOCK = 2048


@triton.jit
def own_slot_kernel(
    w, rows, staged, jobs, D, F, CAPACITY, SLOT_ROWS, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr
):
    """A share of one row's bytes; see :func:`own_slot`."""
    i_b = tl.program_id(1).to(tl.int64)
    action = tl.load(jobs + i_b * 4)
    if action == 0:
        return
    source = tl.load(jobs + i_b * 4 + 1)
    r = tl.arange(0, BLOCK)
    size = tl.cast(D, tl.int64) * F
    if action == 1:
        target = tl.load(jobs + i_b * 4 + 2)
        i = tl.program_id(0).to(tl.int64) * BLOCK
        while i < size:
            m = i + r < size
            x = tl.load(w + source * size + i + r, mask=m)
            tl.store(w + target * size + i + r, x, mask=m)
            i += PROGRAMS * BLOCK
    else:
        tokens = tl.load(jobs + i_b * 4 + 3)
        values = tl.cast(CAPACITY, tl.int64) * F
        i = tl.program_id(0).to(tl.int64) * BLOCK
        while i < tokens * (D + F):
            # The keys fill the front of a slot's rows; the values begin behind the room for all keys.
            at = i + r
            at = tl.where(at < tokens * F, at, at - tokens * F + values)
            m = i + r < tokens * (D + F)
            x = tl.load(rows + source * SLOT_ROWS + at, mask=m)
            tl.store(staged + i_b * CAPACITY * (D + F) + at, x, mask=m)
            i += PROGRAMS * BLOCK


def own_slot(w: Tensor, stored: torch.dtype, jobs: Tensor, programs: int) -> Tensor:
    """Move and stage.

    Args:
        w: fp32 ``[L, D, F]``, changed in place.
        stored: dtype of factored rows.
        jobs: int64 ``[B, 4]``: STAY, MOVE or STAGE; the slot that the row reads; the slot that it will write;
            its factored tokens.
        programs: per row.

    Returns:
        ``[B, N* (D + F)]``: factored rows of the rows that are staged, as they lie in a slot.
    """
    _, d, f = w.shape
    capacity = factored_capacity(d, f)
    staged = torch.empty(len(jobs), capacity * (d + f), dtype=stored, device=w.device)
    rows = w.view(-1).view(stored)
    own_slot_kernel[(programs, len(jobs))](
        w,
        rows,
        staged,
        jobs,
        d,
        f,
        capacity,
        rows.numel() // len(w),
        PROGRAMS=programs,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return staged


def naive_own_slot(w: Tensor, stored: torch.dtype, jobs: Tensor) -> Tensor:
    """What the kernel does, row by row; what is not staged is zero."""
    _, d, f = w.shape
    capacity = factored_capacity(d, f)
    staged = torch.zeros(len(jobs), capacity * (d + f), dtype=stored)
    for b, (action, source, target, tokens) in enumerate(jobs.tolist()):
        if action == MOVE:
            w[target] = w[source]
        elif action == STAGE:
            keys, values = factored_rows(w[source], stored, tokens)
            staged[b, : tokens * f] = keys.flatten()
            staged[b, capacity * f :][: tokens * d] = values.flatten()
    return staged
