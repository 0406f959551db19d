"""The states that spans of tokens read, from what each span writes: a sum along the spans, in fp32.

``reads_j = W; W = base + decay (W - base) + increments_j`` for every number of W by itself, so one pass reads
each increment once and writes each state once, in the operands' dtype. Bandwidth is all that it takes. May be
changed here: the schedule.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of W that a program takes.
BLOCK = 1024


@triton.jit
def prefix_states_kernel(
    increments,
    base,
    state,
    reads,
    SIZE,
    SPANS,
    WRITTEN,
    DECAY: tl.constexpr,
    HAS_BASE: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of numbers of W, span by span; see :func:`prefix_states` for the arguments."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = r < SIZE
    w = tl.load(state + r, mask=m, other=0.0)
    if HAS_BASE:
        b = tl.load(base + r, mask=m, other=0.0).to(tl.float32)
    for j in range(SPANS):
        if REVERSE:
            i = SPANS - 1 - j
        else:
            i = j
        at = tl.cast(i, tl.int64) * SIZE
        tl.store(reads + at + r, w.to(reads.dtype.element_ty), mask=m)
        if j < WRITTEN:
            if DECAY != 1.0:
                if HAS_BASE:
                    w = b + DECAY * (w - b)
                else:
                    w = DECAY * w
            w += tl.load(increments + at + r, mask=m, other=0.0)
    tl.store(state + r, w, mask=m)


def prefix_states(
    increments: Tensor,
    base: Tensor | None,
    state: Tensor,
    spans: int,
    dtype: torch.dtype,
    *,
    decay: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """Launch.

    Args:
        increments: fp32 ``[N, D, F]``, of every span, or of all but the last that is read.
        base: ``[D, F]`` contiguous, what decay pulls to; None for zeros.
        state: fp32 ``[D, F]``, what the first span reads; afterwards what follows the last increment.
        spans: how many read, N or N + 1.
        dtype: of what is read.
        decay: gamma.
        reverse: from the last span to the first.

    Returns:
        ``[spans, D, F]``.
    """
    reads = torch.empty(spans, *state.shape, dtype=dtype, device=state.device)
    size = state.numel()
    prefix_states_kernel[(triton.cdiv(size, BLOCK),)](
        increments,
        base if decay != 1.0 else None,
        state,
        reads,
        size,
        spans,
        increments.shape[0],
        DECAY=decay,
        HAS_BASE=decay != 1.0 and base is not None,
        REVERSE=reverse,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return reads
