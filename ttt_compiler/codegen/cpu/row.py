"""One sequence of a call of a running sequence on CPU: apply, append to the chunk tail, write what is full.

A chunk is written once its end is R tokens old (R = 0: at once); until then it acts in factored form, so that
up to R tokens can be taken back exactly. Where the state has room, the write of a chunk that a single token
completes is spread over the next tokens (:mod:`.spread`); any other call finishes it first. May be changed
here: how it is computed. The layout is :mod:`ttt_compiler.codegen.layout`.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu import native
from ttt_compiler.codegen.cpu.controls import limited
from ttt_compiler.codegen.cpu.conv import convolve
from ttt_compiler.codegen.cpu.gemm import project, static_apply
from ttt_compiler.codegen.cpu.native import panels
from ttt_compiler.codegen.cpu.native.squares import norm as frobenius
from ttt_compiler.codegen.cpu.native.units import units
from ttt_compiler.codegen.cpu.slots import RowMatrix, add_factored
from ttt_compiler.codegen.cpu.spread import Spread, finish_write
from ttt_compiler.codegen.cpu.tail import RowTail
from ttt_compiler.codegen.cpu.workspaces import workspace
from ttt_compiler.codegen.layout import (
    CACHED,
    CLIPPED,
    COLUMNS,
    DONE,
    FACTORED,
    LAST,
    NOT_AHEAD,
    PEAK,
    SEEN,
    SKIPPED,
    TOTAL,
    VALUES,
    WRITES,
    StateTensors,
    factored_limit,
)
from ttt_compiler.codegen.reference import write_limit
from ttt_compiler.codegen.segments import Run
from ttt_compiler.errors import NonFiniteWriteError
from ttt_compiler.spec import SiteSpec


class Call:
    """What all rows of one call share."""

    def __init__(
        self,
        h: Tensor,
        t: Tensor,
        w0: Tensor,
        bias: Tensor | None,
        conv: Tensor,
        proj: Tensor | None,
        spec: SiteSpec,
        state: StateTensors,
        batch: int,
    ) -> None:
        self.h, self.t, self.w0, self.bias = h, t, w0, bias
        self.conv, self.proj, self.spec, self.state = conv, proj, spec, state
        self.table: list[list[int]] = state.rows.tolist()
        self.revocable = state.revocable(spec)
        self.factored_limit = factored_limit(spec.d_model, spec.d_ff, batch)
        spreads = state.spreads and not self.revocable and native.function("units", h.dtype) is not None
        if spreads or (spec.rule.decay != 1.0 and state.tail_v.dtype != state.w.dtype):
            # Rows that become a matrix cannot do so over many steps, since they lie where it will. And decay
            # multiplies what is stored, where a narrow factored row would round each step away.
            self.factored_limit = 0
        self.spreads = spreads
        self._limit: Tensor | None = None

    @functools.cached_property
    def still(self) -> bool:
        """Whether nothing is ever written. Reads all taps, so most single tokens never ask."""
        return self.spec.lr == 0.0 or not bool(self.conv.any())

    def limit(self) -> Tensor | None:
        """Largest norm of a write; it reads W0, so it is found only when something is written."""
        if self.spec.rule.limited and self._limit is None:
            self._limit = write_limit(self.w0, self.spec.rule)
        return self._limit

    def values(self, t: Tensor) -> Tensor:
        """v of a complete chunk, in a workspace. t ``[C, Dt]``."""
        v = workspace("step.conv", tuple(t.shape), t.dtype)
        # eta belongs to the taps: there it costs K multiplications a channel.
        convolve(t, self.conv[:, 0].t() * self.spec.write_scale, v)
        if self.proj is None:
            return v
        out = workspace("step.v", (t.shape[0], self.spec.d_model), t.dtype)
        if self.projection is not None and panels.apply(v, self.projection, None, out):
            return out
        return project(v, self.proj, out, "step.proj")

    @functools.cached_property
    def projection(self) -> Tensor | None:
        """P in the order in which it is multiplied, where that pays: for more than one chunk."""
        proj, chunks = self.proj, self.h.shape[0] * self.h.shape[1] // self.spec.chunk
        shape = panels.shape_of_turned(proj) if proj is not None and chunks > 1 else None
        if proj is None or shape is None or proj.dtype != self.t.dtype:
            return None
        made = workspace("step.p", shape, proj.dtype)
        panels.pack_turned(proj, made)
        return made


class Row:
    """One sequence's view of the call."""

    def __init__(self, call: Call, index: int) -> None:
        self.call, self.index = call, index
        self.counts = call.table[index]
        self.chunk = call.spec.chunk

    @functools.cached_property
    def matrix(self) -> RowMatrix:
        """W of this row."""
        call = self.call
        stored = call.state.tail_h.dtype
        return RowMatrix(call.table, self.index, call.state.w, call.w0, call.h.dtype, stored)

    @functools.cached_property
    def tail(self) -> RowTail:
        """Its tokens that are not written."""
        return RowTail(self.call.table, self.index, self.call.state, self.chunk)

    @functools.cached_property
    def spread(self) -> Spread:
        """Its write that is spread over steps."""
        return Spread(self.call.table, self.index, self.call.state, self.call.spec)

    def finish_write(self) -> None:
        """A write that is in progress comes to its end, for what only a step in C++ can read before."""
        call = self.call
        if call.state.spreads:
            finish_write(call.table, self.index, call.state, call.spec, call.w0)

    def begin_write(self) -> None:
        """After a step in C++ that has completed a chunk, and left this to us."""
        call, counts = self.call, self.counts
        if not call.still:
            self.spread.make_values(call.conv, call.proj, len(units(self.chunk)))
            norms = self.spread.norms()
            if self._is_finite(*norms):
                self.matrix.own_slot()
                self.spread.begin()
                self._record(None, math.prod(norms))
                return
            counts[SKIPPED] += 1
        counts[DONE] += 1
        counts[VALUES] = 0

    def catch_up(self) -> None:
        """After a longer call: make v that single tokens would have no time for before the chunk's end."""
        call, counts = self.call, self.counts
        if not call.spreads or counts[FACTORED] or counts[VALUES] == NOT_AHEAD:
            return
        if (count := self.spread.overdue()) and not call.still:
            self.spread.make_values(call.conv, call.proj, count)

    def reads_only_w0(self, runs: list[Run], length: int) -> bool:
        """Whether no token reads a written matrix or a complete chunk, from before this call or of it."""
        fresh = bool(runs) and runs[0].fresh
        if self.counts[WRITES] > 0 and not fresh:
            return False
        open_tokens = 0 if fresh else self.counts[SEEN] - self.counts[DONE] * self.chunk
        return (len(runs) <= 1 and open_tokens + length <= self.chunk) or self.call.still

    def needs_base(self, runs: list[Run]) -> bool:
        """Whether a single token's output contains its product with W0."""
        return runs[0].fresh or runs[0].padding or self.matrix.reads_base

    def only_keeps(self, run: Run) -> bool:
        """Whether a single token completes no chunk, and none is waiting or due."""
        open_tokens = self.counts[SEEN] - self.counts[DONE] * self.chunk
        return not (run.fresh or run.padding) and open_tokens < self.chunk - 1

    def advance(self, run: Run, h: Tensor, t: Tensor, y: Tensor, *, base_done: bool, apply: bool) -> None:
        """Feed the tokens of ``run``; fills ``y[run.start:run.stop]`` when ``apply``."""
        call, counts, chunk = self.call, self.counts, self.chunk
        if run.padding:
            if apply and not base_done:
                y[run.start : run.stop] = static_apply(h[run.start : run.stop], call.w0, call.bias)
            return
        if run.fresh:
            self._begin()
        else:
            self.finish_write()
        i = run.start
        end = counts[SEEN] + run.stop - run.start
        while i < run.stop:
            self._commit(end)
            seen = counts[SEEN]
            size = min(run.stop - i, chunk - seen % chunk)
            rows = slice(i, i + size)
            if apply:
                self._apply(h[rows], y[rows], base_done)
            if size == chunk and seen == counts[DONE] * chunk and self._is_due(end):
                counts[SEEN] += size
                self._write(h[rows], t[rows], end)
            else:
                self.tail.append(h[rows], t[rows])
                counts[SEEN] += size
            i += size
        self._commit(end)

    def _begin(self) -> None:
        for column in (SEEN, DONE, SKIPPED, CLIPPED, CACHED, *range(COLUMNS, len(self.counts))):
            self.counts[column] = 0
        self.matrix.reset()
        self.call.state.norms[self.index].zero_()

    def _apply(self, h: Tensor, y: Tensor, base_done: bool) -> None:
        """What is written, and what complete chunks that are not written yet add to it."""
        matrix, counts, rule = self.matrix, self.counts, self.call.spec.rule
        matrix.apply(h, self.call.bias, y, base_done=base_done)
        waiting = range(counts[DONE], counts[SEEN] // self.chunk)
        if not waiting or self.call.still:
            return
        if rule.decay != 1.0 and counts[WRITES]:
            base = static_apply(h, self.call.w0, self.call.bias)
            y.sub_(base).mul_(rule.decay ** len(waiting)).add_(base)
        for index in waiting:
            v = self._waiting_values(index)
            if v is not None:
                keys, _ = self.tail.read(index * self.chunk, self.chunk)
                add_factored(h * rule.decay ** (waiting[-1] - index), keys, v.to(h.dtype), y)

    def _waiting_values(self, index: int) -> Tensor | None:
        """v of a complete chunk that is not written yet; None when its write will be skipped."""
        place = self.tail.cached(index)
        if index >= self.counts[DONE] + self.counts[CACHED]:
            h, t = self.tail.read(index * self.chunk, self.chunk)
            v = self._prepared(h, t)[0]
            # A row of NaN says that the chunk is skipped: v of one that is not, is finite.
            place.fill_(float("nan")) if v is None else place.copy_(v)
            self.counts[CACHED] = index + 1 - self.counts[DONE]
        return None if bool(place[0, 0].isnan()) else place

    def _is_due(self, end: int) -> bool:
        """Whether the next chunk will be R tokens old when the row has seen ``end`` tokens."""
        return end - (self.counts[DONE] + 1) * self.chunk >= self.call.revocable

    def _commit(self, end: int) -> None:
        """Write the complete chunks that are due."""
        counts, chunk = self.counts, self.chunk
        while (counts[DONE] + 1) * chunk <= counts[SEEN] and self._is_due(end):
            self._write(*self.tail.read(counts[DONE] * chunk, chunk), end)

    def _prepared(self, h: Tensor, t: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, float]:
        """Of a chunk: v under the update controls (None: skipped), h, the write's exact norm, its bound."""
        call, rule = self.call, self.call.spec.rule
        # Under autocast the tail is kept in the weights' dtype and multiplied in the operands'.
        h, t = h.to(call.h.dtype), t.to(call.t.dtype)
        v, norm = limited(call.values(t), h, call.limit(), rule.keys == "unit")
        # A finite norm proves that every entry is finite, in one pass; the product of two such in fp32 is.
        of_v, of_h = frobenius(v), frobenius(h)
        return (v, h, norm, of_v * of_h) if self._is_finite(of_v, of_h) else (None, h, None, of_v)

    @property
    def _is_ahead(self) -> bool:
        """Whether steps, or the end of a longer call, have made some of v of the next chunk."""
        return self.call.spreads and self.counts[VALUES] > 0

    def _made_ahead(self, h: Tensor) -> tuple[Tensor | None, Tensor, None, float]:
        """:meth:`_prepared` of a chunk whose v is there in part; there are no controls then."""
        call = self.call
        self.spread.make_values(call.conv, call.proj, len(units(self.chunk)))
        norms, h = self.spread.norms(), h.to(call.h.dtype)
        v = self.spread.values.t().to(h.dtype).contiguous() if self._is_finite(*norms) else None
        return v, h, None, math.prod(norms)

    def _is_finite(self, *norms: float) -> bool:
        """Whether a chunk may be written; else its write is skipped, or the call is lost."""
        if all(map(math.isfinite, norms)):
            return True
        if self.call.spec.rule.on_nonfinite == "skip":
            return False
        raise NonFiniteWriteError(
            f"{self.call.spec.key}: chunk {self.counts[DONE]} would write NaN or Inf into the fast weights. "
            "The write was not made, but this call is lost: restore the session from a snapshot or reset() "
            'it, and lower lr, check the adapter, set max_write_norm, or pass on_nonfinite="skip"'
        )

    def _write(self, h: Tensor, t: Tensor, end: int) -> None:
        """Deal with the next complete chunk, h ``[C, F]``, t ``[C, Dt]``."""
        call, counts = self.call, self.counts
        rule = call.spec.rule
        if not call.still:
            v, h, norm, bound = self._made_ahead(h) if self._is_ahead else self._prepared(h, t)
            if v is None:
                counts[SKIPPED] += 1
                self.matrix.forget(rule.decay)
            else:
                final = end // self.chunk * self.chunk
                self.matrix.write(v, h, rule.decay, factored=final <= call.factored_limit)
                self._record(norm, bound)
        counts[DONE] += 1
        counts[CACHED] = max(0, counts[CACHED] - 1)
        if call.state.spreads:
            counts[VALUES] = 0

    def _record(self, norm: Tensor | None, bound: float) -> None:
        """Note the write's norm: exact under a limit, else the bound ``||v|| ||h||``."""
        norms = self.call.state.norms[self.index]
        if norm is None:
            written = norms.new_tensor(bound)
        else:
            limit = self.call.limit()
            assert limit is not None
            self.counts[CLIPPED] += int(norm > limit)
            written = torch.minimum(norm, limit.to(norm.dtype))
        norms[LAST] = written
        norms[PEAK] = torch.maximum(norms[PEAK], written.to(norms.dtype))
        norms[TOTAL] += written
