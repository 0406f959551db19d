"""Where the chunks of a batch begin, found on the device: documents, padding, ragged lengths.

May be changed here: the layout of the table, together with the kernels that read it. Plain torch without a
host synchronisation, so that a captured CUDA graph may hold it. The rule is
:mod:`ttt_compiler.codegen.segments`: position 0 starts a document, a negative position is padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.errors import PositionError

# Kinds of chunks. A row's first chunk starts from W0 whatever its kind says, unless a state is given.
CONTINUES, FRESH, PADDING = 0, 1, 2
# Added to the kind of a chunk whose write is left out.
SKIPPED = 4


def chunk_table(pos: Tensor, chunk: int) -> Tensor:
    """Chunks of every row, in order; together they cover all tokens, padding included.

    Args:
        pos: int64 ``[B or 1, T]``.
        chunk: C.

    Returns:
        int32 ``[B or 1, 2, T + 2]``. ``[b, 0, i]`` is the first token of chunk i, ``[b, 0, n] = T`` behind
        the last, ``[b, 0, T + 1] = n``. ``[b, 1, i]`` is the chunk's kind, ``[b, 1, n] = FRESH`` behind the
        last.
    """
    length = pos.shape[1]
    index, place, padding, begins = _places(pos)
    starts = place % chunk == 0
    kind = torch.where(padding, PADDING, torch.where(begins & (pos == 0), FRESH, CONTINUES))
    # Tokens that start no chunk are sent to a column behind the table.
    to = torch.where(starts, starts.cumsum(1) - 1, length + 2)
    table = pos.new_zeros(pos.shape[0], 2, length + 3)
    table[:, 0] = length
    table[:, 1] = FRESH
    table[:, 0].scatter_(1, to, index)
    table[:, 1].scatter_(1, to, kind)
    table[:, 0, length + 1] = starts.sum(1)
    return table[:, :, : length + 2].to(torch.int32).contiguous()


def skip_nonfinite(table: Tensor | None, v: Tensor, h: Tensor, chunk: int) -> Tensor:
    """A table of B rows in which chunks that hold NaN or Inf are marked ``SKIPPED``.

    Args:
        table: of :func:`chunk_table`, or None for chunks of C tokens from the first token on.
        v: ``[B, T, D]``.
        h: ``[B, T, F]``.
        chunk: C.
    """
    batch, length = v.shape[:2]
    if table is None:
        table = chunk_table(torch.arange(length, device=v.device)[None], chunk)
    table = table.expand(batch, -1, -1).clone()
    bad = ~(v.isfinite().all(-1) & h.isfinite().all(-1))
    # Tokens up to each border that are not finite: their number grows inside of a bad chunk.
    seen = torch.zeros(batch, length + 1, dtype=torch.int64, device=v.device)
    seen[:, 1:] = bad.cumsum(1)
    at = table[:, 0, : length + 1].long()
    count = seen.gather(1, at)
    table[:, 1, :length] += SKIPPED * (count[:, 1:] > count[:, :-1])
    return table


def chunk_places(pos: Tensor, chunk: int) -> Tensor:
    """Where each token stands in its chunk.

    Args:
        pos: int64 ``[B or 1, T]``.
        chunk: C.

    Returns:
        int32 ``[B or 1, T, 2]``: tokens before it in its chunk, and tokens of that chunk in the call. Padding
        stands far in front of an empty chunk.
    """
    _, place, padding, _ = _places(pos)
    place = place % chunk
    number = (place == 0).cumsum(1) - 1
    sizes = torch.zeros_like(number).scatter_add_(1, number, torch.ones_like(number)).gather(1, number)
    place = torch.where(padding, -(2**20), place)
    return torch.stack([place, torch.where(padding, 0, sizes)], -1).to(torch.int32)


def require_whole_documents(pos: Tensor) -> None:
    """Without a running state no padding may split a document.

    Raises:
        PositionError: on CPU. On other devices the check runs there, and stops the device's program.
    """
    padding = pos < 0
    resumes = torch.zeros_like(padding)
    resumes[:, 1:] = padding[:, :-1] & ~padding[:, 1:] & (pos[:, 1:] > 0)
    earlier = (~padding).cumsum(1) - (~padding).long() > 0
    whole = ~(resumes & earlier).any()
    message = (
        "padding splits a document. Without a cache a document must be contiguous: pad on one side only, or "
        "restart position_ids at 0 where a document starts"
    )
    if pos.device.type == "cpu":
        if not bool(whole):
            raise PositionError(message)
    else:
        torch._assert_async(whole, message)


def _places(pos: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per token: its index, its place in its run, whether it is padding, and whether a run begins."""
    index = torch.arange(pos.shape[1], device=pos.device).expand(pos.shape)
    padding = pos < 0
    begins = pos == 0
    begins[:, :1] = True
    begins[:, 1:] |= padding[:, 1:] != padding[:, :-1]
    return index, index - torch.where(begins, index, 0).cummax(1).values, padding, begins
