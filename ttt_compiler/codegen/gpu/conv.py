"""The chunk convolution on any device, without asking the host where chunks begin.

Compiled graphs generate it from ``lowering_conv.py``; this serves what runs op by op. May be changed here:
how it is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen.kernels.chunk_table import chunk_places
from ttt_compiler.spec import state_dtype


def chunk_conv(t: Tensor, conv: Tensor, pos: Tensor | None, chunk: int) -> Tensor:
    """See :func:`ttt_compiler.codegen.cpu.conv.chunk_conv`."""
    kernel = conv.shape[-1]
    wide = t.to(state_dtype(t.dtype))
    taps = conv[:, 0].to(wide.dtype)
    total = torch.zeros_like(wide, memory_format=torch.contiguous_format)
    for k in range(kernel):
        total = total + _shifted(wide, pos, chunk, k - kernel // 2) * taps[:, k]
    return total.to(t.dtype)


def chunk_conv_dweight(dv: Tensor, t: Tensor, pos: Tensor | None, chunk: int, kernel: int) -> Tensor:
    """See :func:`ttt_compiler.codegen.cpu.conv.chunk_conv_dweight`."""
    acc = state_dtype(t.dtype)
    wide, grad = t.to(acc), dv.to(acc)
    taps = [(grad * _shifted(wide, pos, chunk, k - kernel // 2)).sum((0, 1)) for k in range(kernel)]
    return torch.stack(taps, -1)[:, None].to(t.dtype)


def _shifted(t: Tensor, pos: Tensor | None, chunk: int, shift: int) -> Tensor:
    """``t[b, s + shift]`` where that token lies in the chunk of token s, else zeros."""
    length = t.shape[1]
    if pos is None:
        pos = torch.arange(length, device=t.device)[None]
    place, size = chunk_places(pos, chunk).unbind(-1)
    inside = (place + shift >= 0) & (place + shift < size)
    index = (torch.arange(length, device=t.device) + shift).clamp(0, max(length - 1, 0))
    # Not a product with a mask: what is not finite must stay in its own chunk.
    return torch.where(inside[..., None], t.index_select(1, index), 0)
