"""The chunk scan on CPU, forward and backward: one state in memory, two GEMMs per chunk.

FLOPs in units of one static projection (2*T*D*F): forward 1 + (n-1)/n, where the last chunk of a document
is applied and not written because nobody reads it, and less where its last chunks read each other directly
(:func:`tail_chunks`); backward 5 (W recomputed in forward order, then one reverse scan). Memory: one fp32
``[D, F]`` matrix forward, two backward, whatever the number of chunks. May be changed here: the algorithm;
:mod:`ttt_compiler.codegen.reference` says what it must compute.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu.gemm import FastMatrix, add_product, static_apply, workspace
from ttt_compiler.codegen.cpu.native.squares import norm
from ttt_compiler.codegen.segments import Run, documents, row_runs
from ttt_compiler.errors import NonFiniteWriteError
from ttt_compiler.spec import state_dtype


def chunk_scan(
    h: Tensor,
    v: Tensor,
    w0: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    chunk: int,
    decay: float = 1.0,
    on_nonfinite: str = "raise",
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``y_i = h_i W_i.T + bias; W_{i+1} = w0 + decay (W_i - w0) + v_i.T h_i``; documents start at w0.

    Args:
        h: ``[B, T, F]``.
        v: ``[B, T, D]`` with eta folded in.
        w0: ``[D, F]``.
        bias: ``[D]`` or None.
        pos: int64 ``[B or 1, T]`` or None; padding is projected by w0 and never written.
        chunk: C.
        decay: gamma; 1 never forgets.
        on_nonfinite: ``"raise"``, or ``"skip"`` the write of a chunk that holds NaN or Inf.
        out: contiguous ``[B, T, D]`` to fill; by default a new tensor.

    Returns:
        ``y [B, T, D]``.

    Raises:
        NonFiniteWriteError: a chunk holds NaN or Inf and is not skipped.
    """
    if h.numel() == 0 or not _any(v):
        return static_apply(h, w0, bias, out=out)
    h, v = h.contiguous(), v.contiguous()
    batch, length, _ = h.shape
    y = h.new_empty(batch, length, w0.shape[0]) if out is None else out
    w = _fast(w0, "scan.w", h.dtype, tuple(w0.shape))
    tail = tail_chunks(chunk, *w0.shape) if decay == 1.0 else 1
    for b, runs in enumerate(row_runs(pos, batch, length)):
        for run in runs:
            if run.padding:
                _base(h[b], w0, bias, y[b], run)
        for doc in documents(runs):
            w.reset()
            last = doc.start + max(0, -(-(doc.stop - doc.start) // chunk) - tail) * chunk
            unwritten: list[slice] = []
            for start in range(doc.start, doc.stop, chunk):
                span = slice(start, min(start + chunk, doc.stop))
                w.apply(h[b, span], bias, y[b, span])
                for past in unwritten:
                    add_product(h[b, span], h[b, past], v[b, past], y[b, span], "scan.tail")
                if span.stop < doc.stop:
                    w.decay(decay)
                    if not writable(v[b, span], h[b, span], on_nonfinite, start // chunk):
                        continue
                    if start < last:
                        w.write(v[b, span], h[b, span])
                    elif unwritten and unwritten[-1].stop == start:
                        unwritten[-1] = slice(unwritten[-1].start, span.stop)
                    else:
                        unwritten.append(span)
    return y


def tail_chunks(chunk: int, d_model: int, d_ff: int) -> int:
    """How many last chunks of a document are cheapest without a write between them.

    A write costs ``2 C D F``; a chunk that reads an unwritten one instead, ``2 C^2 (D + F)``. m chunks save
    m - 1 writes for m (m - 1) / 2 such reads: most at ``m = DF / (C (D + F)) + 1/2``.
    """
    return max(1, round(d_model * d_ff / (chunk * (d_model + d_ff)) + 0.5 - 1e-9))


def chunk_scan_backward(
    dy: Tensor,
    h: Tensor,
    v: Tensor,
    w0: Tensor,
    pos: Tensor | None,
    chunk: int,
    decay: float = 1.0,
    on_nonfinite: str = "raise",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`chunk_scan` for h, v and w0.

    With ``S_i = sum_{k>i} decay^(k-i-1) dy_k.T h_k`` over the same document: ``dh_i = dy_i W_i + v_i S_i``,
    ``dv_i = h_i S_i.T``, ``dw0 = sum_i dy_i.T h_i`` (which is the last S when nothing decays).
    """
    dy, h, v = dy.contiguous(), h.contiguous(), v.contiguous()
    batch, length, _ = h.shape
    dh, dv = torch.empty_like(h), torch.zeros_like(v)
    dw0 = torch.zeros(w0.shape, dtype=state_dtype(h.dtype))
    w = _fast(w0, "scan.w", h.dtype, tuple(w0.shape), turns=True)
    s = _fast(None, "scan.s", h.dtype, tuple(w0.shape), turns=True)
    for b, runs in enumerate(row_runs(pos, batch, length)):
        for run in runs:
            if run.padding:
                rows = slice(run.start, run.stop)
                torch.mm(dy[b, rows], w0, out=dh[b, rows])
                dw0 += torch.mm(dy[b, rows].t(), h[b, rows])
        for doc in documents(runs):
            spans = [slice(i, min(i + chunk, doc.stop)) for i in range(doc.start, doc.stop, chunk)]
            w.reset()
            for span in spans:
                w.apply_transposed(dy[b, span], dh[b, span])
                if span is not spans[-1]:
                    w.decay(decay)
                    if writable(v[b, span], h[b, span], on_nonfinite, span.start // chunk):
                        w.write(v[b, span], h[b, span])
            s.reset()
            for span in reversed(spans):
                if not s.is_zero and writable(v[b, span], h[b, span], on_nonfinite, span.start // chunk):
                    s.apply_transposed(v[b, span], dh[b, span], accumulate=True)
                    s.apply(h[b, span], None, dv[b, span])
                s.decay(decay)
                s.write(dy[b, span], h[b, span])
                if decay != 1.0:
                    dw0 += torch.mm(dy[b, span].t(), h[b, span])
            if decay == 1.0:
                dw0 += s.master
    return dh, dv, dw0.to(w0.dtype)


def _fast(
    base: Tensor | None, slot: str, dtype: torch.dtype, shape: tuple[int, ...], *, turns: bool = False
) -> FastMatrix:
    return FastMatrix(base, workspace(slot, shape, state_dtype(dtype)), dtype, name=slot, turns=turns)


def _base(h: Tensor, w0: Tensor, bias: Tensor | None, y: Tensor, run: Run) -> None:
    y[run.start : run.stop] = static_apply(h[run.start : run.stop], w0, bias)


def writable(v: Tensor, h: Tensor, on_nonfinite: str, index: int) -> bool:
    """Whether a chunk may be written: v ``[C, D]`` and h ``[C, F]`` are finite.

    Raises:
        NonFiniteWriteError: they are not, and ``on_nonfinite`` is ``"raise"``.
    """
    # A finite norm proves that every entry is finite, in one pass; the product of two such in fp32 is.
    if math.isfinite(norm(v)) and math.isfinite(norm(h)):
        return True
    if on_nonfinite == "skip":
        return False
    raise NonFiniteWriteError(
        f"chunk {index} of this call would write NaN or Inf into the fast weights. Lower lr, check the "
        'adapter, set max_write_norm or max_write_ratio, or pass on_nonfinite="skip"'
    )


def _any(v: Tensor) -> bool:
    """Whether anything would be written: the first token answers for a trained adapter."""
    return bool(v[0, 0].any()) or bool(v.any())
