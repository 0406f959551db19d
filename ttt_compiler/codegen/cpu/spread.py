"""The write of a chunk over many steps of one token, so that none of them waits for it.

When the last token of a chunk arrives, v of its last tokens is made, and the write begins: each following
step reads the chunk's tokens in factored form where the write has not come to yet, and writes as many columns
of W as bring it to its end after S steps (:func:`~ttt_compiler.codegen.layout.spread_tokens`). v is made
while the chunk fills, in units of tokens and columns that are always the same ones, so v does not depend on
when it was made, bit for bit; nor does W on when its columns were written. May be changed here: the units.
When one is due says ``native/decode.cpp``; the steps themselves are in C++, and so a write begins only where
there is a compiler.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from ctypes import Array, c_int64

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu import native
from ttt_compiler.codegen.cpu.native.values import values_of
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
)
from ttt_compiler.spec import SiteSpec

# A unit of v is 32 tokens and an eighth of P's columns, so that P is read once for 32 tokens: reading it is
# most of what v costs. Of a chunk's last tokens, which come late, it is 4 tokens and all columns.
TOKENS, PARTS, LAST_TOKENS = 32, 8, 4


def units(chunk: int) -> int:
    """How many units of v a chunk has."""
    return _wide(chunk) * PARTS + -(-(chunk - _wide(chunk) * TOKENS) // LAST_TOKENS)


def unit(index: int, chunk: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Tokens of a chunk, and columns of ``width``, from and to, of a unit."""
    last = index - _wide(chunk) * PARTS
    if last < 0:
        first, part = index // PARTS * TOKENS, index % PARTS
        return (first, first + TOKENS), (width * part // PARTS, width * (part + 1) // PARTS)
    first = _wide(chunk) * TOKENS + last * LAST_TOKENS
    return (first, min(first + LAST_TOKENS, chunk)), (0, width)


@functools.cache
def unit_ends(chunk: int) -> Array[c_int64]:
    """Of every unit the token behind its last one."""
    return (c_int64 * units(chunk))(*(unit(i, chunk, PARTS)[0][1] for i in range(units(chunk))))


def _wide(chunk: int) -> int:
    """Spans of ``TOKENS`` in front of the last ones."""
    return max(0, (chunk - TOKENS) // TOKENS)


def tokens_ahead(spec: SiteSpec) -> int:
    """How many tokens behind its own v of a token sees."""
    return spec.conv_kernel - 1 - spec.conv_kernel // 2


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
        me, sums, ahead = self.me, self.state.norms[self.row], tokens_ahead(self.spec)
        start = me[DONE] * self.chunk
        there = me[SEEN] - start
        for index in range(me[VALUES], min(me[VALUES] + count, units(self.chunk))):
            (first, stop), columns = unit(index, self.chunk, self.spec.d_model)
            if min(stop + ahead, self.chunk) > there:
                return
            low, high = max(0, first - self.spec.conv_kernel // 2), min(stop + ahead, self.chunk)
            h, t = self.tail.read(start + low, high - low)
            norms = values_of(
                *(t, h[first - low : stop - low], first - low, conv, proj),
                *(self.spec.write_scale, self.values[:, first:stop], columns),
            )
            so_far = sums[OF_V:].tolist() if index else (0.0, 0.0)
            sums[OF_V:] = sums.new_tensor([math.hypot(*x) for x in zip(so_far, norms, strict=True)])
            me[VALUES] = index + 1

    def overdue(self) -> int:
        """Units of v that are more than one for each token which the chunk still lacks."""
        there = self.me[SEEN] - self.me[DONE] * self.chunk
        return max(0, units(self.chunk) - self.me[VALUES] - (self.chunk - there))

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
