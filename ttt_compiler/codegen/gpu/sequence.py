"""A call of several tokens: one scan over what was not written yet and what is new.

The layout of :mod:`.plan` is gathered into one buffer, v of its complete chunks is computed, and the scan
kernel applies and writes in one pass. With R = 0 it leaves the final state in the row's slot. With R > 0 it
reads further chunks than may be written, so that the write is a second, shorter pass. A call costs
``4 (T + open) D F`` FLOPs, where ``open < C + R`` tokens of the ring are applied once more. May be changed
here: how it is computed; what, is :mod:`ttt_compiler.codegen.cpu.step`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen.gpu.plan import Plan, plan_sequence
from ttt_compiler.codegen.gpu.schedules import (
    block_for,
    groups_for,
    programs_per_row,
    tile_for,
    warps_for,
    write_tile_for,
)
from ttt_compiler.codegen.gpu.values import Values, chunk_values
from ttt_compiler.codegen.kernels.append_tail import append_tail
from ttt_compiler.codegen.kernels.base_apply import base_apply
from ttt_compiler.codegen.kernels.chunk_scan import Carried, chunk_scan_partial
from ttt_compiler.codegen.kernels.gather_tokens import gather_tokens
from ttt_compiler.codegen.kernels.own_slot import MOVE, STAGE, STAY, own_slot
from ttt_compiler.codegen.kernels.row_tables import take_lanes, take_slots
from ttt_compiler.codegen.kernels.write_chunks import Keys, write_chunks
from ttt_compiler.codegen.layout import (
    CACHED,
    CLIPPED,
    DONE,
    FACTORED,
    LAST,
    PEAK,
    SEEN,
    SKIPPED,
    SLOT,
    TOTAL,
    WRITES,
    StateTensors,
)
from ttt_compiler.spec import SiteSpec


def sequence_step(
    h: Tensor,
    t: Tensor,
    w0: Tensor,
    bias: Tensor | None,
    conv: Tensor,
    proj: Tensor | None,
    pos: Tensor | None,
    spec: SiteSpec,
    state: StateTensors,
    batch: Tensor,
) -> Tensor:
    """Arguments and result of :func:`ttt_compiler.codegen.cpu.step.fast_weight_step`."""
    count, length, chunk = h.shape[0], h.shape[1], spec.chunk
    if pos is None:
        pos = torch.ones(1, 1, dtype=torch.int64, device=h.device)
    plan = plan_sequence(pos.expand(count, length), state, batch, chunk)
    rows = state.rows[batch]

    keys, square = gather_tokens(state.tail_h, h, plan.source, clean=True)
    values = _values(plan, keys, square, t, w0, conv, proj, spec, state)
    if spec.lr == 0.0:
        still = torch.ones((), dtype=torch.bool, device=h.device)
    else:
        still = ~conv.any()

    written = plan.due & values.finite & ~still
    decays = spec.rule.decay != 1.0
    changes = written.any(1)
    if decays:
        changes = changes | (plan.goes_on & plan.due.any(1) & ~still)
    # Factored rows that are read here become a matrix, which needs a slot of the row's own.
    slots = take_slots(state.rows, batch, changes | plan.reads_factored)

    _prepare(plan, rows, slots, state, w0, keys)
    if spec.lr == 0.0:
        # The base model's own projection, bit for bit. Nothing was or will be written.
        y = torch.nn.functional.linear(h, w0, bias)
    else:
        table = plan.table
        if decays:
            table = torch.where(still, plan.documents, table)
        y = _scan(plan, table, changes, slots, keys, values, w0, spec, state)
        y = _outputs(plan, y, square, h, w0, bias)

    _keep_tail(plan, h, t, state, batch, chunk)
    _count(plan, values, written, still, slots, rows, state, batch)
    return y


def _values(
    plan: Plan,
    keys: Tensor,
    square: Tensor,
    t: Tensor,
    w0: Tensor,
    conv: Tensor,
    proj: Tensor | None,
    spec: SiteSpec,
    state: StateTensors,
) -> Values:
    at = plan.starts[:, :, None] + torch.arange(spec.chunk, device=t.device)
    flat, shape = at.flatten(1), at.shape
    source = torch.where(plan.complete[:, :, None], plan.source.gather(1, flat).view(shape), -1)
    targets, _ = gather_tokens(state.tail_t, t, source.flatten(1), clean=False)
    hidden = None
    if spec.rule.limited:
        rows = torch.arange(len(at), device=t.device)[:, None]
        hidden = keys[rows, flat].unflatten(1, shape[1:])
    squares = square.gather(1, flat).view(shape)
    return chunk_values(targets.unflatten(1, shape[1:]), hidden, squares, w0, conv, proj, spec)


def _prepare(plan: Plan, rows: Tensor, slots: Tensor, state: StateTensors, w0: Tensor, keys: Tensor) -> None:
    """Slots of their own for rows that will write, and matrices for rows that were factored."""
    moves = plan.reads & (slots != rows[:, SLOT])
    action = torch.where(plan.reads_factored, STAGE, torch.where(moves, MOVE, STAY))
    jobs = torch.stack([action, rows[:, SLOT], slots, rows[:, FACTORED]], 1)
    programs = programs_per_row(keys)
    staged = own_slot(state.w, state.tail_h.dtype, jobs, programs)
    zero = torch.zeros_like(slots)
    target = torch.where(plan.reads_factored, slots, -1)
    unfold = torch.stack([zero, zero, zero, zero - 1, target, rows[:, FACTORED], zero, zero], 1)
    no_v = keys.new_empty(len(slots), 1, w0.shape[0])
    write_chunks(state.w, w0, Keys(keys), no_v, staged, unfold, 1, write_tile_for(keys), programs)


def _scan(
    plan: Plan,
    table: Tensor,
    changes: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Values,
    w0: Tensor,
    spec: SiteSpec,
    state: StateTensors,
) -> Tensor:
    """``[B, S, D]`` in fp32 of the whole layout; W of the rows that change."""
    count, size, _ = keys.shape
    chunk, tile = spec.chunk, tile_for(keys, spec.rule.decay)
    revocable = state.capacity > chunk
    # v where the chunks stand; what belongs to no complete chunk is sent behind the layout.
    at = plan.starts[:, :, None] + torch.arange(chunk, device=keys.device)
    at = torch.where(plan.complete[:, :, None], at, size).flatten(1)
    v = values.v.new_zeros(count, size + 1, w0.shape[0])
    v = v.scatter_(1, at[:, :, None].expand(-1, -1, w0.shape[0]), values.v.flatten(1, 2))
    init = Carried(state.w, torch.where(plan.reads, slots, -1).to(torch.int32))
    final = Carried(state.w, torch.where(changes, slots, -1).to(torch.int32))
    partial = chunk_scan_partial(
        keys,
        keys,
        v[:, :size],
        w0,
        table,
        chunk,
        tile,
        groups_for(keys, tile, w0.shape[0]),
        decay=spec.rule.decay,
        init=init,
        final=None if revocable else final,
    )
    if revocable:
        index = torch.arange(count, device=keys.device)
        zero = torch.zeros_like(index)
        source = torch.where(plan.goes_on, slots, -1)
        due = plan.due.sum(1)
        target = torch.where(changes, slots, -1)
        jobs = torch.stack([index, plan.base, due, source, target, zero, zero + 1, plan.base], 1)
        write_chunks(
            state.w,
            w0,
            Keys(keys),
            v,
            None,
            jobs,
            chunk,
            write_tile_for(keys),
            programs_per_row(keys),
            decay=spec.rule.decay,
        )
    return partial.sum(0)


def _outputs(
    plan: Plan, scanned: Tensor, square: Tensor, h: Tensor, w0: Tensor, bias: Tensor | None
) -> Tensor:
    """Back to where the tokens stand in the call; padding gets its product with W0."""
    width = scanned.shape[2]
    y = scanned.gather(1, plan.place_of[:, :, None].expand(-1, -1, width))
    # The scan saw zeros in their place.
    broken = ~square.gather(1, plan.place_of).isfinite()
    y = torch.where(broken[:, :, None], float("nan"), y)
    flat = h.reshape(-1, h.shape[2])
    block = block_for(h)
    need = plan.padding.flatten()
    base = base_apply(flat, w0, need, tokens=block, outer=block, inner=block, shares=1, warps=warps_for(h))[
        0
    ].view_as(y)
    y = torch.where(plan.padding[:, :, None], base, y)
    if bias is not None:
        y = y + bias
    return y.to(h.dtype)


def _keep_tail(plan: Plan, h: Tensor, t: Tensor, state: StateTensors, batch: Tensor, chunk: int) -> None:
    ring = state.capacity
    column = torch.arange(ring, device=h.device)
    if state.lanes.shape[1] == 0:
        lane = batch[:, None]
    else:
        lane = take_lanes(state.rows, state.lanes, batch, plan.keeps, plan.token >= 0, chunk)
        table = torch.where(plan.token >= 0, lane, state.lanes[batch].long())
        state.lanes.index_copy_(0, batch, table.to(torch.int32))
    entry = lane * ring + column
    append_tail(h, state.tail_h, plan.token, entry)
    append_tail(t, state.tail_t, plan.token, entry)


def _count(
    plan: Plan,
    values: Values,
    written: Tensor,
    still: Tensor,
    slots: Tensor,
    rows: Tensor,
    state: StateTensors,
    batch: Tensor,
) -> None:
    """Counters and norms after the call."""
    counts = [torch.where(plan.fresh, 0, column) for column in rows.unbind(1)]
    counts[SEEN], counts[DONE] = plan.seen, plan.done
    counts[WRITES] = counts[WRITES] + written.sum(1)
    counts[FACTORED] = torch.where(plan.reads_factored, 0, counts[FACTORED])
    counts[SLOT] = slots
    counts[SKIPPED] = counts[SKIPPED] + (plan.due & ~values.finite & ~still).sum(1)
    counts[CLIPPED] = counts[CLIPPED] + (written & values.clipped).sum(1)
    # v of waiting chunks is computed anew, from the ring, by whoever needs it next.
    counts[CACHED] = torch.zeros_like(slots)
    state.rows.index_copy_(0, batch, torch.stack(counts, 1))

    norms = torch.where(plan.fresh[:, None], 0.0, state.norms[batch])
    made = torch.where(written, values.norm, 0.0)
    index = torch.arange(1, made.shape[1] + 1, device=made.device)
    latest = torch.where(written, index, 0).amax(1)
    last = made.gather(1, (latest[:, None] - 1).clamp(min=0))[:, 0]
    new = [norms[:, 0]] * 3
    new[LAST] = torch.where(latest > 0, last, norms[:, LAST])
    new[PEAK] = torch.maximum(norms[:, PEAK], made.amax(1))
    new[TOTAL] = norms[:, TOTAL] + made.sum(1)
    state.norms.index_copy_(0, batch, torch.stack(new, 1))
