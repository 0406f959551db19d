"""Where the chunks of a batch begin, found on the device: documents, padding, ragged lengths.

May be changed here: the layout of the table, together with the kernels that read it. Plain torch without a
host synchronisation, so that a captured CUDA graph may hold it. The rule is
:mod:`ttt_compiler.codegen.segments`: position 0 starts a document, a negative position is padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Kinds of chunks. A row's first chunk starts from W0 whatever its kind says, unless a state is given.
CONTINUES, FRESH, PADDING = 0, 1, 2


def chunk_table(pos: Tensor, chunk: int) -> Tensor:
    """Chunks of every row, in order; together they cover all tokens, padding included.

    Args:
        pos: int64 ``[B or 1, T]``.
        chunk: C.

    Returns:
        int32 ``[B or 1, 2, T + 2]``. ``[b, 0, i]`` is the first token of chunk i, ``[b, 0, n] = T`` behind the
        last, ``[b, 0, T + 1] = n``. ``[b, 1, i]`` is the chunk's kind, ``[b, 1, n] = FRESH`` behind the last.
    """
    batch, length = pos.shape
    index = torch.arange(length, device=pos.device).expand(batch, length)
    padding = pos < 0
    turns = torch.zeros_like(padding)
    turns[:, 1:] = padding[:, 1:] != padding[:, :-1]
    turns[:, :1] = True
    begins = turns | (pos == 0)
    place = index - torch.where(begins, index, 0).cummax(1).values
    starts = place % chunk == 0
    kind = torch.where(padding, PADDING, torch.where(begins & (pos == 0), FRESH, CONTINUES))
    # Tokens that start no chunk are sent to a column behind the table.
    to = torch.where(starts, starts.cumsum(1) - 1, length + 2)
    table = pos.new_zeros(batch, 2, length + 3)
    table[:, 0] = length
    table[:, 1] = FRESH
    table[:, 0].scatter_(1, to, index)
    table[:, 1].scatter_(1, to, kind)
    table[:, 0, length + 1] = starts.sum(1)
    return table[:, :, : length + 2].to(torch.int32).contiguous()
