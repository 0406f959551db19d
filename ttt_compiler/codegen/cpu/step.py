"""One call of a running sequence on CPU: apply, append to the chunk tail, write when a chunk is full.

The same code serves prefill, chunked prefill and decode, so they agree by construction. May be changed
here: how it is computed. The state's layout belongs to :mod:`ttt_compiler.runtime.state`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu.conv import convolve
from ttt_compiler.codegen.cpu.gemm import FastMatrix, state_dtype, static_apply, workspace
from ttt_compiler.codegen.segments import Run, row_runs
from ttt_compiler.errors import NonFiniteWriteError
from ttt_compiler.spec import SiteSpec

SEEN, WRITES = 0, 1


def fast_weight_step(
    h: Tensor,
    t: Tensor,
    w0: Tensor,
    bias: Tensor | None,
    conv: Tensor,
    proj: Tensor | None,
    pos: Tensor | None,
    spec: SiteSpec,
    w: Tensor,
    tail_h: Tensor,
    tail_t: Tensor,
    counts: Tensor,
) -> Tensor:
    """Advance every row by T tokens; ``w``, ``tail_h``, ``tail_t`` and ``counts`` change in place.

    Args:
        h: ``[B, T, F]``.
        t: ``[B, T, Dt]`` target source.
        w0: ``[D, F]``; bias ``[D]`` or None; conv ``[Dt, 1, K]``; proj ``[Dt, D]`` or None.
        bias: see w0.
        conv: see w0.
        proj: see w0.
        pos: int64 ``[B or 1, T]`` or None; 0 resets the row, a negative position is padding.
        spec: the site's constants.
        w: ``[B, D, F]`` state; row b counts only when ``counts[b, 1] > 0``.
        tail_h: ``[B, C, F]`` hidden rows of the incomplete chunk.
        tail_t: ``[B, C, Dt]`` target rows of the incomplete chunk.
        counts: int64 ``[B, 2]``: tokens seen since the document began, chunks written into w.

    Returns:
        ``y [B, T, D]``.

    Raises:
        NonFiniteWriteError: a complete chunk holds NaN or Inf. Its write is not made.
    """
    batch, length, _ = h.shape
    h, t = h.contiguous(), t.contiguous()
    still = not bool(conv.any()) or spec.lr == 0.0
    rows = counts.tolist()
    runs = row_runs(pos, batch, length)
    if all(
        _reads_only_w0(row, row_of_runs, length, spec.chunk, still)
        for row, row_of_runs in zip(rows, runs, strict=True)
    ):
        # Nothing is, or will be, in any state that this call reads: the base model's own projection.
        y = static_apply(h, w0, bias)
        apply = False
    else:
        y = h.new_empty(batch, length, w0.shape[0])
        apply = True
    for b in range(batch):
        row = _Row(b, h, t, w0, bias, conv, proj, spec, w, tail_h, tail_t, rows[b], still, apply)
        for run in runs[b]:
            row.advance(run, y[b])
    counts.copy_(torch.tensor(rows, dtype=counts.dtype))
    return y


def _reads_only_w0(counts: list[int], runs: list[Run], length: int, chunk: int, still: bool) -> bool:
    """Whether no token of the row reads a written matrix, from before this call or made by it."""
    fresh = runs[0].fresh
    if counts[WRITES] > 0 and not fresh:
        return False
    seen = 0 if fresh else counts[SEEN]
    return still or (len(runs) == 1 and seen % chunk + length <= chunk)


class _Row:
    """One sequence's view of the call."""

    def __init__(
        self,
        b: int,
        h: Tensor,
        t: Tensor,
        w0: Tensor,
        bias: Tensor | None,
        conv: Tensor,
        proj: Tensor | None,
        spec: SiteSpec,
        w: Tensor,
        tail_h: Tensor,
        tail_t: Tensor,
        counts: list[int],
        still: bool,
        apply: bool,
    ) -> None:
        self.h, self.t, self.w0, self.bias = h[b], t[b], w0, bias
        self.conv, self.proj, self.spec = conv, proj, spec
        self.tail_h, self.tail_t, self.counts = tail_h[b], tail_t[b], counts
        self.still, self.apply = still, apply
        self.w = FastMatrix(w0, w[b], h.dtype, name="step.w", written=counts[WRITES] > 0)

    def advance(self, run: Run, y: Tensor) -> None:
        """Feed the tokens of ``run``; fills ``y[run.start:run.stop]``."""
        if run.padding:
            if self.apply:
                y[run.start : run.stop] = static_apply(self.h[run.start : run.stop], self.w0, self.bias)
            return
        if run.fresh:
            self.counts[SEEN] = self.counts[WRITES] = 0
            self.w.reset()
        chunk = self.spec.chunk
        i = run.start
        while i < run.stop:
            filled = self.counts[SEEN] % chunk
            size = min(run.stop - i, chunk - filled)
            h, t = self.h[i : i + size], self.t[i : i + size]
            if self.apply:
                self.w.apply(h, self.bias, y[i : i + size])
            if size == chunk:
                self.write(h, t)
            else:
                self.tail_h[filled : filled + size] = h
                self.tail_t[filled : filled + size] = t
                if filled + size == chunk:
                    self.write(self.tail_h, self.tail_t)
            self.counts[SEEN] += size
            i += size

    def write(self, h: Tensor, t: Tensor) -> None:
        """Write one complete chunk. h ``[C, F]``, t ``[C, Dt]``."""
        if self.still:
            return
        # Under autocast the tail is kept in the weights' dtype and multiplied in the operands'.
        h, t = h.to(self.h.dtype), t.to(self.t.dtype)
        v = workspace("step.conv", tuple(t.shape), t.dtype)
        convolve(t, self.conv[:, 0].t(), v)
        if self.proj is None:
            v.mul_(self.spec.lr)
        else:
            out = workspace("step.v", (t.shape[0], self.spec.d_model), t.dtype)
            v = torch.mm(v, self.proj * self.spec.lr, out=out)
        # A finite norm proves that every entry is finite, in one pass; the product of two such in fp32 is.
        if not (_finite(v) and _finite(h)):
            raise NonFiniteWriteError(
                f"{self.spec.key}: chunk {self.counts[SEEN] // self.spec.chunk} would write NaN or "
                "Inf into the "
                "fast weights. The write was not made, but this call is lost: restore the session from a "
                "snapshot or reset() it, and lower lr or check the adapter"
            )
        self.w.write(v, h)
        self.counts[WRITES] += 1


def _finite(x: Tensor) -> bool:
    norm = torch.linalg.vector_norm(x, dtype=state_dtype(x.dtype))
    return bool(norm.isfinite())
