"""The tokens of one row that are not written yet: a ring of hidden and target rows.

Token p of a document lies in column ``p mod (C + R + S)``, so nothing moves when a chunk is written, and
taking tokens back is a matter of counters. Rows that share a past (beams, forks) read each other's lanes; a
new entry goes to a lane of its column that no row reads. May be changed here: how entries are found; where
they stand is :mod:`ttt_compiler.codegen.layout`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen.layout import SEEN, StateTensors, live_start


class RowTail:
    """One row's view of the ring.

    Args:
        table: ``rows`` as Python ints.
        row: which of them.
        state: the site's tensors.
        chunk: C.
    """

    def __init__(self, table: list[list[int]], row: int, state: StateTensors, chunk: int) -> None:
        self.table, self.row, self.me = table, row, table[row]
        self.state = state
        self.chunk = chunk
        self.capacity = state.capacity
        self.shared = state.lanes.shape[1] > 0

    def append(self, h: Tensor, t: Tensor) -> None:
        """Tokens SEEN, SEEN+1, ...: h ``[m, F]``, t ``[m, Dt]`` with m <= C."""
        first, size = self.me[SEEN] % self.capacity, len(h)
        if not self.shared:
            head = min(size, self.capacity - first)
            for tail, x in ((self.state.tail_h, h), (self.state.tail_t, t)):
                tail[self.row, first : first + head] = x[:head]
                if head < size:
                    tail[self.row, : size - head] = x[head:]
            return
        columns = self._columns(self.me[SEEN], size)
        lanes = self.free_lanes(columns)
        self.state.lanes[self.row, columns] = lanes.to(torch.int32)
        self.state.tail_h[lanes, columns] = h.to(self.state.tail_h.dtype)
        self.state.tail_t[lanes, columns] = t.to(self.state.tail_t.dtype)

    def read(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Tokens ``[start, start + size)`` of the document: h ``[size, F]`` and t ``[size, Dt]``."""
        first = start % self.capacity
        if not self.shared and first + size <= self.capacity:
            span = slice(first, first + size)
            return self.state.tail_h[self.row, span], self.state.tail_t[self.row, span]
        columns = self._columns(start, size)
        lanes = self.state.lanes[self.row, columns].long() if self.shared else self.row
        return self.state.tail_h[lanes, columns], self.state.tail_t[lanes, columns]

    def cached(self, index: int) -> Tensor:
        """Room for v ``[C, D]`` of the complete, unwritten chunk ``index`` of the document."""
        places = self.state.tail_v.shape[1] // self.chunk - self.state.spreads
        start = index % places * self.chunk
        return self.state.tail_v[self.row, start : start + self.chunk]

    def _columns(self, start: int, size: int) -> Tensor:
        return torch.arange(start, start + size) % self.capacity

    def free_lanes(self, columns: Tensor) -> Tensor:
        """Per column, this row's own lane, or else the first one that no other row reads there."""
        used = torch.zeros(len(self.table), len(columns), dtype=torch.bool)
        for row, counts in enumerate(self.table):
            start = live_start(counts, self.chunk)
            live = counts[SEEN] - start
            if row == self.row or live == 0:
                continue
            age = (columns - start) % self.capacity
            reads = torch.nonzero(age < live).flatten()
            used[self.state.lanes[row, columns[reads]].long(), reads] = True
        # argmin of bool: the first lane that is not used; there are as many lanes as rows.
        free = used.to(torch.uint8).argmin(0)
        return torch.where(used[self.row], free, self.row)


def append_tokens(
    table: list[list[int]], rows: list[int], state: StateTensors, chunk: int, h: Tensor, t: Tensor
) -> None:
    """Token SEEN of several rows, h ``[m, F]`` and t ``[m, Dt]``, which is counted too.

    The same as one :meth:`RowTail.append` per row, in order, by one copy for all of them.
    """
    columns = [table[row][SEEN] % state.capacity for row in rows]
    lanes = rows if state.lanes.shape[1] == 0 else _take_lanes(table, rows, columns, state, chunk)
    for row in rows:
        table[row][SEEN] += 1
    if lanes == list(range(len(table))) and len(set(columns)) == 1:
        state.tail_h[:, columns[0]] = h
        state.tail_t[:, columns[0]] = t
        return
    where = (torch.tensor(lanes), torch.tensor(columns))
    state.tail_h[where] = h.to(state.tail_h.dtype)
    state.tail_t[where] = t.to(state.tail_t.dtype)


def _take_lanes(
    table: list[list[int]], rows: list[int], columns: list[int], state: StateTensors, chunk: int
) -> list[int]:
    """:meth:`RowTail.free_lanes` of one column per row, in order, by integers alone."""
    capacity = state.capacity
    starts = [live_start(counts, chunk) for counts in table]
    live = [(start, counts[SEEN] - start) for start, counts in zip(starts, table, strict=True)]
    lanes_of = state.lanes[:, columns].t().tolist()
    taken: dict[int, set[int]] = {}
    out = []
    for row, column, lanes in zip(rows, columns, lanes_of, strict=True):
        # A row's own entries of this column lie behind it: what it reads there is not alive.
        used = taken.get(column)
        if used is None:
            used = taken[column] = {
                lane
                for lane, (start, size) in zip(lanes, live, strict=True)
                if (column - start) % capacity < size
            }
        lane = row if row not in used else next(x for x in range(len(table)) if x not in used)
        used.add(lane)
        out.append(lane)
    state.lanes[rows, columns] = torch.tensor(out, dtype=torch.int32)
    return out
