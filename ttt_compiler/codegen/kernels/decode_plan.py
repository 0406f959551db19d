"""What one token does to every row, decided by one small program per row.

A program reads the counters of all rows and writes its own row's plan beside them, so programs need not wait
for one another; the counters change at the end of the step (:mod:`.decode_finish`). Slots and lanes are
chosen by the rules of :mod:`.row_tables`. May be changed here: the columns of the plan, together with the
kernels that read it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_compiler.codegen.kernels.own_slot import MOVE, STAGE, STAY
from ttt_compiler.codegen.kernels.row_tables import take_lanes, take_slots
from ttt_compiler.codegen.layout import CACHED, DONE, FACTORED, SEEN, SLOT, WRITES, StateTensors

# Columns of the plan, int64. What applies the token:
READ = 0  # slot of a dense matrix, -1: none
FOLDED = 1  # factored tokens that the token reads
FROM = 2  # slot that holds them
NEED_BASE = 3  # whether the product with W0 is a part of the output
WAIT_FIRST = 4  # first token of the complete chunks that are not written
WAITING = 5  # how many they are
# What happens to the state:
FIRST = 6  # 1: a document starts
SEEN_AFTER = 7  # -1 for padding, which changes nothing
DUE = 8  # 1: chunk DONE is dealt with
FORM = 9
SLOT_AFTER = 10
UNCACHED = 11  # first complete chunk whose v is not in ``tail_v``
MEMBER = 12
WROTE = 13  # whether a matrix, and not W0, was written before
COLUMNS = 14

# Forms of a write.
NONE, DENSE, ROWS = range(3)
# Beyond that many rows a program's tables do not fit its registers.
MOST_ROWS = 128


@triton.jit
def decode_plan_kernel(
    rows,
    lanes,
    batch,
    pos,
    still,
    plan,
    slot_jobs,
    write_jobs,
    token,
    entry,
    L,
    B,
    A,
    stride_pos,
    CHUNK: tl.constexpr,
    ROW_LIMIT: tl.constexpr,
    DECAYS: tl.constexpr,
    HAS_LANES: tl.constexpr,
    HAS_POS: tl.constexpr,
    LP: tl.constexpr,
    BP: tl.constexpr,
):
    """One row of the batch; see :func:`decode_plan`."""
    i_b = tl.program_id(0)
    me = tl.load(batch + i_b)
    frozen = tl.load(still).to(tl.int32)
    # Every row of the tables, and whether it is in the batch, with a first token or padding.
    r = tl.arange(0, LP)
    in_l = r < L
    r64 = r.to(tl.int64)
    seen = tl.load(rows + r64 * 8, mask=in_l, other=0)
    done = tl.load(rows + r64 * 8 + 1, mask=in_l, other=0)
    writes = tl.load(rows + r64 * 8 + 2, mask=in_l, other=0)
    slot = tl.load(rows + r64 * 8 + 4, mask=in_l, other=-1).to(tl.int32)
    j = tl.arange(0, BP)
    members = tl.load(batch + j, mask=j < B, other=-1)
    if HAS_POS:
        at = tl.load(pos + j.to(tl.int64) * stride_pos, mask=j < B, other=-1)
        p = tl.load(pos + i_b.to(tl.int64) * stride_pos)
    else:
        at = tl.where(j < B, 1, -1).to(tl.int64)
        p = tl.cast(1, tl.int64)
    mine = members[None, :] == r[:, None]
    active = tl.max((mine & (at >= 0)[None, :]).to(tl.int32), 1) != 0
    first = tl.max((mine & (at == 0)[None, :]).to(tl.int32), 1) != 0
    seen = tl.where(first, 0, seen)
    done = tl.where(first, 0, done)
    due = active & (seen + 1 - (done + 1) * CHUNK >= A - CHUNK)
    writer = due & (frozen == 0)

    # Slots: see row_tables.take_slots.
    reader = in_l & (writes > 0) & (writer == 0)
    same = slot[:, None] == slot[None, :]
    beaten = same & (reader | (writer[None, :] & (r[None, :] > r[:, None])))
    moves = writer & (tl.max(beaten.to(tl.int32), 1) != 0)
    holds = reader | (writer & (moves == 0))
    held = tl.max(((r[:, None] == slot[None, :]) & holds[None, :]).to(tl.int32), 1) != 0
    free = (in_l & (held == 0)).to(tl.int32)
    rank = tl.sum((moves & (r < me)).to(tl.int32), 0)
    found = (free != 0) & (tl.cumsum(free, 0) - 1 == rank)

    is_me = r == me
    i_move = tl.max((moves & is_me).to(tl.int32), 0)
    my_slot = tl.load(rows + me * 8 + 4)
    there = tl.where(i_move != 0, tl.sum(tl.where(found, r, 0), 0).to(tl.int64), my_slot)

    # This row.
    s = tl.load(rows + me * 8)
    d = tl.load(rows + me * 8 + 1)
    n = tl.load(rows + me * 8 + 2)
    folded = tl.load(rows + me * 8 + 3)
    cached = tl.load(rows + me * 8 + 7)
    begins = p == 0
    padding = p < 0
    s = tl.where(begins, 0, s)
    d = tl.where(begins, 0, d)
    n = tl.where(begins, 0, n)
    folded = tl.where(begins, 0, folded)
    cached = tl.where(begins, 0, cached)
    is_due = (padding == 0) & (s + 1 - (d + 1) * CHUNK >= A - CHUNK)
    makes = is_due & (frozen == 0)
    waiting = tl.where(padding | (frozen != 0), 0, s // CHUNK - d)
    dense = (n > 0) & (folded == 0)
    fits = (s + 1) // CHUNK * CHUNK <= ROW_LIMIT
    form = tl.where(makes, tl.where((dense == 0) & fits, 2, 1), 0)
    need = padding | (dense == 0)
    if DECAYS:
        need = need | (waiting > 0)

    out = plan + i_b.to(tl.int64) * 14
    tl.store(out, tl.where(dense & (padding == 0), my_slot, -1))
    tl.store(out + 1, tl.where(padding, 0, folded))
    tl.store(out + 2, my_slot)
    tl.store(out + 3, need.to(tl.int64))
    tl.store(out + 4, d * CHUNK)
    tl.store(out + 5, waiting)
    tl.store(out + 6, begins.to(tl.int64))
    tl.store(out + 7, tl.where(padding, -1, s + 1))
    tl.store(out + 8, is_due.to(tl.int64))
    tl.store(out + 9, form)
    tl.store(out + 10, there)
    tl.store(out + 11, d + cached)
    tl.store(out + 12, me)
    tl.store(out + 13, (n > 0).to(tl.int64))

    # A write to a matrix: factored rows are set aside first, a shared matrix is copied.
    out = slot_jobs + i_b.to(tl.int64) * 4
    copies = (i_move != 0) & dense
    action = tl.where((form == 1) & (folded > 0), 2, tl.where((form == 1) & copies, 1, 0))
    tl.store(out, action.to(tl.int64))
    tl.store(out + 1, my_slot)
    tl.store(out + 2, there)
    tl.store(out + 3, folded)
    out = write_jobs + i_b.to(tl.int64) * 8
    tl.store(out, me)
    tl.store(out + 1, d * CHUNK)
    tl.store(out + 2, is_due.to(tl.int64))
    tl.store(out + 3, tl.where(dense, there, -1))
    tl.store(out + 4, tl.where(form == 1, there, -1))
    tl.store(out + 5, folded)
    tl.store(out + 7, tl.cast(0, tl.int64))

    # The ring: see row_tables.take_lanes. A row's own entry of the column is not alive.
    column = s % A
    lane = me
    if HAS_LANES:
        age = (column - done * CHUNK) % A
        age = tl.where(age < 0, age + A, age)
        alive = in_l & (age < seen - done * CHUNK)
        read = tl.load(lanes + r64 * A + column, mask=in_l, other=-1)
        used = tl.max(((r[:, None] == read[None, :]) & alive[None, :]).to(tl.int32), 1)
        new = active & (seen % A == column)
        moved = new & (used != 0)
        open_lane = (in_l & (used == 0) & (new == 0)).to(tl.int32)
        rank = tl.sum((moved & (r < me)).to(tl.int32), 0)
        found = (open_lane != 0) & (tl.cumsum(open_lane, 0) - 1 == rank)
        i_move = tl.max((moved & is_me).to(tl.int32), 0)
        lane = tl.where(i_move != 0, tl.sum(tl.where(found, r, 0), 0).to(tl.int64), me)
        if p >= 0:
            # Others may read this entry now: of a row that does not read the column, they ignore it.
            tl.store(lanes + me * A + column, lane.to(tl.int32))
    tl.store(token + i_b, tl.where(padding, -1, 0).to(tl.int64))
    tl.store(entry + i_b, lane * A + column)


def decode_plan(
    state: StateTensors,
    batch: Tensor,
    pos: Tensor | None,
    still: Tensor,
    chunk: int,
    row_limit: int,
    *,
    decays: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch.

    Args:
        state: the site's tensors; of these only the lanes change.
        batch: int64 ``[B]``.
        pos: int64 ``[B or 1, 1]`` or None.
        still: bool, 0-dim: whether nothing is ever written.
        chunk: C.
        row_limit: tokens up to which a row stays factored.
        decays: whether gamma is not 1.

    Returns:
        The plan ``[B, 14]``; jobs of ``own_slot`` and of ``write_chunks``, but for WRITTEN; and ``[B, 1]``
        each, token and entry of ``append_tail``.
    """
    count, size = len(batch), len(state.rows)
    new = [torch.empty(count, n, dtype=torch.int64, device=batch.device) for n in (COLUMNS, 4, 8, 1, 1)]
    plan, slot_jobs, write_jobs, token, entry = new
    decode_plan_kernel[(count,)](
        state.rows,
        state.lanes,
        batch,
        pos,
        still,
        plan,
        slot_jobs,
        write_jobs,
        token,
        entry,
        size,
        count,
        state.capacity,
        0 if pos is None or len(pos) == 1 else pos.stride(0),
        CHUNK=chunk,
        ROW_LIMIT=row_limit,
        DECAYS=decays,
        HAS_LANES=state.lanes.shape[1] > 0,
        HAS_POS=pos is not None,
        LP=triton.next_power_of_2(max(size, 2)),
        BP=triton.next_power_of_2(max(count, 2)),
        num_warps=4,
    )
    return plan, slot_jobs, write_jobs, token, entry


def naive_decode_plan(
    state: StateTensors,
    batch: Tensor,
    pos: Tensor | None,
    still: Tensor,
    chunk: int,
    row_limit: int,
    *,
    decays: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the kernel computes, row by row."""
    count, ring = len(batch), state.capacity
    at = torch.ones(count, dtype=torch.int64) if pos is None else pos[:, 0].expand(count)
    table = state.rows.clone()
    table[batch] = torch.where((at == 0)[:, None] & (torch.arange(8) != SLOT), 0, table[batch])
    plan = torch.zeros(count, COLUMNS, dtype=torch.int64)
    makes = torch.zeros(count, dtype=torch.bool)
    columns = torch.arange(ring)
    new, keeps = (torch.zeros(count, ring, dtype=torch.bool) for _ in range(2))
    for b, (member, p) in enumerate(zip(batch.tolist(), at.tolist(), strict=True)):
        row = table[member].tolist()
        dense = row[WRITES] > 0 and row[FACTORED] == 0
        due = p >= 0 and row[SEEN] + 1 - (row[DONE] + 1) * chunk >= ring - chunk
        waiting = 0 if p < 0 or bool(still) else row[SEEN] // chunk - row[DONE]
        makes[b] = due and not bool(still)
        rows_fit = not dense and (row[SEEN] + 1) // chunk * chunk <= row_limit
        plan[b, READ] = row[SLOT] if dense and p >= 0 else -1
        plan[b, FOLDED] = 0 if p < 0 else row[FACTORED]
        plan[b, FROM], plan[b, MEMBER] = row[SLOT], member
        plan[b, NEED_BASE] = p < 0 or not dense or (decays and waiting > 0)
        plan[b, WAIT_FIRST], plan[b, WAITING] = row[DONE] * chunk, waiting
        plan[b, FIRST], plan[b, SEEN_AFTER] = p == 0, -1 if p < 0 else row[SEEN] + 1
        plan[b, DUE], plan[b, UNCACHED] = due, row[DONE] + row[CACHED]
        plan[b, FORM] = NONE if not makes[b] else ROWS if rows_fit else DENSE
        plan[b, WROTE] = row[WRITES] > 0
        new[b, row[SEEN] % ring] = p >= 0
        keeps[b] = (columns - row[DONE] * chunk) % ring < row[SEEN] - row[DONE] * chunk
    plan[:, SLOT_AFTER] = take_slots(state.rows, batch, makes)
    rows = table[batch]
    moved = (plan[:, SLOT_AFTER] != plan[:, FROM]) & (plan[:, READ] >= 0)
    stage = (plan[:, FORM] == DENSE) & (rows[:, FACTORED] > 0)
    action = torch.where(stage, STAGE, torch.where((plan[:, FORM] == DENSE) & moved, MOVE, STAY))
    slot_jobs = torch.stack([action, plan[:, FROM], plan[:, SLOT_AFTER], rows[:, FACTORED]], 1)
    after = plan[:, SLOT_AFTER]
    dense_rows = (rows[:, WRITES] > 0) & (rows[:, FACTORED] == 0)
    zero = torch.zeros_like(after)
    write_jobs = torch.stack(
        [
            batch,
            plan[:, WAIT_FIRST],
            plan[:, DUE],
            torch.where(dense_rows, after, -1),
            torch.where(plan[:, FORM] == DENSE, after, -1),
            rows[:, FACTORED],
            zero,
            zero,
        ],
        1,
    )
    column = rows[:, SEEN] % ring
    lane = batch
    if state.lanes.shape[1]:
        taken = take_lanes(table, state.lanes, batch, keeps, new, chunk)
        lane = taken.gather(1, column[:, None])[:, 0]
        entries = torch.where(new, taken, state.lanes[batch].long())
        state.lanes.index_copy_(0, batch, entries.to(torch.int32))
    token = torch.where(at < 0, -1, 0)
    return plan, slot_jobs, write_jobs, token[:, None], (lane * ring + column)[:, None]
