"""Which fast matrices a training forward keeps, so that the backward computes fewer of them again.

The backward applies every chunk's W to dy. From W0 alone that takes as many writes as the forward made. With
K of them kept, it begins K + 1 times, and the last chunks of each stretch read each other instead of a
written matrix (:func:`tail_chunks`). May be changed here: how much is kept, and where.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu.workspaces import leased
from ttt_compiler.spec import state_dtype

# Kept matrices, and W where one is written between them, take at most this part of h, which is kept until the
# backward in any case: memory that grows with the text as all else does, and not with the number of chunks.
_PART_OF_H = (7, 8)


def tail_chunks(chunk: int, d_model: int, d_ff: int) -> int:
    """How many last chunks of a document are cheapest without a write between them.

    A write costs ``2 C D F``; a chunk that reads an unwritten one instead, ``2 C^2 (D + F)``. m chunks save
    m - 1 writes for m (m - 1) / 2 such reads: most at ``m = DF / (C (D + F)) + 1/2``.
    """
    return max(1, round(d_model * d_ff / (chunk * (d_model + d_ff)) + 0.5 - 1e-9))


def count(batch: Any, length: Any, chunk: int, d_model: int, d_ff: int, dtype: torch.dtype) -> Any:
    """K for operands of ``dtype``; batch and length may be symbols. 0 where h is too small for a matrix."""
    part, of = _PART_OF_H
    fits = batch * length * dtype.itemsize * part // (of * d_model * state_dtype(dtype).itemsize)
    # One less where chunks are too many to read each other, so that W is written. A plain min or max would
    # decide for one text's length.
    chunks, read = -(-length // chunk) * batch, (fits + batch) * tail_chunks(chunk, d_model, d_ff)
    written = torch.sym_min(1, torch.sym_max(0, chunks - read))
    return torch.sym_max(0, torch.sym_min(fits, batch * (length // chunk)) - written)


def shape(h: Tensor, w0: Tensor, chunk: int) -> tuple[Any, ...]:
    """``[K, D, F]`` of what is kept: h ``[B, T, F]``, w0 ``[D, F]``."""
    batch, length, _ = h.shape
    d_model, d_ff = w0.shape
    return count(batch, length, chunk, d_model, d_ff, h.dtype), d_model, d_ff


def room(h: Tensor, w0: Tensor, chunk: int) -> Tensor:
    """What is kept is put there: of :func:`shape`, in the state's dtype, of undefined content."""
    return leased("scan.kept", shape(h, w0, chunk), state_dtype(h.dtype))


def places(chunks: Sequence[int], kept: int, tail: int) -> list[list[int]]:
    """Before which chunks of each document W is kept: never before the first, whose W is W0.

    Args:
        chunks: chunks of each document.
        kept: K.
        tail: how many last chunks read each other, so that no W is written between them.

    Returns:
        Per document ascending indices, K or fewer in all.
    """
    parts = [1] * len(chunks)
    for _ in range(kept):
        # A document of n chunks has n - tail places.
        free = [i for i, n in enumerate(chunks) if parts[i] <= n - tail]
        if not free:
            break
        # The cost of a stretch is convex in its length: the longest one is worth most to divide.
        parts[max(free, key=lambda i: chunks[i] / parts[i])] += 1
    return [_borders(n, many, tail) for n, many in zip(chunks, parts, strict=True)]


def _borders(chunks: int, parts: int, tail: int) -> list[int]:
    """Stretches as even as they can be, the last one of at least ``tail`` chunks."""
    if chunks < parts * tail and parts > 1:
        chunks, parts = chunks - tail, parts - 1
        return [i * chunks // parts for i in range(1, parts + 1)]
    return [i * chunks // parts for i in range(1, parts)]


def stretches(chunks: int, marks: Sequence[int], tail: int) -> tuple[int, int]:
    """What W of every chunk of a document takes: writes, and reads of one unwritten chunk by another.

    A write is ``2 C D F`` FLOPs, a read ``2 C^2 (D + F)``.
    """
    writes = reads = 0
    for start, stop in itertools.pairwise((0, *marks, chunks)):
        last = min(stop - start, tail)
        writes += stop - start - last
        reads += last * (last - 1) // 2
    return writes, reads
