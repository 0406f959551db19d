"""Tables of one site: how large they are, how they are made, and how rows of them are chosen or grow.

May be changed here: what is allocated, together with ``memory_sites.FORMULA``. Where the numbers stand is
:mod:`ttt_compiler.codegen.layout`; what happens to sequences is :mod:`.state`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_compiler.codegen.layout import (
    CACHED,
    COLUMNS,
    LEFT,
    NORMS,
    NOT_AHEAD,
    SEEN,
    SLOT,
    VALUES,
    WIDE_COLUMNS,
    WIDE_NORMS,
    StateTensors,
    cached_rows,
    live_start,
    spread_tokens,
)
from ttt_compiler.spec import SiteSpec, state_dtype


def bytes_per_sequence(
    specs: Sequence[SiteSpec],
    dtype: torch.dtype,
    *,
    revocable: int = 0,
    shared_lanes: bool = False,
    spread: bool = False,
) -> int:
    """Bytes that one sequence's state takes, known before anything is allocated.

    Per site ``D F a + (C + R + S)(F + Dt) e + C ceil((R + S) / C) D e + m a + 8 n``, and ``4 (C + R + S)``
    more where rows may share entries; a and e are the bytes of one number of the state and of the model,
    m = 3 and n = 8, or 5 and 10 where writes may be spread over S tokens (R = 0 then). 8 more per sequence
    say which row it is.
    """
    acc, element = state_dtype(dtype).itemsize, dtype.itemsize
    total = 8
    for s in specs:
        tail, cached, columns, norms = sizes(s, revocable, spread)
        total += s.d_model * s.d_ff * acc + tail * (s.d_ff + s.d_target) * element
        total += cached * s.d_model * element
        total += norms * acc + columns * 8 + (4 * tail if shared_lanes else 0)
    return total


def has_room_to_spread(device: torch.device, revocable: int) -> bool:
    """Whether a new state has room to spread writes over steps: on CPU, where all tokens are final."""
    return device.type == "cpu" and revocable == 0


def zeros(
    spec: SiteSpec,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    revocable: int,
    shared_lanes: bool,
    spread: bool,
) -> StateTensors:
    """Tables of ``rows`` sequences that have not begun; see ``FastWeightState.zeros``."""
    acc, (tail, cached, columns, norms) = state_dtype(dtype), sizes(spec, revocable, spread)
    table = torch.zeros(rows, columns, dtype=torch.int64, device=device)
    table[:, SLOT] = torch.arange(rows)
    lanes = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
    return StateTensors(
        w=torch.zeros(rows, spec.d_model, spec.d_ff, dtype=acc, device=device),
        tail_h=torch.zeros(rows, tail, spec.d_ff, dtype=dtype, device=device),
        tail_t=torch.zeros(rows, tail, spec.d_target, dtype=dtype, device=device),
        tail_v=torch.zeros(rows, cached, spec.d_model, dtype=dtype, device=device),
        lanes=lanes.repeat(1, tail if shared_lanes else 0),
        rows=table,
        norms=torch.zeros(rows, norms, dtype=acc, device=device),
    )


def sizes(spec: SiteSpec, revocable: int, spread: bool) -> tuple[int, int, int, int]:
    """Of a site's tables: columns of the tail, rows of ``tail_v``, columns of ``rows`` and of ``norms``."""
    tail, cached = spec.chunk + revocable, cached_rows(spec.chunk, revocable)
    room = spread_tokens(spec) if spread else 0
    if not room:
        return tail, cached, COLUMNS, NORMS
    return tail + room, cached + spec.chunk, WIDE_COLUMNS, WIDE_NORMS


def selected(site: StateTensors, chosen: Tensor) -> StateTensors:
    """Tables whose first rows are the ``chosen`` ones; grown when there are more of them than rows."""
    rows, count = len(site.rows), len(chosen)
    if site.lanes.shape[1] == 0:
        own = torch.arange(rows, dtype=torch.int32, device=chosen.device)[:, None]
        site = site._replace(lanes=own.repeat(1, site.capacity))
    if count > rows:
        site = StateTensors(*(torch.cat([x, x.new_zeros(count - rows, *x.shape[1:])]) for x in site))
    table, lanes, norms = (torch.zeros_like(x) for x in (site.rows, site.lanes, site.norms))
    table[:, SLOT] = torch.arange(len(table))
    table[:count], lanes[:count], norms[:count] = site.rows[chosen], site.lanes[chosen], site.norms[chosen]
    # v of waiting chunks is kept per row, and rows have changed places.
    table[:, CACHED] = 0
    tail_v = site.tail_v
    if site.spreads:
        # Beams change places at every token: v that is dropped each time is not worth making.
        table[:count, VALUES] = NOT_AHEAD
        table[table[:, LEFT] > 0, VALUES] = 0
        if bool(table[:, LEFT].any()):
            # A write in progress goes on with the v that it began with.
            tail_v = torch.zeros_like(tail_v)
            tail_v[:count] = site.tail_v[chosen]
    return site._replace(tail_v=tail_v, rows=table, lanes=lanes, norms=norms)


def with_tail(site: StateTensors, spec: SiteSpec, revocable: int) -> StateTensors:
    """The same state with R = ``revocable``: every row gets its unwritten tokens into a lane of its own.

    Tokens that can be taken back keep their writes from being spread, so there is room for that only while
    one is in progress.
    """
    rows, old = len(site.rows), site.capacity
    writing = site.spreads and bool(site.rows[:, LEFT].any())
    made = (rows, site.tail_h.dtype, site.tail_h.device, revocable, site.lanes.shape[1] > 0, writing)
    grown = zeros(spec, *made)
    for row, counts in enumerate(site.rows.tolist()):
        tokens = torch.arange(live_start(counts, spec.chunk), counts[SEEN], device=site.rows.device)
        lanes = site.lanes[row, tokens % old].long() if site.lanes.shape[1] else row
        new = tokens % grown.capacity
        grown.tail_h[row, new] = site.tail_h[lanes, tokens % old]
        grown.tail_t[row, new] = site.tail_t[lanes, tokens % old]
    if writing:
        grown.tail_v[:, -spec.chunk :] = site.tail_v[:, -spec.chunk :]
    table = site.rows[:, : grown.rows.shape[1]].clone()
    table[:, CACHED] = 0
    return grown._replace(w=site.w, rows=table, norms=site.norms[:, : grown.norms.shape[1]].clone())
