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

from ttt_compiler.errors import NonFiniteWriteError
from ttt_compiler.spec import WriteRule

OFFICIAL = WriteRule()
# Rows of zeros stay zeros when keys are normalised.
TINY = 1e-30
# In units of rounding errors of ``||u||^2 ||k||^2``: below, the Gram form of ``||u^T k||^2`` is not trusted.
# Rows without any relation have ``1 / C`` of it, 8000 such units in fp32 at C = 1024.
CANCELLED = 1000


def target(t: Tensor, conv: Tensor, proj: Tensor | None) -> Tensor:
    """v of one chunk: ``conv(t) @ P`` with zero padding at both ends (paper section 3.2, official code).

    Args:
        t: ``[m, Dt]`` target source of the chunk.
        conv: ``[Dt, 1, K]`` depthwise taps, centred on the token.
        proj: ``[Dt, D]``, used untransposed, or None for the identity.
    """
    out = functional.conv1d(t.t()[None], conv, padding=conv.shape[-1] // 2, groups=t.shape[1])[0].t()
    return out if proj is None else out @ proj


def increment(
    t: Tensor,
    h: Tensor,
    w0: Tensor,
    conv: Tensor,
    proj: Tensor | None,
    lr: float,
    rule: WriteRule = OFFICIAL,
) -> Tensor:
    """What one complete chunk adds to W, ``[D, F]``: ``lr v^T k``, limited as ``rule`` says.

    k is h, its rows at unit norm, or h / C (design, section 1: update control).

    Raises:
        NonFiniteWriteError: it holds NaN or Inf, and the rule does not skip such a write.
    """
    if rule.keys == "unit":
        norms = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
        k = h / torch.where(norms > TINY, norms, torch.ones_like(norms))
    else:
        k = h / h.shape[0] if rule.keys == "mean" else h
    delta = lr * target(t, conv, proj).t() @ k
    if not bool(delta.isfinite().all()):
        if rule.on_nonfinite == "skip":
            return torch.zeros_like(delta)
        raise NonFiniteWriteError("a chunk would write NaN or Inf into the fast weights")
    limit = write_limit(w0, rule)
    if limit is None:
        return delta
    # A write of zero has no direction to be scaled in, and its norm no gradient.
    norm = torch.linalg.vector_norm(delta)
    return delta if bool(norm <= limit) else delta * (limit / norm)


def write_limit(w0: Tensor, rule: WriteRule) -> Tensor | None:
    """Largest Frobenius norm of one write, a 0-dim tensor, or None without a limit."""
    limits = []
    if rule.max_norm is not None:
        limits.append(w0.new_tensor(rule.max_norm, dtype=torch.promote_types(w0.dtype, torch.float32)))
    if rule.max_ratio is not None:
        wide = w0.to(torch.promote_types(w0.dtype, torch.float32))
        limits.append(rule.max_ratio * torch.linalg.vector_norm(wide))
    return torch.stack(limits).amin() if limits else None


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
    rule: WriteRule = OFFICIAL,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 with the exclusive scan: apply, then update, chunk by chunk. Differentiable.

    With update controls, ``W_{i+1} = W0 + decay (W_i - W0) + increment``.

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
                delta = increment(t[ids], h[ids], w0, conv, proj, lr, rule)
                w = w + delta if rule.decay == 1.0 else w0 + rule.decay * (w - w0) + delta
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
    rule: WriteRule = OFFICIAL,
) -> Tensor:
    """:func:`chunked` for ``h [B, T, F]``, ``t [B, T, Dt]``, ``pos [B or 1, T]``; rows are independent."""
    rows = []
    for b in range(h.shape[0]):
        row = None if pos is None else pos[b if pos.shape[0] > 1 else 0]
        rows.append(chunked(h[b], t[b], w0, conv, proj, lr, chunk, row, rule)[0])
    y = torch.stack(rows)
    return y if bias is None else y + bias
