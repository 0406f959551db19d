"""One sequence's fast weights as plain tensors: what a file, or memory beside the tables, keeps of them.

Only what counts is kept: the unwritten tokens, and the matrix or its factored rows. May be changed here: what
is kept, together with the version of the snapshot format.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu.tail import RowTail
from ttt_compiler.codegen.layout import (
    CACHED,
    CLIPPED,
    COLUMNS,
    DONE,
    FACTORED,
    SEEN,
    SKIPPED,
    SLOT,
    WRITES,
    factored_capacity,
    factored_rows,
)
from ttt_compiler.runtime.layer_parts import LONGEST
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.spec import SiteSpec, state_dtype

Row = dict[str, Tensor]


def export_row(state: FastWeightState, key: str, sequence: int) -> Row:
    """A site's state of one sequence; the tensors are views where they can be.

    Returns:
        ``rows [8]``, ``norms [3]``, ``tail_h [n, F]``, ``tail_t [n, Dt]``; and ``w [D, F]``, or the factored
        ``keys [m, F]`` and ``values [m, D]``, when something was written.
    """
    spec = next(s for s in state.specs if s.key == key)
    site, row = state.sites[key], int(state.batch[sequence])
    counts = site.rows[row].tolist()
    tokens = torch.arange(counts[DONE] * spec.chunk, counts[SEEN], device=state.device) % site.capacity
    lanes = site.lanes[row, tokens].long() if site.lanes.shape[1] else row
    table = site.rows[row].clone()
    table[SLOT] = table[CACHED] = 0
    out = {
        "rows": table,
        "norms": site.norms[row].clone(),
        "tail_h": site.tail_h[lanes, tokens],
        "tail_t": site.tail_t[lanes, tokens],
    }
    slot = site.w[counts[SLOT]]
    if counts[FACTORED]:
        out["keys"], out["values"] = factored_rows(slot, site.tail_h.dtype, counts[FACTORED])
    elif counts[WRITES]:
        out["w"] = slot
    return out


def row_layout(
    spec: SiteSpec, dtype: torch.dtype, counts: list[int], revocable: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
    """Shapes and dtypes that a row with these counters must have; None when they contradict each other."""
    if len(counts) != COLUMNS or min(counts) < 0 or counts[SLOT] or counts[CACHED]:
        return None
    seen, done, writes, factored = counts[SEEN], counts[DONE], counts[WRITES], counts[FACTORED]
    open_tokens = seen - done * spec.chunk
    fits = 0 <= open_tokens < spec.chunk + revocable and seen <= LONGEST
    fits = fits and writes + counts[SKIPPED] <= done and counts[CLIPPED] <= writes
    full = factored in (0, writes * spec.chunk) and factored <= factored_capacity(spec.d_model, spec.d_ff)
    if not fits or not full:
        return None
    acc = state_dtype(dtype)
    out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "rows": ((COLUMNS,), torch.int64),
        "norms": ((3,), acc),
        "tail_h": ((open_tokens, spec.d_ff), dtype),
        "tail_t": ((open_tokens, spec.d_target), dtype),
    }
    if factored:
        out["keys"], out["values"] = ((factored, spec.d_ff), dtype), ((factored, spec.d_model), dtype)
    elif writes:
        out["w"] = ((spec.d_model, spec.d_ff), acc)
    return out


def import_row(state: FastWeightState, spec: SiteSpec, sequence: int, given: Mapping[str, Tensor]) -> None:
    """Put what :func:`export_row` gave into a sequence that has not begun, bit for bit."""
    # A fork that shares these tables reads slots that are free here.
    state.own()
    site, row = state.sites[spec.key], int(state.batch[sequence])
    counts = given["rows"].tolist()
    taken = {r[SLOT] for i, r in enumerate(site.rows.tolist()) if i != row and r[WRITES]}
    slot = int(site.rows[row, SLOT])
    if slot in taken:
        slot = next(s for s in range(len(site.rows)) if s not in taken)
    columns = torch.arange(counts[DONE] * spec.chunk, counts[SEEN]) % site.capacity
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
    site.norms[row] = given["norms"].to(state.device)
    table = given["rows"].clone()
    table[SLOT] = slot
    site.rows[row] = table.to(state.device)
