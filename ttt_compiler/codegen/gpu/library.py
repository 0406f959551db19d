"""The chunk scan by library products: the state lives in memory, in fp32, and moves once per span.

Inside of a span of several chunks the scan is attention without softmax: a chunk's ``y = h W^T + (h H^T) V``
with the rows H, V of the chunks before it in the span. A span of one chunk is an apply and an accumulate
product. The cost model prefers this where moving the state costs little beside the arithmetic. May be changed
here: which products. It needs no kernel of ours, and no documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.spec import state_dtype


def chunk_scan_library(
    h: Tensor, v: Tensor, w0: Tensor, *, chunk: int, span: int, decay: float, out: Tensor
) -> Tensor:
    """``y_i = h_i W_i^T; W_{i+1} = w0 + decay (W_i - w0) + v_i^T h_i``, without writing the last chunk.

    Args:
        h: ``[B, T, F]``.
        v: ``[B, T, D]``.
        w0: ``[D, F]``.
        chunk: C.
        span: tokens between two writes, a multiple of C; C itself when there is decay.
        decay: gamma.
        out: ``[B, T, D]`` to fill.
    """
    wide, length = state_dtype(h.dtype), h.shape[1]
    for row in range(h.shape[0]):
        state, read = w0.to(wide, copy=True), w0
        for start in range(0, length, span):
            tokens = slice(start, start + span)
            keys, values, y = h[row, tokens], v[row, tokens], out[row, tokens]
            torch.mm(keys, read.t(), out=y)
            for later in range(chunk, keys.shape[0], chunk):
                here = slice(later, later + chunk)
                y[here].addmm_(keys[here] @ keys[:later].t(), values[:later])
            if start + span >= length:
                break
            _write(state, w0, decay, values, keys)
            read = state.to(h.dtype)
    return out


def chunk_scan_backward_library(
    dy: Tensor, h: Tensor, v: Tensor, w0: Tensor, chunk: int, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, v and w0, without documents: :func:`ttt_compiler.codegen.cpu.scan.chunk_scan_backward`.

    Five units of ``2 T D F``, three of which read or write a state in memory for every chunk.
    """
    wide, length = state_dtype(h.dtype), h.shape[1]
    dh, dv = torch.empty_like(h), torch.empty_like(v)
    total = torch.zeros(w0.shape, dtype=wide, device=h.device)
    spans = [slice(start, start + chunk) for start in range(0, length, chunk)]
    for row in range(h.shape[0]):
        state, read = w0.to(wide, copy=True), w0
        for span in spans:
            torch.mm(dy[row, span], read, out=dh[row, span])
            if span is not spans[-1]:
                _write(state, w0, decay, v[row, span], h[row, span])
                read = state.to(h.dtype)
        state.zero_()
        for span in reversed(spans):
            read = state.to(h.dtype)
            dh[row, span].addmm_(v[row, span], read)
            torch.mm(h[row, span], read.t(), out=dv[row, span])
            _accumulate(state.mul_(decay) if decay != 1.0 else state, dy[row, span].t(), h[row, span])
        if decay == 1.0:
            total += state
    if decay != 1.0:
        _accumulate(total, dy.flatten(0, 1).t(), h.flatten(0, 1))
    return dh, dv, total.to(w0.dtype)


def _write(state: Tensor, w0: Tensor, decay: float, v: Tensor, h: Tensor) -> None:
    """``state = w0 + decay (state - w0) + v^T h``."""
    if decay != 1.0:
        state.sub_(w0).mul_(decay).add_(w0)
    _accumulate(state, v.t(), h)


def _accumulate(state: Tensor, a: Tensor, b: Tensor) -> None:
    """``state += a b`` in the state's dtype."""
    if a.dtype == state.dtype:
        state.addmm_(a, b)
    elif a.is_cuda:
        state.add_(torch.mm(a, b, out_dtype=state.dtype))
    else:
        # Processors have no product of narrow operands with a wide result.
        state.addmm_(a.to(state.dtype), b.to(state.dtype))
