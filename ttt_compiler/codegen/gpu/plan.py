"""What a call of several tokens does to every row: counters, and where every token stands.

Integers of the size ``[B, C + R + T]`` at most, by plain torch operations whose shapes depend on shapes
alone. A row's tokens are laid out as ``[unwritten tokens of the ring | new tokens | nothing]``, without the
padding between them, so that chunks of its first document begin at multiples of C. May be changed here: the
bookkeeping; what it must come to is :mod:`ttt_compiler.codegen.cpu.step`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_compiler.codegen.kernels.chunk_table import PADDING, chunk_table
from ttt_compiler.codegen.layout import DONE, FACTORED, SEEN, WRITES, StateTensors


@dataclass(frozen=True)
class Plan:
    """Per row b of the batch: place s and complete chunk n of its layout, column a of the ring.

    Attributes:
        padding: bool ``[B, T]``.
        place_of: int64 ``[B, T]``, the place of a new token (0 for padding).
        source: int64 ``[B, S]``, see :func:`~ttt_compiler.codegen.kernels.gather_tokens.gather_tokens`.
        table: int32 ``[B, 2, S + 2]``, chunks of the layout without the nothing behind it.
        documents: the same table with one chunk per document.
        starts: int64 ``[B, N]``, first place of a complete chunk; 0 for those that do not exist.
        complete: bool ``[B, N]``, whether it exists.
        due: bool ``[B, N]``, whether this call has to deal with it: of the last document, and R tokens old.
        base: int64 ``[B]``, first place of the last document.
        fresh: bool ``[B]``, whether a document starts in the call.
        reads: bool ``[B]``, whether the first tokens read the row's slot.
        reads_factored: bool ``[B]``, whether what they read there are factored rows.
        goes_on: bool ``[B]``, whether the last document goes on from what the slot holds.
        seen: int64 ``[B]``, SEEN after the call.
        done: int64 ``[B]``, DONE after the call.
        token: int64 ``[B, A]``, the new token that a column of the ring keeps after the call, or -1.
        keeps: bool ``[B, A]``, whether the column keeps an old one.
    """

    padding: Tensor
    place_of: Tensor
    source: Tensor
    table: Tensor
    documents: Tensor
    starts: Tensor
    complete: Tensor
    due: Tensor
    base: Tensor
    fresh: Tensor
    reads: Tensor
    reads_factored: Tensor
    goes_on: Tensor
    seen: Tensor
    done: Tensor
    token: Tensor
    keeps: Tensor


def plan_sequence(pos: Tensor, state: StateTensors, batch: Tensor, chunk: int) -> Plan:
    """The bookkeeping of one call.

    Args:
        pos: int64 ``[B, T]``; 0 starts a document, a negative position is padding.
        state: the site's tensors.
        batch: int64 ``[B]``.
        chunk: C.
    """
    length, ring = pos.shape[1], state.capacity
    size = ring - 1 + length
    device = pos.device
    rows = state.rows[batch]
    column = torch.arange(ring, device=device)
    places = torch.arange(size, device=device)
    tokens = torch.arange(length, device=device)

    padding = pos < 0
    new, starts = ~padding, pos == 0
    rank = new.cumsum(1) - 1
    count = new.sum(1)
    fresh = starts.any(1)
    # A document that starts with the first new token leaves nothing of the ring to be read.
    dropped = (starts & (rank == 0)).any(1)
    old_done = rows[:, DONE]
    live = torch.where(dropped, 0, rows[:, SEEN] - old_done * chunk)
    place_of = torch.where(new, live[:, None] + rank, size)

    entries = (old_done[:, None] * chunk + column[: ring - 1]) % ring
    lane = batch[:, None] if state.lanes.shape[1] == 0 else state.lanes[batch].long().gather(1, entries)
    source = torch.full((len(batch), size + 1), -1, device=device, dtype=torch.int64)
    kept = column[: ring - 1] < live[:, None]
    source[:, : ring - 1] = torch.where(kept, length + lane * ring + entries, -1)
    source = source.scatter(1, place_of, tokens.expand_as(pos))[:, :size].contiguous()
    kind = torch.where(source < 0, -1, 1)
    positions = torch.cat([kind, kind[:, :1]], 1).scatter(1, place_of, torch.where(starts, 0, 1))[:, :size]

    table = _without_padding(chunk_table(positions, chunk), size)
    whole = _without_padding(chunk_table(positions, size + 1), size)
    total = live + count
    base = torch.where(positions == 0, places, 0).amax(1)
    goes_on = ~fresh & (rows[:, WRITES] > 0)
    seen = torch.where(fresh, total - base, rows[:, SEEN] + count)
    first = torch.where(fresh, 0, old_done)

    # Complete chunks of the layout, in order.
    n = size // chunk
    index = torch.arange(size + 1, device=device)
    begin, end = table[:, 0, : size + 1].long(), table[:, 0, 1:].long()
    full = (end - begin == chunk) & (index < table[:, 0, size + 1 :])
    number = torch.where(full, full.cumsum(1) - 1, n)
    chunk_starts = torch.zeros(len(batch), n + 1, device=device, dtype=torch.int64)
    chunk_starts = chunk_starts.scatter(1, number, torch.where(full, begin, 0))[:, :n]
    complete = torch.arange(n, device=device) < full.sum(1, keepdim=True)
    ends = first[:, None] * chunk + chunk_starts + chunk - base[:, None]
    last = complete & (chunk_starts >= base[:, None])
    due = last & (seen[:, None] - ends >= ring - chunk)
    done = first + due.sum(1)

    # Column a keeps the youngest token p with p mod A = a, if the document has it and it is not written.
    youngest = (seen[:, None] - 1) - (seen[:, None] - 1 - column) % ring
    stays = youngest >= (done * chunk)[:, None]
    where = base[:, None] + youngest - first[:, None] * chunk
    at = source.gather(1, where.clamp(0, size - 1))
    is_new = at < length
    return Plan(
        padding=padding,
        place_of=torch.where(new, place_of, 0),
        source=source,
        table=table,
        documents=whole,
        starts=chunk_starts,
        complete=complete,
        due=due,
        base=base,
        fresh=fresh,
        reads=~dropped & (count > 0) & (rows[:, WRITES] > 0),
        reads_factored=~dropped & (count > 0) & (rows[:, FACTORED] > 0),
        goes_on=goes_on,
        seen=seen,
        done=done,
        token=torch.where(stays & is_new & (at >= 0), at, -1),
        keeps=stays & ~is_new,
    )


def _without_padding(table: Tensor, size: int) -> Tensor:
    """What stands behind a row's tokens is no chunk; ``chunk_table`` ends every row at the last place."""
    table[:, 0, size + 1] -= (table[:, 1, : size + 1] == PADDING).sum(1).to(torch.int32)
    return table
