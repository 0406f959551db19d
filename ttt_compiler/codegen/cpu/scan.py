"""The chunk scan on CPU, forward and backward: one state in memory, two GEMMs per chunk.

FLOPs in units of one static projection (2*T*D*F): forward 1 + (n-1)/n, where the last chunk of a document
is applied and not written because nobody reads it, and less where its last chunks read each other directly
(:mod:`.kept`); backward 5, less what a forward kept: from the last kept matrix on, W is recomputed in forward
order and S summed in reverse, then from the one before. Memory: one fp32 ``[D, F]`` matrix forward, two
backward, whatever the number of chunks, and what is kept. May be changed here: the algorithm;
:mod:`ttt_compiler.codegen.reference` says what it must compute.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu.gemm import FastMatrix, add_product, static_apply
from ttt_compiler.codegen.cpu.kept import places, tail_chunks
from ttt_compiler.codegen.cpu.native.squares import norm
from ttt_compiler.codegen.cpu.workspaces import leased, workspace
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
    kept: Tensor | None = None,
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
        kept: ``[K, D, F]`` to fill with W of some chunks, for :func:`chunk_scan_backward`.

    Returns:
        ``y [B, T, D]``.

    Raises:
        NonFiniteWriteError: a chunk holds NaN or Inf and is not skipped.
    """
    if h.numel() == 0 or not _any(v):
        if kept is not None:
            kept.copy_(w0)
        return static_apply(h, w0, bias, out=out)
    h, v = h.contiguous(), v.contiguous()
    batch, length, _ = h.shape
    y = h.new_empty(batch, length, w0.shape[0]) if out is None else out
    w = _fast(w0, "scan.w", h.dtype, tuple(w0.shape))
    tail = _tail(chunk, w0, decay)
    rows, kept_before = _texts(pos, batch, length, chunk, kept, tail)
    free, last = iter(() if kept is None else kept), w.master
    for b, (padding, docs) in enumerate(rows):
        for run in padding:
            y[b, run] = static_apply(h[b, run], w0, bias)
        for spans in docs:
            marks = next(kept_before)
            # W is made where it will be kept, if it will be.
            room = [*itertools.islice(free, len(marks)), last]
            w.reset()
            w.leave(room.pop(0))
            waiting: list[slice] = []
            for i, span in enumerate(spans):
                if i in marks:
                    w.settle()
                    w.leave(room.pop(0))
                w.apply(h[b, span], bias, y[b, span])
                for past in waiting:
                    add_product(h[b, span], h[b, past], v[b, past], y[b, span], "scan.tail")
                if i + 1 < len(spans):
                    w.decay(decay)
                    if writable(v[b, span], h[b, span], on_nonfinite, span.start // chunk):
                        _write(w, v[b], h[b], span, waiting if i >= len(spans) - tail else None)
    return y


def chunk_scan_backward(
    dy: Tensor,
    h: Tensor,
    v: Tensor,
    w0: Tensor,
    pos: Tensor | None,
    chunk: int,
    decay: float = 1.0,
    on_nonfinite: str = "raise",
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`chunk_scan` for h, v and w0; ``kept`` is what its forward filled.

    With ``S_i = sum_{k>i} decay^(k-i-1) dy_k.T h_k`` over the same document: ``dh_i = dy_i W_i + v_i S_i``,
    ``dv_i = h_i S_i.T``, ``dw0 = sum_i dy_i.T h_i`` (which is the last S when nothing decays).
    """
    dy, h, v = dy.contiguous(), h.contiguous(), v.contiguous()
    batch, length, _ = h.shape
    dh, dv = (leased(f"scan.d{n}", tuple(x.shape), x.dtype) for n, x in (("h", h), ("v", v)))
    dw0 = torch.zeros(w0.shape, dtype=state_dtype(h.dtype))
    w = _fast(w0, "scan.w", h.dtype, tuple(w0.shape), turns=True)
    tail = _tail(chunk, w0, decay)
    rows, kept_before = _texts(pos, batch, length, chunk, kept, tail)
    filled = iter(() if kept is None else kept)
    # A forward that wrote anything had raised for a chunk that is not finite.
    checked = on_nonfinite == "raise" and _any(v)

    def was_written(b: int, span: slice) -> bool:
        return checked or writable(v[b, span], h[b, span], on_nonfinite, span.start // chunk)

    # The last S of the only document is dw0: it is made there.
    alone = decay == 1.0 and [(len(padding), len(docs)) for padding, docs in rows] == [(0, 1)]
    s = _fast(None, "scan.s", h.dtype, tuple(w0.shape), turns=True, master=dw0 if alone else None)
    for b, (padding, docs) in enumerate(rows):
        for run in padding:
            torch.mm(dy[b, run], w0, out=dh[b, run])
            dv[b, run].zero_()
            dw0 += torch.mm(dy[b, run].t(), h[b, run])
        for spans in docs:
            marks = next(kept_before)
            begins = [w0, *itertools.islice(filled, len(marks))]
            stretches = zip(begins, itertools.pairwise([0, *marks, len(spans)]), strict=True)
            s.reset()
            # From the last stretch on, so that S follows W while dh is in the cache.
            for begin, (start, stop) in reversed([*stretches]):
                w.begin(begin)
                waiting: list[slice] = []
                for i, span in enumerate(spans[start:stop], start):
                    w.apply_transposed(dy[b, span], dh[b, span])
                    for past in waiting:
                        add_product(dy[b, span], v[b, past], h[b, past], dh[b, span], "scan.tail")
                    if i + 1 < stop:
                        w.decay(decay)
                        if was_written(b, span):
                            _write(w, v[b], h[b], span, waiting if i >= stop - tail else None)
                for span in reversed(spans[start:stop]):
                    if not s.is_zero and was_written(b, span):
                        s.apply_transposed(v[b, span], dh[b, span], accumulate=True)
                        s.apply(h[b, span], None, dv[b, span])
                    else:
                        dv[b, span].zero_()
                    s.decay(decay)
                    s.write(dy[b, span], h[b, span])
                    if decay != 1.0:
                        dw0 += torch.mm(dy[b, span].t(), h[b, span])
            if decay == 1.0 and not alone:
                dw0 += s.master
    return dh, dv, dw0.to(w0.dtype)


def _tail(chunk: int, w0: Tensor, decay: float) -> int:
    # What waits would have to forget, too.
    return tail_chunks(chunk, *w0.shape) if decay == 1.0 else 1


def _texts(
    pos: Tensor | None, batch: int, length: int, chunk: int, kept: Tensor | None, tail: int
) -> tuple[list[tuple[list[slice], list[list[slice]]]], Iterator[list[int]]]:
    """Padding and documents of every row, each document by its chunks; and where W is kept, per document."""
    rows = [
        (
            [slice(run.start, run.stop) for run in runs if run.padding],
            [_chunks(run, chunk) for run in documents(runs)],
        )
        for runs in row_runs(pos, batch, length)
    ]
    count = 0 if kept is None else len(kept)
    return rows, iter(places([len(spans) for _, docs in rows for spans in docs], count, tail))


def _chunks(run: Run, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, run.stop)) for i in range(run.start, run.stop, chunk)]


def _write(w: FastMatrix, v: Tensor, h: Tensor, span: slice, waiting: list[slice] | None) -> None:
    """Write a chunk, or let it wait for those that read it itself, next to the one before."""
    if waiting is None:
        w.write(v[span], h[span])
    elif waiting and waiting[-1].stop == span.start:
        waiting[-1] = slice(waiting[-1].start, span.stop)
    else:
        waiting.append(span)


def _fast(
    base: Tensor | None,
    slot: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    turns: bool = False,
    master: Tensor | None = None,
) -> FastMatrix:
    master = workspace(slot, shape, state_dtype(dtype)) if master is None else master
    return FastMatrix(base, master, dtype, name=slot, turns=turns)


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
    return v.numel() > 0 and (bool(v[0, 0].any()) or bool(v.any()))
