"""Smaller forms of a written fast weight, for files only: what runs is always the whole matrix.

What a sequence wrote, ``W - W0`` ``[D, F]``, is stored as bfloat16, as int8 with one scale per row, or as
two factors. All lose something; how much is measured when it is stored, and belongs into the file's
header. May be changed here: new methods, under new names; files keep the old ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_compiler.errors import ConfigError, SnapshotError, TTTError
from ttt_compiler.runtime.files import Shapes, expect_tensors

METHODS = ("bf16", "int8", "lowrank:r")
MAX_RANK = 65536
# Directions beyond the rank that the search keeps, and how often it sharpens them: far more than a matrix
# of rank r needs, and enough for a slowly falling spectrum to come within a percent of the best.
OVERSAMPLE, ROUNDS, SEED = 16, 4, 0


@dataclass(frozen=True)
class Method:
    """A parsed method: ``name``, and ``rank`` for ``lowrank``."""

    name: str
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.rank}" if self.rank else self.name


def parse_method(text: object, error: type[TTTError] = ConfigError) -> Method:
    """The method that ``text`` names.

    Raises:
        error: it names none; the message lists them.
    """
    if text in ("bf16", "int8"):
        return Method(str(text))
    match = re.fullmatch(r"lowrank:([1-9][0-9]{0,4})", text, re.ASCII) if isinstance(text, str) else None
    if match is None or int(match[1]) > MAX_RANK:
        raise error(
            f"compress={str(text)[:60]!a} is none of {', '.join(METHODS)} (r: a rank from 1 to {MAX_RANK}, "
            "such as lowrank:16); nothing was changed"
        )
    return Method("lowrank", int(match[1]))


def encode(delta: Tensor, method: str | Method) -> tuple[dict[str, Tensor], float]:
    """``delta [D, F]`` in a smaller form, and what that loses: ``||decoded - delta|| / ||delta||``.

    The same delta gives the same tensors on the same machine. ``bf16`` loses at most 2^-8 and ``int8`` at
    most half a step per entry, a step being a 127th of the row's largest entry, as long as no entry is so
    small (below 1e-36) or so large that fp32 itself runs out of digits.

    Raises:
        ConfigError: unknown method.
        SnapshotError: NaN or Inf, in ``delta`` or in what the smaller form can hold.
    """
    method = method if isinstance(method, Method) else parse_method(method)
    if not bool(delta.isfinite().all()):
        raise SnapshotError("a fast weight holds NaN or Inf and cannot be stored; nothing was changed")
    x = delta.detach()
    too_large = f"a fast weight is too large for {method}; nothing was changed"
    if not bool(x.float().isfinite().all()):
        raise SnapshotError(too_large)
    if method.name == "bf16":
        tensors = {"bf16": x.to(torch.bfloat16)}
    elif method.name == "int8":
        tensors = _int8(x)
    else:
        tensors = _factors(x.float(), min(method.rank, *x.shape))
    decoded = decode(tensors, method, (x.shape[0], x.shape[1]), x.dtype)
    if not bool(decoded.isfinite().all()):
        raise SnapshotError(too_large)
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)
    lost = torch.linalg.vector_norm(decoded.sub_(x), dtype=torch.float64)
    return tensors, float(lost / norm) if norm else 0.0


def expected_tensors(method: Method, shape: tuple[int, int]) -> Shapes:
    """Names, shapes and dtypes that :func:`encode` gives for a delta of ``shape``."""
    rows, columns = shape
    if method.name == "bf16":
        return {"bf16": (shape, torch.bfloat16)}
    if method.name == "int8":
        return {"int8": (shape, torch.int8), "scale": ((rows, 1), torch.float32)}
    rank = min(method.rank, rows, columns)
    return {"left": ((rows, rank), torch.float32), "right": ((rank, columns), torch.float32)}


def decode(
    tensors: Mapping[str, Tensor],
    method: str | Method,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The delta ``[D, F]`` that :func:`encode` stored, in ``dtype``.

    Raises:
        SnapshotError: tensors of another method, shape or dtype.
    """
    method = method if isinstance(method, Method) else parse_method(method, SnapshotError)
    expect_tensors(
        tensors, expected_tensors(method, shape), f"a fast weight stored as {method}", SnapshotError
    )
    if method.name == "bf16":
        return tensors["bf16"].to(dtype, copy=True)
    if method.name == "int8":
        return tensors["int8"].to(dtype) * tensors["scale"].to(dtype)
    return tensors["left"].to(dtype) @ tensors["right"].to(dtype)


def _int8(x: Tensor) -> dict[str, Tensor]:
    scale = (x.abs().amax(1, keepdim=True) / 127).float()
    steps = x / torch.where(scale > 0, scale, 1.0)
    return {"int8": steps.round_().clamp_(-127, 127).to(torch.int8), "scale": scale}


def _factors(x: Tensor, rank: int) -> dict[str, Tensor]:
    """The best two factors, nearly: a randomised search for the span of ``x``, then its exact SVD.

    Seeded by a generator of its own, so that neither other random numbers nor the result depend on it.
    """
    width = min(rank + OVERSAMPLE, *x.shape)
    generator = torch.Generator().manual_seed(SEED)
    probe = torch.randn(x.shape[1], width, generator=generator).to(x.device)
    # A product of many tiny entries would vanish: the search needs directions only.
    largest = x.abs().amax()
    y = x / largest if largest > 0 else x
    span = torch.linalg.qr(y @ probe).Q
    for _ in range(ROUNDS):
        span = torch.linalg.qr(y @ torch.linalg.qr(y.T @ span).Q).Q
    u, s, v = torch.linalg.svd(span.T @ y, full_matrices=False)
    root = s[:rank].sqrt()
    left = (span @ u[:, :rank]) * root
    return {"left": left.contiguous(), "right": (root[:, None] * v[:rank] * largest).contiguous()}
