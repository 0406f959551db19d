"""A step of one token by a single call, for rows that only read their matrix and keep the token.

Between two chunk borders a decode step is one read of W and one entry of the tail per row: in Python that is
a loop over rows that costs more than the read of a small W. May be changed here: what is called;
:mod:`ttt_compiler.codegen.cpu.step` has the same in Python and does all the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ttt_compiler.codegen.cpu import native
from ttt_compiler.codegen.layout import StateTensors
from ttt_compiler.spec import SiteSpec, state_dtype

_ALL, _SOME, _NEEDS_BASE = range(3)
# Elements of a matrix from which on more than one thread reads it.
_MANY = 1 << 16


def decode(
    h: Tensor,
    t: Tensor,
    w0: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    spec: SiteSpec,
    state: StateTensors,
    batch: Tensor,
) -> tuple[Tensor | None, bool]:
    """One token of each sequence, h ``[B, 1, F]`` and t ``[B, 1, Dt]``; see ``fast_weight_step``.

    Returns:
        ``y [B, 1, D]``, filled for rows that only read and keep, and for others with the product with W0 if
        one row needs that; None where there is no compiler or the operands are not such. And whether no row
        does more: if so their tokens are kept; else nothing but ``y`` has changed.
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
        return None, False
    h, t = h.contiguous(), t.contiguous()
    if pos is not None:
        pos = pos.long().contiguous()
    (members, _, f), d = h.shape, w0.shape[0]
    y = h.new_empty(members, 1, d)
    operands = (h.data_ptr(), t.data_ptr())
    rest = (
        None if bias is None else bias.data_ptr(),
        state.w.data_ptr(),
        state.tail_h.data_ptr(),
        state.tail_t.data_ptr(),
        state.lanes.data_ptr() if state.lanes.shape[1] else None,
        state.rows.data_ptr(),
        batch.data_ptr(),
        None if pos is None else pos.data_ptr(),
        members,
        1 if pos is None else len(pos),
        state.rows.shape[0],
        d,
        f,
        t.shape[2],
        spec.chunk,
        state.capacity,
        torch.get_num_threads() if d * f >= _MANY else 1,
    )
    result = function(*operands, y.data_ptr(), *rest, 0)
    if result == _NEEDS_BASE:
        # One read of W0 for all rows, by the base model's own projection: static_apply's product, in one
        # call, since each costs microseconds after a matrix went through the cache.
        y = functional.linear(h, w0, bias)
        result = function(*operands, y.data_ptr(), *rest, 1)
    return y, result == _ALL
