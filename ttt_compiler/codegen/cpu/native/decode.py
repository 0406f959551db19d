"""A step of one token by a single call, for rows that read their matrix and keep the token.

Between two chunk borders a decode step is one read of W and one entry of the tail per row: in Python that is
a loop over rows that costs more than the read of a small W. A write that is in progress adds what it has not
reached yet, and reaches further. May be changed here: what is called; :mod:`ttt_compiler.codegen.cpu.step`
has the same in Python and does all the rest.
"""

from __future__ import annotations

import ctypes
from array import array
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from ttt_compiler.codegen.cpu import native
from ttt_compiler.codegen.cpu.native.units import ahead_of
from ttt_compiler.codegen.layout import StateTensors, spread_tokens
from ttt_compiler.spec import SiteSpec, state_dtype

_SOME, _NEEDS_BASE, _BORDER, _IS_BASE = 1, 2, 4, 8
_NOT, _COMPLETE = 0, 2
# Where y stands among the operands.
_Y = 2


class Step(NamedTuple):
    """What a call has done.

    Attributes:
        y: ``[B, 1, D]``: filled for the sequences that are done; if ``base_done``, with the product with W0
            for the others.
        base_done: whether a row needed the product with W0.
        rest: sequences that are not done: nothing but ``y`` has changed for them.
        complete: sequences that are done and whose chunk is complete now, but whose write has not begun:
            it writes nothing, is not finite, or must not go where the sequence's matrix is.
    """

    y: Tensor
    base_done: bool
    rest: list[int]
    complete: list[int]


def decode(
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
    members, d, (rows, columns) = len(h), w0.shape[0], state.rows.shape
    y = h.new_empty(members, 1, d)
    if members == 0:
        return Step(y, False, [], [])
    done = bytearray(members)
    ahead = ahead_of(state, conv, proj, spec)
    operands = array(
        "q",
        (
            h.data_ptr(),
            t.data_ptr(),
            y.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            w0.data_ptr() if w0.stride(1) == 1 else 0,
            state.w.data_ptr(),
            state.rows.data_ptr(),
            batch.data_ptr(),
            0 if pos is None else pos.data_ptr(),
            ctypes.addressof(ctypes.c_char.from_buffer(done)),
            members,
            1 if pos is None else len(pos),
            rows,
            columns,
            w0.stride(0),
            spread_tokens(spec) if state.spreads else 0,
        ),
    )
    addresses = operands.buffer_info()[0], ahead.buffer_info()[0]
    result = function(*addresses, 0)
    base_done = bool(result & (_NEEDS_BASE | _IS_BASE))
    if base_done:
        # One read of W0 for all rows, by the base model's own projection: static_apply's product, in one
        # call, since each costs microseconds after a matrix went through the cache.
        y = functional.linear(h, w0, bias)
    if result & _NEEDS_BASE:
        operands[_Y] = y.data_ptr()
        result = function(*addresses, 1)
    left = [b for b in range(members) if done[b] == _NOT] if result & _SOME else []
    complete = [b for b in range(members) if done[b] == _COMPLETE] if result & _BORDER else []
    return Step(y, base_done, left, complete)
