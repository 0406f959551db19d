"""v of complete chunks under the update controls, for calls of several tokens, as plain torch operations.

``v = conv(t) @ P`` is a GEMM of many rows here, which the vendor's library does best. Every number that
decides something (norms, finiteness) stays on the device. May be changed here: how v is computed; what it is,
is :func:`ttt_compiler.codegen.reference.increment`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ttt_compiler.codegen.gpu.controls import gram_squares
from ttt_compiler.codegen.reference import TINY
from ttt_compiler.spec import SiteSpec, WriteRule


class Values(NamedTuple):
    """Of the complete chunks ``[B, N]`` of a call.

    Attributes:
        v: ``[B, N, C, D]`` in the operands' dtype, limited; zeros where the chunk may not be written.
        finite: bool ``[B, N]``, whether its write is made.
        clipped: bool ``[B, N]``, whether it was scaled down to the limit.
        norm: fp32 ``[B, N]``, the norm of the write: exact under a limit, else the bound ``||v|| ||h||``.
    """

    v: Tensor
    finite: Tensor
    clipped: Tensor
    norm: Tensor


def chunk_values(
    t: Tensor,
    keys: Tensor | None,
    square: Tensor,
    w0: Tensor,
    conv: Tensor,
    proj: Tensor | None,
    spec: SiteSpec,
) -> Values:
    """Compute them.

    Args:
        t: ``[B, N, C, Dt]``.
        keys: ``[B, N, C, F]``, needed under a limit alone.
        square: fp32 ``[B, N, C]``, the squared norms of the hidden rows.
        w0: ``[D, F]``, needed under a relative limit alone.
        conv: ``[Dt, 1, K]``.
        proj: ``[Dt, D]`` or None.
        spec: the site's constants.
    """
    v = _convolved(t, conv)
    v = v * spec.write_scale if proj is None else v @ (proj * spec.write_scale).to(v.dtype)
    u = v.float()
    if spec.rule.keys == "unit":
        size = square.sqrt()
        u = u / torch.where(size > TINY, size, 1.0)[..., None]
    norm = u.square().sum((-1, -2)).sqrt() * square.sum(-1).sqrt()
    clipped = torch.zeros_like(norm, dtype=torch.bool)
    limit = device_limit(w0, spec.rule)
    if limit is not None:
        assert keys is not None
        norm = gram_squares(u, keys).sqrt().float()
        clipped = norm > limit
        u = u * torch.where(clipped, limit / norm, 1.0)[..., None, None]
        norm = torch.minimum(norm, limit)
    v = u.to(v.dtype)
    finite = v.float().square().sum((-1, -2)).isfinite() & square.sum(-1).isfinite()
    v = torch.where(finite[..., None, None], v, 0.0)
    return Values(v, finite, clipped, norm)


def device_limit(w0: Tensor, rule: WriteRule) -> Tensor | None:
    """:func:`ttt_compiler.codegen.reference.write_limit`, without copying a number from the host."""
    limit = None
    if rule.max_norm is not None:
        limit = torch.full((), rule.max_norm, dtype=torch.float32, device=w0.device)
    if rule.max_ratio is not None:
        ratio = rule.max_ratio * torch.linalg.vector_norm(w0, dtype=torch.float32)
        limit = ratio if limit is None else torch.minimum(limit, ratio)
    return limit


def _convolved(t: Tensor, conv: Tensor) -> Tensor:
    """Centred taps inside every chunk: t ``[..., C, Dt]``."""
    kernel, chunk = conv.shape[-1], t.shape[-2]
    half = kernel // 2
    padded = functional.pad(t, (0, 0, half, kernel - 1 - half))
    out = padded[..., :chunk, :] * conv[:, 0, 0].float()
    for k in range(1, kernel):
        out += padded[..., k : k + chunk, :] * conv[:, 0, k].float()
    return out.to(t.dtype)
