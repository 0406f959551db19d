"""The specification: In-Place TTT in plain torch, any dtype, no custom op.

Everything that computes fast weights is tested against this file in fp64. May be changed here: only with
the semantics in the design (section 1); never for speed.

Shapes, for one sequence: ``h [T, F]``, ``t [T, Dt]``, ``w0 [D, F]``, ``conv [Dt, 1, K]``,
``proj [Dt, D]`` or None. ``pos [T]``: 0 starts a document, negative marks padding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def target(t: Tensor, conv: Tensor, proj: Tensor | None) -> Tensor:
    """v of one chunk: ``conv(t) @ P`` with zero padding at both ends (paper section 3.2, official code).

    Args:
        t: ``[m, Dt]`` target source of the chunk.
        conv: ``[Dt, 1, K]`` depthwise taps, centred on the token.
        proj: ``[Dt, D]``, used untransposed, or None for the identity.
    """
    out = functional.conv1d(t.t()[None], conv, padding=conv.shape[-1] // 2, groups=t.shape[1])[0].t()
    return out if proj is None else out @ proj


def documents(pos: Tensor | None, length: int) -> list[list[int]]:
    """Token indices of each document of one row; padding belongs to none."""
    docs: list[list[int]] = []
    for i in range(length):
        p = 1 if pos is None else int(pos[i])
        if p < 0:
            continue
        if p == 0 or not docs:
            docs.append([])
        docs[-1].append(i)
    return docs


def chunked(
    h: Tensor,
    t: Tensor,
    w0: Tensor,
    conv: Tensor,
    proj: Tensor | None,
    lr: float,
    chunk: int,
    pos: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 with the exclusive scan: apply, then update, chunk by chunk. Differentiable.

    Returns:
        ``y [T, D]`` and ``W [D, F]`` after the last complete chunk of the last document.
    """
    y = h @ w0.t()
    w = w0
    for doc in documents(pos, h.shape[0]):
        w = w0
        index = torch.tensor(doc, device=h.device)
        for ids in index.split(chunk):
            y = y.index_copy(0, ids, h[ids] @ w.t())
            if len(ids) == chunk:
                w = w + lr * target(t[ids], conv, proj).t() @ h[ids]
    return y, w


def naive(
    h: Tensor,
    t: Tensor,
    w0: Tensor,
    conv: Tensor,
    proj: Tensor | None,
    lr: float,
    chunk: int,
    pos: Tensor | None = None,
) -> Tensor:
    """The definition token by token: ``y_s = W0 h_s + lr * sum_u v_u (h_u . h_s)`` over earlier chunks."""
    y = h @ w0.t()
    for doc in documents(pos, h.shape[0]):
        for s, i in enumerate(doc):
            for c in range(s // chunk):
                ids = torch.tensor(doc[c * chunk : (c + 1) * chunk], device=h.device)
                v = target(t[ids], conv, proj)
                for u, j in enumerate(ids.tolist()):
                    y[i] = y[i] + lr * v[u] * (h[j] @ h[i])
    return y


def batched(
    h: Tensor,
    t: Tensor,
    w0: Tensor,
    conv: Tensor,
    proj: Tensor | None,
    lr: float,
    chunk: int,
    pos: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """:func:`chunked` for ``h [B, T, F]``, ``t [B, T, Dt]``, ``pos [B or 1, T]``; rows are independent."""
    rows = []
    for b in range(h.shape[0]):
        row = None if pos is None else pos[b if pos.shape[0] > 1 else 0]
        rows.append(chunked(h[b], t[b], w0, conv, proj, lr, chunk, row)[0])
    y = torch.stack(rows)
    return y if bias is None else y + bias
