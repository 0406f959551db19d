"""A step of one token by a single call, for rows that only read their matrix and keep the token.

Between two chunk borders a decode step is one read of W and one entry of the tail per row: in Python that is
a loop over rows that costs more than the read of a small W. A write that is in progress adds what it has not
reached yet, and reaches further. May be changed here: what is called; :mod:`ttt_compiler.codegen.cpu.step`
has the same in Python and does all the rest.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ttt_compiler.codegen.cpu import native
from ttt_compiler.codegen.cpu.spread import tokens_ahead, unit_ends
from ttt_compiler.codegen.layout import StateTensors, factored_limit, spread_tokens
from ttt_compiler.spec import SiteSpec, state_dtype

_SOME, _NEEDS_BASE, _WORK, _IS_BASE = 1, 2, 4, 8
_BORDER = 255
# Elements of a matrix from which on more than one thread reads it.
_MANY = 1 << 16


class Step(NamedTuple):
    """What a call has done.

    Attributes:
        y: ``[B, 1, D]``: filled for the sequences that are done; if ``base_done``, with the product with W0
            for the others.
        base_done: whether a row needed the product with W0.
        rest: sequences that are not done: nothing but ``y`` has changed for them.
        work: of sequences that are done, how many units of v are to be made; None for those whose chunk is
            complete.
    """

    y: Tensor
    base_done: bool
    rest: list[int]
    work: dict[int, int | None]


def decode(
    h: Tensor,
    t: Tensor,
    w0: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    spec: SiteSpec,
    state: StateTensors,
    batch: Tensor,
) -> Step | None:
    """One token of each sequence, h ``[B, 1, F]`` and t ``[B, 1, Dt]``; see ``fast_weight_step``.

    Returns:
        None, and nothing has changed, where there is no compiler or the operands are not such.
    """
    dtype = h.dtype
    function = native.function("decode", dtype)
    if (
        function is None
        or not dtype == t.dtype == w0.dtype == state.tail_h.dtype == state.tail_t.dtype
        or state.w.dtype != state_dtype(dtype)
        or (bias is not None and (bias.dtype != dtype or not bias.is_contiguous()))
        or not all(x.is_contiguous() for x in (*state, batch))
    ):
        return None
    h, t = h.contiguous(), t.contiguous()
    if pos is not None:
        pos = pos.long().contiguous()
    (members, _, f), d, (rows, columns) = h.shape, w0.shape[0], state.rows.shape
    y = h.new_empty(members, 1, d)
    if members == 0:
        return Step(y, False, [], {})
    done = (ctypes.c_uint8 * members)()
    ends = unit_ends(spec.chunk)
    spread = spread_tokens(spec) if state.spreads else 0
    operands = (h.data_ptr(), t.data_ptr())
    rest = (
        None if bias is None else bias.data_ptr(),
        w0.data_ptr() if w0.stride(1) == 1 else None,
        state.w.data_ptr(),
        state.tail_h.data_ptr(),
        state.tail_t.data_ptr(),
        state.tail_v.data_ptr(),
        state.lanes.data_ptr() if state.lanes.shape[1] else None,
        state.rows.data_ptr(),
        batch.data_ptr(),
        None if pos is None else pos.data_ptr(),
        ctypes.addressof(done),
        members,
        1 if pos is None else len(pos),
        rows,
        columns,
        d,
        f,
        t.shape[2],
        spec.chunk,
        state.capacity,
        w0.stride(0),
        state.tail_v.stride(0),
        spread,
        factored_limit(d, f, members),
        tokens_ahead(spec),
        ctypes.addressof(ends),
        len(ends),
        torch.get_num_threads() if d * f >= _MANY else 1,
    )
    result = function(*operands, y.data_ptr(), *rest, 0)
    base_done = bool(result & (_NEEDS_BASE | _IS_BASE))
    if base_done:
        # One read of W0 for all rows, by the base model's own projection: static_apply's product, in one
        # call, since each costs microseconds after a matrix went through the cache.
        y = functional.linear(h, w0, bias)
    if result & _NEEDS_BASE:
        result = function(*operands, y.data_ptr(), *rest, 1)
    left = [b for b in range(members) if not done[b]] if result & _SOME else []
    work = {b: None if x == _BORDER else x - 1 for b, x in enumerate(done) if x > 1} if result & _WORK else {}
    return Step(y, base_done, left, work)
