"""Update controls on CPU: what a chunk's v becomes before it is written.

Normalised keys and clipped writes are scalings of v's rows (a write is ``v^T h``), so the stateless op and
the running state share one function, and scans know of neither. Decay belongs to the scans. May be changed
here: how the norm of a write is found; :func:`ttt_compiler.codegen.reference.increment` says what it means.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ttt_compiler.codegen.reference import CANCELLED, TINY
from ttt_compiler.codegen.segments import documents, row_runs
from ttt_compiler.spec import state_dtype


def limit_writes(
    v: Tensor, h: Tensor, limit: Tensor | None, pos: Tensor | None, chunk: int, unit_keys: bool
) -> Tensor:
    """v of a whole call, scaled so that every complete chunk's write obeys the controls.

    Args:
        v: ``[B, T, D]`` with eta folded in.
        h: ``[B, T, F]``.
        limit: 0-dim, the largest norm of a write, or None.
        pos: int64 ``[B or 1, T]`` or None.
        chunk: C.
        unit_keys: whether h is written with its rows at unit norm.

    Returns:
        ``[B, T, D]``. Rows of an incomplete chunk are never written; they are not clipped.
    """
    out = v.clone(memory_format=torch.contiguous_format)
    for b, span in chunks(pos, v.shape[0], v.shape[1], chunk):
        scaled, _ = limited(v[b, span], h[b, span], limit, unit_keys)
        out[b, span] = scaled
    return out


def limit_writes_backward(
    grad: Tensor, v: Tensor, h: Tensor, limit: Tensor | None, pos: Tensor | None, chunk: int, unit_keys: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`limit_writes` for v, h and the limit."""
    acc = state_dtype(v.dtype)
    dv, dh = grad.clone(memory_format=torch.contiguous_format), torch.zeros_like(h)
    dlimit = torch.zeros((), dtype=acc)
    for b, span in chunks(pos, v.shape[0], v.shape[1], chunk):
        x, k, g = v[b, span].to(acc), h[b, span].to(acc), grad[b, span].to(acc)
        size = _row_norms(k) if unit_keys else None
        u = x if size is None else x / size
        du, dk = g, None
        norm = _norm(u, k) if limit is not None else None
        if limit is not None and norm is not None and float(norm) > float(limit):
            inner = (g * u).sum()
            dlimit += inner / norm
            fall = -limit.to(acc) / norm**3 * inner
            du = g * (limit.to(acc) / norm) + fall * (k @ (k.t() @ u))
            dk = fall * (u @ (u.t() @ k))
        if size is not None:
            dv[b, span] = du / size
            slope = (du * x).sum(-1, keepdim=True) / size**3
            dk = -slope * k if dk is None else dk - slope * k
        else:
            dv[b, span] = du
        if dk is not None:
            dh[b, span] = dk.to(h.dtype)
    return dv, dh, dlimit if limit is None else dlimit.to(limit.dtype)


def limited(v: Tensor, h: Tensor, limit: Tensor | None, unit_keys: bool) -> tuple[Tensor, Tensor | None]:
    """One complete chunk: v ``[C, D]`` scaled for its write with h ``[C, F]``, and the write's norm before.

    The norm is None without a limit. Non-finite operands pass through: the caller refuses or skips them.
    """
    if limit is None and not unit_keys:
        return v, None
    acc = state_dtype(v.dtype)
    u, k = v.to(acc), h.to(acc)
    if unit_keys:
        u = u / _row_norms(k)
    norm = None
    if limit is not None:
        norm = _norm(u, k)
        if float(norm) > float(limit):
            u = u * (limit.to(acc) / norm)
    return u.to(v.dtype), norm


def _row_norms(k: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(k, dim=-1, keepdim=True)
    # A row of zeros writes nothing, whatever v is.
    return torch.where(norms > TINY, norms, torch.ones_like(norms))


def _norm(u: Tensor, k: Tensor) -> Tensor:
    """``||u^T k||_F`` of u ``[C, D]``, k ``[C, F]``, by whichever product is smaller."""
    rows, d, f = u.shape[0], u.shape[1], k.shape[1]
    if rows * (d + f) < d * f:
        # ||u^T k||^2 = <u u^T, k k^T>, in which rows that cancel leave little but rounding errors.
        uu, kk = u @ u.t(), k @ k.t()
        largest = uu.trace() * kk.trace()
        square = uu.mul_(kk).sum()
        if not bool(square < CANCELLED * torch.finfo(u.dtype).eps * largest):
            return square.sqrt()
    norm: Tensor = torch.linalg.vector_norm(u.t() @ k)
    return norm


def chunks(pos: Tensor | None, batch: int, length: int, chunk: int) -> Iterator[tuple[int, slice]]:
    """Every complete chunk of a stateless call: its row and its tokens."""
    for b, runs in enumerate(row_runs(pos, batch, length)):
        for doc in documents(runs):
            for start in range(doc.start, doc.stop - chunk + 1, chunk):
                yield b, slice(start, start + chunk)
