"""The chunk convolution on CPU: depthwise, centred, zero padded inside each chunk.

May be changed here: how it is computed. By a loop in C++ (:mod:`.native`), else in shift form: K fused
multiply-adds over slices of one view; torch's own depthwise ``conv1d`` needs a transpose and measured 5-10
times slower at these shapes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu.native.conv import convolve as by_loop
from ttt_compiler.codegen.cpu.native.conv import taps_gradient
from ttt_compiler.codegen.segments import documents, row_runs


def chunk_conv(
    t: Tensor, conv: Tensor, pos: Tensor | None, chunk: int, *, out: Tensor | None = None
) -> Tensor:
    """``out[b, s] = sum_k conv[:, 0, k] * t[b, s + k - K//2]`` over taps inside s's chunk.

    Args:
        t: ``[B, T, Dt]``.
        conv: ``[Dt, 1, K]``.
        pos: int64 ``[B or 1, T]`` or None; padding gives zeros.
        chunk: C.
        out: contiguous ``[B, T, Dt]`` to fill; by default a new tensor.
    """
    t = t.contiguous()
    out = torch.empty_like(t) if out is None else out
    if pos is not None:
        out.zero_()
    taps = conv[:, 0].t()
    for src, dst in _chunk_views(pos, chunk, t, out):
        convolve(src, taps, dst)
    return out


def chunk_conv_dweight(dv: Tensor, t: Tensor, pos: Tensor | None, chunk: int, kernel: int) -> Tensor:
    """Gradient of :func:`chunk_conv` for its taps, ``[Dt, 1, K]``, accumulated in fp32 within a chunk."""
    acc = torch.zeros(kernel, t.shape[-1], dtype=torch.float64)
    for grad, src in _chunk_views(pos, chunk, dv.contiguous(), t.contiguous()):
        add_taps_gradient(grad, src, acc)
    return acc.t()[:, None].to(t.dtype).contiguous()


def add_taps_gradient(grad: Tensor, src: Tensor, out: Tensor) -> None:
    """Whole chunks: grad and src ``[..., m, Dt]`` with m <= C, out fp64 ``[K, Dt]``."""
    if taps_gradient(grad, src, out):
        return
    for k, (to, frm) in enumerate(_overlaps(src.shape[-2], len(out))):
        prod = grad[..., to, :] * src[..., frm, :]
        summed = torch.promote_types(src.dtype, torch.float32)
        out[k] += prod.sum(dim=tuple(range(prod.dim() - 1)), dtype=summed)


def convolve(src: Tensor, taps: Tensor, out: Tensor) -> None:
    """Whole chunks: src and out ``[..., m, Dt]`` with m <= C, taps ``[K, Dt]``."""
    if by_loop(src, taps, out):
        return
    kernel = taps.shape[0]
    torch.mul(src, taps[kernel // 2], out=out)
    for k, (to, frm) in enumerate(_overlaps(src.shape[-2], kernel)):
        if k != kernel // 2:
            out[..., to, :].addcmul_(src[..., frm, :], taps[k])


def _overlaps(length: int, kernel: int) -> Iterator[tuple[slice, slice]]:
    """Per tap, the output rows that have an input row inside the chunk, and those input rows."""
    for k in range(kernel):
        shift = k - kernel // 2
        size = max(0, length - abs(shift))
        to, frm = max(0, -shift), max(0, shift)
        yield slice(to, to + size), slice(frm, frm + size)


def _chunk_views(pos: Tensor | None, chunk: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views ``[N, n, C, X]`` of whole chunks and ``[N, r, X]`` of remainders, document by document."""
    batch, length = tensors[0].shape[:2]
    if pos is None and length % chunk == 0:
        spans = [(slice(None), 0, length)]
    elif pos is None:
        # Of one row chunks and remainder are each in one piece, and a row is summed alike in every batch.
        spans = [(slice(b, b + 1), 0, length) for b in range(batch)]
    else:
        spans = [
            (slice(b, b + 1), doc.start, doc.stop)
            for b, runs in enumerate(row_runs(pos, batch, length))
            for doc in documents(runs)
        ]
    for rows, start, stop in spans:
        whole = (stop - start) // chunk
        edge = start + whole * chunk
        if whole:
            yield tuple(x[rows, start:edge].unflatten(1, (whole, chunk)) for x in tensors)
        if edge < stop:
            yield tuple(x[rows, edge:stop] for x in tensors)
