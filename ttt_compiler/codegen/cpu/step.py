"""One call of a running sequence on CPU: every row of the batch advances by T tokens.

The same code serves prefill, chunked prefill and decode, so they agree by construction; of a single token
most is done before Python is asked (:mod:`.native.op`), and :func:`finish_step` does the rest. May be changed
here: what rows of a call share. What a row does is :mod:`.row`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu.gemm import static_apply
from ttt_compiler.codegen.cpu.row import Call, Row
from ttt_compiler.codegen.cpu.tail import append_tokens
from ttt_compiler.codegen.layout import WRITES, StateTensors
from ttt_compiler.codegen.segments import Run, row_runs
from ttt_compiler.spec import SiteSpec

# What stands in ``Step.done`` (operands.cpp).
NOT, KEPT, COMPLETE = range(3)


class Step(NamedTuple):
    """What C++ has done of a call of one token.

    Attributes:
        y: ``[B, 1, D]``: filled for the sequences that are done; if ``base_done``, with the product with W0
            for the others.
        done: of each sequence NOT: nothing but ``y`` has changed for it; KEPT; or COMPLETE: its chunk is
            complete now, but its write has not begun, since it writes nothing, is not finite, or must not go
            where the sequence's matrix is.
        base_done: whether a row needed the product with W0.
    """

    y: Tensor
    done: list[int]
    base_done: bool


def fast_weight_step(
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
    """Advance every sequence of the batch by T tokens; the tensors of ``state`` change in place.

    Args:
        h: ``[B, T, F]``.
        t: ``[B, T, Dt]`` target source.
        w0: ``[D, F]``; bias ``[D]`` or None; conv ``[Dt, 1, K]``; proj ``[Dt, D]`` or None.
        bias: see w0.
        conv: see w0.
        proj: see w0.
        pos: int64 ``[B or 1, T]`` or None; 0 resets the row, a negative position is padding.
        spec: the site's constants.
        state: tables of L >= B rows.
        batch: int64 ``[B]``: which row of the tables is sequence b.

    Returns:
        ``y [B, T, D]``.

    Raises:
        NonFiniteWriteError: a complete chunk holds NaN or Inf and is not skipped. Its write is not made.
        ValueError: the sizes disagree; IndexError: a row is not there. Nothing has changed.
    """
    length = h.shape[1]
    _require_sizes(h, t, w0, bias, conv, proj, pos, state, batch)
    if not len(batch):
        return h.new_empty(0, length, w0.shape[0])
    call = Call(h.contiguous(), t.contiguous(), w0, bias, conv, proj, spec, state, len(batch))
    members = batch.tolist()
    rows = [Row(call, member) for member in members]
    runs = _token_runs(pos, len(members)) if length == 1 else row_runs(pos, len(members), length)
    untouched = all(row.reads_only_w0(r, length) for row, r in zip(rows, runs, strict=True))
    base_done = untouched or (length == 1 and any(map(Row.needs_base, rows, runs)))
    y = h.new_empty(len(members), length, w0.shape[0])
    if base_done:
        # One read of W0 for the whole batch, by the base model's own projection.
        static_apply(h, w0, bias, out=y)
    # Of one token most rows only read their matrix and keep it: they keep them by one copy.
    kept = [b for b, row in enumerate(rows) if length == 1 and row.only_keeps(runs[b][0])]
    if kept:
        if not untouched:
            hs, ys = call.h.unbind(0), y.unbind(0)
            for b in kept:
                rows[b].finish_write()
                if not base_done or rows[b].counts[WRITES]:
                    rows[b].matrix.apply(hs[b], bias, ys[b], base_done=base_done)
        h1, t1 = (x[:, 0] if len(kept) == len(rows) else x[kept, 0] for x in (call.h, call.t))
        append_tokens(call.table, [members[b] for b in kept], state, spec.chunk, h1, t1)
    for b in sorted(set(range(len(rows))).difference(kept)):
        _advance(rows[b], runs[b], y[b], b, base_done=base_done, apply=not untouched)
    state.rows.copy_(torch.tensor(call.table, dtype=state.rows.dtype))
    return y


def finish_step(
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
    step: Step,
) -> Tensor:
    """:func:`fast_weight_step` of one token, of which C++ has done ``step``."""
    call = Call(h.contiguous(), t.contiguous(), w0, bias, conv, proj, spec, state, len(batch))
    rows = [Row(call, member) for member in batch.tolist()]
    runs = _token_runs(pos, len(rows))
    for row, done in zip(rows, step.done, strict=True):
        if done == COMPLETE:
            row.begin_write()
    for b, done in enumerate(step.done):
        if done == NOT:
            _advance(rows[b], runs[b], step.y[b], b, base_done=step.base_done, apply=True)
    state.rows.copy_(torch.tensor(call.table, dtype=state.rows.dtype))
    return step.y


def _require_sizes(
    h: Tensor,
    t: Tensor,
    w0: Tensor,
    bias: Tensor | None,
    conv: Tensor,
    proj: Tensor | None,
    pos: Tensor | None,
    state: StateTensors,
    batch: Tensor,
) -> None:
    """A compiled graph never fails this; broadcasting would make numbers of what somebody else passes."""
    members, (d, f), width = len(batch), state.w.shape[1:], state.tail_t.shape[2]
    length = h.shape[1] if h.dim() == 3 else 0
    of_pos = (1, length) if pos is not None and len(pos) == 1 else (members, length)
    for name, x, expected in (
        ("h", h, (members, length, f)),
        ("t", t, (members, length, width)),
        ("w0", w0, (d, f)),
        ("bias", bias, (d,)),
        ("conv", conv, (width, 1, conv.shape[-1])),
        ("proj", proj, (width, d)),
        ("pos", pos, of_pos),
    ):
        if x is not None and tuple(x.shape) != expected:
            want = list(expected)
            raise ValueError(f"fast_weight_step: {name} is {list(x.shape)}, for this state it must be {want}")
    rows, given = state.rows.shape[0], batch.tolist()
    if not all(0 <= b < rows for b in given) or len(set(given)) < members:
        raise IndexError(
            f"fast_weight_step: batch is {given}, but the state has {rows} rows, each of them once"
        )


def _advance(row: Row, runs: list[Run], y: Tensor, b: int, *, base_done: bool, apply: bool) -> None:
    """Feed all tokens of sequence b."""
    for run in runs:
        row.advance(run, row.call.h[b], row.call.t[b], y, base_done=base_done, apply=apply)
    row.catch_up()


_NEXT = [Run(0, 1, fresh=False, padding=False)]
_FIRST = [Run(0, 1, fresh=True, padding=False)]
_PADDING = [Run(0, 1, fresh=False, padding=True)]


def _token_runs(pos: Tensor | None, batch: int) -> list[list[Run]]:
    """:func:`row_runs` of one token per row, without tensors of each row."""
    if pos is None:
        return [_NEXT] * batch
    runs = [_FIRST if p == 0 else _PADDING if p < 0 else _NEXT for p in pos[:, 0].tolist()]
    return runs if len(runs) == batch else runs * batch
