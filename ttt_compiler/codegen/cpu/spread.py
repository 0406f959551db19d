"""The write of a chunk over many steps of one token, so that none of them waits for it.

When the last token of a chunk arrives, v of its last tokens is made, and the write begins: each following
step writes as many columns of W as bring it to its end after S steps, and reads the chunk's tokens in
factored form where the write has not come to then (:func:`~ttt_compiler.codegen.layout.spread_tokens`). v
is made while the chunk fills, in units of tokens and columns that are always the same ones, so v does not
depend on when it was made, bit for bit (:mod:`.native.units`); nor does W on when its columns were written.
The steps themselves are in C++ (``native/decode.cpp``), and so a write begins only where there is a
compiler. May be changed here: what a call does that is no such step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu import native
from ttt_compiler.codegen.cpu.native.units import make_units, units
from ttt_compiler.codegen.cpu.slots import RowMatrix
from ttt_compiler.codegen.cpu.tail import RowTail
from ttt_compiler.codegen.layout import (
    DONE,
    LEFT,
    OF_V,
    SEEN,
    SLOT,
    VALUES,
    WRITES,
    StateTensors,
    live_start,
    spread_tokens,
)
from ttt_compiler.spec import SiteSpec


class Spread:
    """The write of one row that is spread, or will be.

    Args:
        table: ``rows`` as Python ints; changed here, written back by the caller.
        row: which of them.
        state: the site's tensors.
        spec: the site's constants.
    """

    def __init__(self, table: list[list[int]], row: int, state: StateTensors, spec: SiteSpec) -> None:
        self.row, self.me = row, table[row]
        self.state, self.spec, self.chunk = state, spec, spec.chunk
        self.tail = RowTail(table, row, state, spec.chunk)

    @property
    def values(self) -> Tensor:
        """v of the chunk, ``[D, C]``."""
        return self.state.spread_values(self.row, self.chunk)

    def make_values(self, conv: Tensor, proj: Tensor | None, count: int) -> None:
        """The next ``count`` units of v of the incomplete or just completed chunk, or as many as there are.

        conv ``[Dt, 1, K]``, proj ``[Dt, D]`` or None.
        """
        make_units(self.me, self.row, self.state, conv, proj, self.spec, count)

    def overdue(self) -> int:
        """Units of v that are more than steps make at their usual pace in the tokens which the chunk lacks.

        That is what they have time for between the end of the write before and the chunk's end.
        """
        chunk, count = self.chunk, len(units(self.chunk))
        lacking = chunk - (self.me[SEEN] - self.me[DONE] * chunk)
        return max(0, count - self.me[VALUES] - lacking * count // (chunk - spread_tokens(self.spec)))

    def norms(self) -> tuple[float, float]:
        """Of v and h of the just completed chunk; one is not finite where a number is not."""
        of_v, of_h = self.state.norms[self.row, OF_V:].tolist()
        return of_v, of_h

    def begin(self) -> None:
        """The chunk counts as written; its columns follow. The slot is this row's own."""
        self.me[DONE] += 1
        self.me[WRITES] += 1
        self.me[LEFT] = self.spec.d_ff
        self.me[VALUES] = 0

    def finish(self, w0: Tensor) -> None:
        """Write the columns that are left, as the steps would have. The slot is this row's own."""
        me, state = self.me, self.state
        function = native.function("spread", state.tail_h.dtype)
        if function is None:
            # It was begun where there is a compiler, and came here in a file.
            state.w[me[SLOT]] = spread_matrix(state, self.row, self.spec, w0)
            me[LEFT] = 0
            return
        base = None
        if me[WRITES] == 1:
            base = w0.detach().to(state.tail_h.dtype)
            base = base if base.stride(1) == 1 else base.contiguous()
        d, f = state.w.shape[1:]
        function(
            state.w[me[SLOT]].data_ptr(),
            None if base is None else base.data_ptr(),
            self.values.data_ptr(),
            state.tail_h.data_ptr(),
            state.lanes[self.row].data_ptr() if self.tail.shared else None,
            0 if base is None else base.stride(0),
            self.row,
            state.capacity,
            f,
            d,
            (me[DONE] - 1) * self.chunk,
            self.chunk,
            f - me[LEFT],
            me[LEFT],
            torch.get_num_threads(),
        )
        me[LEFT] = 0


def finish_write(table: list[list[int]], row: int, state: StateTensors, spec: SiteSpec, w0: Tensor) -> None:
    """A row's write that is in progress, if there is one, comes to its end; w0 ``[D, F]``."""
    if not table[row][LEFT]:
        return
    stored = state.tail_h.dtype
    RowMatrix(table, row, state.w, w0, stored, stored).own_slot()
    Spread(table, row, state, spec).finish(w0)


def spread_matrix(state: StateTensors, row: int, spec: SiteSpec, w0: Tensor) -> Tensor:
    """W ``[D, F]`` of a row whose write is in progress, as it will be; a new tensor."""
    me = state.rows[row].tolist()
    h, _ = RowTail([me] * (row + 1), row, state, spec.chunk).read(live_start(me, spec.chunk), spec.chunk)
    return completed(state.w[me[SLOT]], me, state.spread_values(row, spec.chunk), h, w0)


def completed(w: Tensor, counts: Sequence[int], v: Tensor, h: Tensor, w0: Tensor) -> Tensor:
    """A new tensor, with what a write in progress lacks. w and w0 ``[D, F]``, v ``[D, C]``, h ``[C, F]``."""
    w, first = w.clone(), w.shape[1] - counts[LEFT]
    if counts[WRITES] == 1:
        w[:, first:] = w0.detach().to(w)[:, first:]
    w[:, first:].addmm_(v.to(w), h.to(w)[:, first:])
    return w
