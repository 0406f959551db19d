"""The chunk scan by library products: few large ones, between which a sum along the text makes the states.

Spans of chunks: every span's write ``v^T h`` is one of a batch of products, :mod:`prefix_states
<ttt_compiler.codegen.kernels.prefix_states>` adds them up to the fp32 states that the spans read, and all
spans are applied as one batch. So many states stand in memory at a time as ``held`` says. Inside of a span of
several chunks the scan is attention without softmax, by halves: the second half of every pair of blocks meets
the first, ``y_2 += (h_2 h_1^T) v_1``, for blocks of one chunk, of two, of four. The gradients are the same
products once more. Neither launches nor states are per chunk, which is what a loop over chunks pays for.
No documents. May be changed here: which products; what they cost is :mod:`ttt_compiler.codegen.forms_spans`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ttt_compiler.codegen.kernels.prefix_states import prefix_states
from ttt_compiler.spec import state_dtype


class _Window(NamedTuple):
    """Spans whose states are held together: ``many`` of ``length`` tokens each from ``start`` on."""

    start: int
    many: int
    length: int

    def of(self, x: Tensor) -> Tensor:
        """``[many, length, .]`` of one row ``[T, .]``."""
        return x[self.start : self.start + self.many * self.length].view(self.many, self.length, -1)


def chunk_scan_library(
    h: Tensor, v: Tensor, w0: Tensor, *, chunk: int, span: int, held: int, decay: float, out: Tensor
) -> Tensor:
    """``y_i = h_i W_i^T; W_{i+1} = w0 + decay (W_i - w0) + v_i^T h_i``, without writing the last chunk.

    Args:
        h: ``[B, T, F]`` contiguous.
        v: ``[B, T, D]`` contiguous.
        w0: ``[D, F]``.
        chunk: C.
        span: tokens between two writes, C times a power of two; C itself when there is decay.
        held: spans whose states are in memory at a time.
        decay: gamma.
        out: ``[B, T, D]`` contiguous, to fill.
    """
    length = h.shape[1]
    if length <= span:
        torch.mm(h.flatten(0, 1), w0.t(), out=out.view(-1, out.shape[-1]))
    else:
        windows, base = _windows(length, span, held), w0.contiguous()
        for keys, values, y in zip(h, v, out, strict=True):
            for window, reads, spans in _states(windows, values, keys, base, decay):
                torch.bmm(window.of(keys)[:spans], reads.transpose(1, 2), out=window.of(y))
    for (h1, h2), (v1, _), (_, y2) in _pairs(length, chunk, span, h, v, out):
        y2.baddbmm_(torch.bmm(h2, h1.transpose(1, 2)), v1)
    return out


def chunk_scan_backward_library(
    dy: Tensor, h: Tensor, v: Tensor, w0: Tensor, chunk: int, decay: float, span: int, held: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, v and w0, without documents: :func:`ttt_compiler.codegen.cpu.scan.chunk_scan_backward`.

    Five units of ``2 T D F`` and what pairs of blocks take.

    Args:
        dy: ``[B, T, D]`` contiguous.
        h: as in :func:`chunk_scan_library`, like those that follow.
        v: see h.
        w0: see h.
        chunk: see h.
        decay: see h.
        span: see h.
        held: see h.
    """
    length = h.shape[1]
    dh, dv = torch.empty_like(h), torch.zeros_like(v)
    whole = length <= span
    if whole:
        torch.mm(dy.flatten(0, 1), w0, out=dh.view(-1, dh.shape[-1]))
    if whole or decay != 1.0:
        total = _products(dy.flatten(0, 1).t()[None], h.flatten(0, 1)[None])[0]
    else:
        total = torch.zeros(w0.shape, dtype=state_dtype(h.dtype), device=h.device)
    if not whole:
        windows, base = _windows(length, span, held), w0.contiguous()
        for row in range(h.shape[0]):
            keys, values, grad = h[row], v[row], dy[row]
            for window, reads, _ in _states(windows, values, keys, base, decay):
                torch.bmm(window.of(grad), reads, out=window.of(dh[row]))
            after = torch.zeros_like(total)
            for window, reads, spans in _states(windows, grad, keys, None, decay, state=after):
                torch.bmm(
                    window.of(keys)[:spans], reads[:spans].transpose(1, 2), out=window.of(dv[row])[:spans]
                )
                window.of(dh[row])[:spans].baddbmm_(window.of(values)[:spans], reads[:spans])
            if decay == 1.0:
                total += after
    for (h1, h2), (v1, _), (_, dy2), (dh1, dh2), (dv1, _) in _pairs(length, chunk, span, h, v, dy, dh, dv):
        dv1.baddbmm_(torch.bmm(h1, h2.transpose(1, 2)), dy2)
        scores = torch.bmm(dy2, v1.transpose(1, 2))
        dh2.baddbmm_(scores, h1)
        dh1.baddbmm_(scores.transpose(1, 2), h2)
    return dh, dv, total.to(w0.dtype)


def _windows(length: int, span: int, held: int) -> list[_Window]:
    """Whole spans, ``held`` at a time, and what is left of the text as a shorter one."""
    whole = length // span
    found = [_Window(i * span, min(held, whole - i), span) for i in range(0, whole, held)]
    return found + [_Window(whole * span, 1, length % span)] * (length % span > 0)


def _states(
    windows: list[_Window],
    values: Tensor,
    keys: Tensor,
    base: Tensor | None,
    decay: float,
    *,
    state: Tensor | None = None,
) -> Iterator[tuple[_Window, Tensor, int]]:
    """Every window with the states that its spans read, and how many spans read anything.

    Forward from ``base``, without the last write, which nobody reads; or in reverse from zeros, with all
    writes, where the last span reads nothing.

    Args:
        windows: in order.
        values: ``[T, D]`` of one row.
        keys: ``[T, F]``.
        base: ``[D, F]`` contiguous, or None in reverse.
        decay: gamma.
        state: fp32 zeros ``[D, F]`` in reverse, afterwards the sum of all writes.
    """
    reverse = state is not None
    last = windows[-1]
    if state is None:
        assert base is not None
        state = base.to(state_dtype(keys.dtype), copy=True)
    for window in reversed(windows) if reverse else windows:
        ends = window is last
        written = window.many - (ends and not reverse)
        v, k = window.of(values)[:written], window.of(keys)[:written]
        increments = _products(v.transpose(1, 2), k)
        reads = prefix_states(increments, base, state, window.many, keys.dtype, decay=decay, reverse=reverse)
        del increments
        yield window, reads, window.many - (ends and reverse)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of ``[N, ., .]`` in the dtype of states."""
    wide = state_dtype(a.dtype)
    if a.dtype == wide or a.shape[0] == 0:
        return torch.bmm(a, b).to(wide)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=wide)
    # Processors have no product of narrow operands with a wide result.
    return torch.bmm(a.to(wide), b.to(wide))


def _pairs(length: int, chunk: int, span: int, *tensors: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """First and second blocks ``[N, size, .]`` of every pair inside of the spans, of tensors ``[B, T, .]``.

    Pairs of equal size come together; the text may end inside of a second block, which then comes alone.
    """
    size = chunk
    while size < span:
        whole, rest = divmod(length, 2 * size)
        if whole and not rest:
            blocks = [x.view(-1, 2, size, x.shape[-1]) for x in tensors]
            yield [(x[:, 0], x[:, 1]) for x in blocks]
        elif whole:
            for rows in zip(*tensors, strict=True):
                blocks = [x[: whole * 2 * size].view(whole, 2, size, -1) for x in rows]
                yield [(x[:, 0], x[:, 1]) for x in blocks]
        if rest > size:
            cut = length - rest + size
            yield [(x[:, cut - size : cut], x[:, cut:]) for x in tensors]
        size *= 2
