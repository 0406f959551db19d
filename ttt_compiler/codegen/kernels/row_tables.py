"""Which slot and which lanes a row writes to, found on the device for all rows at once.

Rows that share a past read the same slot and the same lanes until they write. On CPU rows are served one
after another; here all of them move at once, so a row may land elsewhere, but never where another row reads.
There are as many slots and lanes as rows, and each row holds at most one (of a column), so a free one exists.
May be changed here: who moves where.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen.layout import DONE, SEEN, SLOT, WRITES


def place(batch: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """A copy of ``table`` with rows ``batch`` replaced."""
    return table.index_copy(0, batch, values.to(table.dtype))


def take_slots(rows: Tensor, batch: Tensor, writers: Tensor) -> Tensor:
    """The slot of every row of the batch after this call.

    A row that does not write keeps its slot for as long as the call reads it. Of those that write to one
    slot, which nobody else reads, the last stays, the others move.

    Args:
        rows: int64 ``[L, 8]`` before the call.
        batch: int64 ``[B]``.
        writers: bool ``[B]``.

    Returns:
        int64 ``[B]``.
    """
    count = len(rows)
    writes = place(batch, writers, torch.zeros(count, dtype=torch.bool, device=rows.device))
    slots = rows[:, SLOT]
    reads = (rows[:, WRITES] > 0) & ~writes
    index = torch.arange(count, device=rows.device)
    same = slots[:, None] == slots
    beaten = same & (reads | (writes & (index > index[:, None])))
    moves = writes & beaten.any(1)
    held = (index[:, None] == slots) & (reads | (writes & ~moves))
    free = (~held.any(1)).to(torch.int8).argsort(dim=0, descending=True, stable=True)
    taken = torch.where(moves, free[(moves.cumsum(0) - 1).clamp(min=0)], slots)
    return taken[batch]


def take_lanes(
    rows: Tensor, lanes: Tensor, batch: Tensor, keeps: Tensor, writes: Tensor, chunk: int
) -> Tensor:
    """The lane of every new entry of the ring: the row's own, or one that no row reads in that column.

    Args:
        rows: int64 ``[L, 8]`` before the call.
        lanes: int32 ``[L, A]`` before the call.
        batch: int64 ``[B]``.
        keeps: bool ``[B, A]``, old entries that a row of the batch still reads after the call.
        writes: bool ``[B, A]``, new entries.
        chunk: C.

    Returns:
        int64 ``[B, A]``; where nothing is written it means nothing.
    """
    count, size = lanes.shape
    first = rows[:, DONE] * chunk
    column = torch.arange(size, device=rows.device)
    age = (column - first[:, None]) % size
    reads = place(batch, keeps, age < (rows[:, SEEN] - first)[:, None])
    new = place(batch, writes, torch.zeros_like(reads))
    # Entries that nobody reads are sent to a lane behind the table.
    used = torch.zeros(count + 1, size, dtype=torch.bool, device=rows.device)
    used = used.scatter(0, torch.where(reads, lanes.long(), count), True)[:count]
    moves = new & used
    free = (~used & ~(new & ~used)).to(torch.int8).argsort(dim=0, descending=True, stable=True)
    rank = (moves.cumsum(0) - 1).clamp(min=0)
    own = torch.arange(count, device=rows.device)[:, None]
    return torch.where(moves, free.gather(0, rank), own)[batch]
