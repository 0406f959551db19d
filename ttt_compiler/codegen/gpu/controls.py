"""Update controls on any device, without asking the host where chunks begin or how large a write is.

A complete chunk has C tokens wherever it lies, so all of them are gathered into one batch; a write's norm
comes from the smaller of two products. May be changed here: how the norm is found;
:func:`ttt_compiler.codegen.reference.increment` says what it means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen.kernels.chunk_table import PADDING, chunk_table
from ttt_compiler.codegen.reference import TINY
from ttt_compiler.spec import state_dtype


def limit_writes(
    v: Tensor, h: Tensor, limit: Tensor | None, pos: Tensor | None, chunk: int, unit_keys: bool
) -> Tensor:
    """See :func:`ttt_compiler.codegen.cpu.controls.limit_writes`."""
    batch, length = v.shape[:2]
    count = length // chunk
    if count == 0 or (limit is None and not unit_keys):
        return v.clone(memory_format=torch.contiguous_format)
    acc = state_dtype(v.dtype)
    starts = _complete(pos, chunk, length, v.device).expand(batch, count)
    tokens = starts[..., None] + torch.arange(chunk, device=v.device)
    # Chunks that do not exist lie behind the last token; their factors go to a column of their own.
    there = torch.where(starts[..., None] < length, tokens, length).flatten(1)
    near = there.clamp(max=length - 1)
    u = _gathered(v, near, count, acc)
    k = _gathered(h, near, count, acc)
    factor = torch.ones(batch, count, chunk, 1, dtype=acc, device=v.device)
    if unit_keys:
        norms = torch.linalg.vector_norm(k, dim=-1, keepdim=True)
        # A row of zeros writes nothing, whatever v is.
        factor = factor / torch.where(norms > TINY, norms, 1.0)
    if limit is not None:
        norm = _norms(u * factor, k)[..., None, None]
        over = norm > limit
        factor = factor * torch.where(over, limit.to(acc) / torch.where(over, norm, 1.0), 1.0)
    whole = torch.ones(batch, length + 1, dtype=acc, device=v.device)
    whole = whole.scatter(1, there, factor.flatten(1))
    return (v.to(acc) * whole[:, :length, None]).to(v.dtype)


def limit_writes_backward(
    grad: Tensor, v: Tensor, h: Tensor, limit: Tensor | None, pos: Tensor | None, chunk: int, unit_keys: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`ttt_compiler.codegen.cpu.controls.limit_writes_backward`."""
    acc = state_dtype(v.dtype)
    with torch.enable_grad():
        operands = [v.detach().requires_grad_(), h.detach().requires_grad_()]
        bound = None if limit is None else limit.detach().to(acc).requires_grad_()
        wanted = operands if bound is None else [*operands, bound]
        out = limit_writes(operands[0], operands[1], bound, pos, chunk, unit_keys)
        found = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    full = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]
    last = full[2].to(limit.dtype) if limit is not None else torch.zeros((), dtype=acc, device=v.device)
    return full[0].contiguous(), full[1].contiguous(), last


def _complete(pos: Tensor | None, chunk: int, length: int, device: torch.device) -> Tensor:
    """First tokens of complete chunks, int64 ``[B or 1, T // C]``; T where there are fewer."""
    count = length // chunk
    if pos is None:
        return (torch.arange(count, device=device) * chunk)[None]
    table = chunk_table(pos, chunk).long()
    starts, kinds = table[:, 0, :length], table[:, 1, :length]
    index = torch.arange(length, device=device)
    whole = (table[:, 0, 1 : length + 1] - starts == chunk) & (kinds != PADDING)
    whole &= index < table[:, 0, length + 1 :]
    to = torch.where(whole, whole.cumsum(1) - 1, count)
    found = torch.full((pos.shape[0], count + 1), length, dtype=torch.int64, device=device)
    return found.scatter(1, to, starts)[:, :count]


def _gathered(x: Tensor, tokens: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``[B, n, C, X]`` of ``[B, T, X]``."""
    rows = x.gather(1, tokens[..., None].expand(-1, -1, x.shape[-1]))
    return rows.view(rows.shape[0], count, rows.shape[1] // count, rows.shape[-1]).to(dtype)


def gram_squares(u: Tensor, k: Tensor) -> Tensor:
    """``||u^T k||^2 = <u u^T, k k^T>`` of u ``[..., C, D]`` and k ``[..., C, F]``, fp64 ``[...]``.

    Of rows that cancel, products in fp32 leave little but rounding errors.
    """
    u, k = u.double(), k.double()
    return ((u @ u.mT) * (k @ k.mT)).sum((-1, -2)).clamp(min=0.0)


def _norms(u: Tensor, k: Tensor) -> Tensor:
    """``||u^T k||_F`` per chunk, u ``[B, n, C, D]``, k ``[B, n, C, F]``, by whichever product is smaller."""
    chunk, d, f = u.shape[-2], u.shape[-1], k.shape[-1]
    if chunk * (d + f) < d * f:
        squared = gram_squares(u, k).to(u.dtype)
    else:
        squared = (u.mT @ k).square().sum((-1, -2))
    # The root of zero has no gradient.
    return torch.where(squared > 0, torch.where(squared > 0, squared, 1.0).sqrt(), 0.0)
