"""One sequence's fast weights as plain tensors: what a file, or memory beside the tables, keeps of them.

Only what counts is kept: the unwritten tokens, and the matrix or its factored rows. A write that is in
progress is kept as it stands, so that whatever goes on with it does so bit for bit. May be changed here: what
is kept, together with the version of the snapshot format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu.spread import completed
from ttt_compiler.codegen.cpu.tail import RowTail
from ttt_compiler.codegen.layout import (
    CACHED,
    CLIPPED,
    COLUMNS,
    DONE,
    FACTORED,
    LEFT,
    NORMS,
    SEEN,
    SKIPPED,
    SLOT,
    VALUES,
    WIDE_COLUMNS,
    WRITES,
    factored_capacity,
    factored_rows,
    live_start,
    spread_tokens,
)
from ttt_compiler.runtime.layer_parts import LONGEST
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.spec import SiteSpec, state_dtype

Row = dict[str, Tensor]


def export_row(state: FastWeightState, key: str, sequence: int) -> Row:
    """A site's state of one sequence; the tensors are views where they can be.

    Returns:
        ``rows [8]``, ``norms [3]``, ``tail_h [n, F]``, ``tail_t [n, Dt]``; and ``w [D, F]``, or the factored
        ``keys [m, F]`` and ``values [m, D]``, when something was written. While a write is in progress
        ``rows`` is ``[10]``, ``n`` counts its chunk, and ``writing [D, C]`` is its v.
    """
    spec = next(s for s in state.specs if s.key == key)
    site, row = state.sites[key], int(state.batch[sequence])
    counts = site.rows[row].tolist()
    start = live_start(counts, spec.chunk)
    tokens = torch.arange(start, counts[SEEN], device=state.device) % site.capacity
    lanes = site.lanes[row, tokens].long() if site.lanes.shape[1] else row
    writing = site.spreads and counts[LEFT] > 0
    table = site.rows[row, : WIDE_COLUMNS if writing else COLUMNS].clone()
    table[SLOT] = table[CACHED] = 0
    out = {
        "rows": table,
        "norms": site.norms[row, :NORMS].clone(),
        "tail_h": site.tail_h[lanes, tokens],
        "tail_t": site.tail_t[lanes, tokens],
    }
    if writing:
        out["writing"] = site.spread_values(row, spec.chunk)
    slot = site.w[counts[SLOT]]
    if counts[FACTORED]:
        out["keys"], out["values"] = factored_rows(slot, site.tail_h.dtype, counts[FACTORED])
    elif counts[WRITES]:
        out["w"] = slot
    if writing and counts[WRITES] == 1:
        # What the first write has not reached is W0, and the slot holds what another sequence left there.
        out["w"] = slot.clone()
        out["w"][:, -counts[LEFT] :] = 0
    return out


def row_layout(
    spec: SiteSpec, dtype: torch.dtype, counts: list[int], revocable: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
    """Shapes and dtypes that a row with these counters must have; None when they contradict each other."""
    if len(counts) not in (COLUMNS, WIDE_COLUMNS) or min(counts) < 0 or counts[SLOT] or counts[CACHED]:
        return None
    writing = len(counts) == WIDE_COLUMNS
    if writing and not _may_write(counts, spec):
        return None
    seen, done, writes, factored = counts[SEEN], counts[DONE], counts[WRITES], counts[FACTORED]
    open_tokens = seen - done * spec.chunk
    fits = 0 <= open_tokens < spec.chunk + revocable and seen <= LONGEST
    fits = fits and writes + counts[SKIPPED] <= done and counts[CLIPPED] <= writes
    full = factored in (0, writes * spec.chunk) and factored <= factored_capacity(spec.d_model, spec.d_ff)
    if not fits or not full:
        return None
    acc, kept = state_dtype(dtype), seen - live_start(counts, spec.chunk)
    out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "rows": ((len(counts),), torch.int64),
        "norms": ((NORMS,), acc),
        "tail_h": ((kept, spec.d_ff), dtype),
        "tail_t": ((kept, spec.d_target), dtype),
    }
    if writing:
        out["writing"] = ((spec.d_model, spec.chunk), dtype)
    if factored:
        out["keys"], out["values"] = ((factored, spec.d_ff), dtype), ((factored, spec.d_model), dtype)
    elif writes:
        out["w"] = ((spec.d_model, spec.d_ff), acc)
    return out


def _may_write(counts: list[int], spec: SiteSpec) -> bool:
    """Whether a write can be in progress with these counters."""
    since = counts[SEEN] - counts[DONE] * spec.chunk
    fits = counts[DONE] > 0 and counts[WRITES] > 0 and not counts[FACTORED] and not counts[VALUES]
    return fits and 0 < counts[LEFT] <= spec.d_ff and 0 <= since < spread_tokens(spec)


def finished_row(row: Mapping[str, Tensor], spec: SiteSpec, w0: Tensor) -> Row:
    """The same with no write in progress, for tables without room; w0 ``[D, F]`` is the slow weight."""
    out = dict(row)
    if "writing" not in out:
        return out
    counts, chunk = out["rows"].tolist(), spec.chunk
    w = completed(out["w"], counts, out.pop("writing"), out["tail_h"][:chunk], w0)
    out |= {"w": w, "rows": out["rows"][:COLUMNS]}
    return out | {name: out[name][chunk:] for name in ("tail_h", "tail_t")}


def import_row(
    state: FastWeightState,
    spec: SiteSpec,
    sequence: int,
    given: Mapping[str, Tensor],
    weight: Callable[[SiteSpec], Tensor] | None = None,
) -> None:
    """Put what :func:`export_row` gave into a sequence that has not begun, bit for bit.

    A write in progress is finished if these tables have no room for one, for which ``weight`` gives W0
    ``[D, F]``; between tables that are made alike it is not needed.
    """
    if "writing" in given and not state.sites[spec.key].spreads:
        assert weight is not None, "these tables have no room for a write in progress"
        given = finished_row(given, spec, weight(spec))
    # A fork that shares these tables reads slots that are free here.
    state.own()
    site, row = state.sites[spec.key], int(state.batch[sequence])
    counts = given["rows"].tolist()
    taken = {r[SLOT] for i, r in enumerate(site.rows.tolist()) if i != row and r[WRITES]}
    slot = int(site.rows[row, SLOT])
    if slot in taken:
        slot = next(s for s in range(len(site.rows)) if s not in taken)
    columns = torch.arange(live_start(counts, spec.chunk), counts[SEEN]) % site.capacity
    if site.lanes.shape[1]:
        # Rows that began as forks of this one may still read its lane.
        lanes = RowTail(site.rows.tolist(), row, site, spec.chunk).free_lanes(columns)
        site.lanes[row, columns] = lanes.to(torch.int32)
    else:
        lanes = torch.full_like(columns, row)
    site.tail_h[lanes, columns] = given["tail_h"].to(state.device)
    site.tail_t[lanes, columns] = given["tail_t"].to(state.device)
    if counts[FACTORED]:
        keys, values = factored_rows(site.w[slot], site.tail_h.dtype, counts[FACTORED])
        keys.copy_(given["keys"])
        values.copy_(given["values"])
    elif counts[WRITES]:
        site.w[slot].copy_(given["w"])
    site.norms[row, :NORMS] = given["norms"].to(state.device)
    if "writing" in given:
        site.spread_values(row, spec.chunk).copy_(given["writing"])
    table = torch.zeros(site.rows.shape[1], dtype=torch.int64)
    table[: len(counts)] = given["rows"]
    table[SLOT] = slot
    site.rows[row] = table.to(state.device)
