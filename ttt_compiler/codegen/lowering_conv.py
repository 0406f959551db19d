"""Inductor lowerings of the chunk convolution: loops of Inductor's own code generators, or a call on CPU.

On GPUs ``v = conv(t)`` becomes K masked loads that fuse with what surrounds them (the scale, a cast); the
gradient of the taps is one reduction. A kernel of our own would read and write t and v once more. On CPU it
is an extern kernel with an ``out=`` buffer: generated loops with their masks took six times as long as
:mod:`.cpu.native`. May be changed here: the loops. Checked on torch 2.13.0.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import clone, fallback_handler, permute, register_lowering
from torch._inductor.select_algorithm import ExternKernelChoice
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import ModularIndexing

from ttt_compiler.codegen import ops as ttt_ops  # noqa: F401  (the ops must exist)
from ttt_compiler.codegen.cpu import conv as cpu_conv
from ttt_compiler.codegen.target import memoised, on_cpu, uses_triton
from ttt_compiler.spec import state_dtype

_conv_op = torch.ops.ttt.chunk_conv.default
_dweight_op = torch.ops.ttt.chunk_conv_dweight.default
_conv_fallback = fallback_handler(_conv_op, add_to_fallback_set=False)
_dweight_fallback = fallback_handler(_dweight_op, add_to_fallback_set=False)
_places = fallback_handler(torch.ops.ttt.chunk_places.default, add_to_fallback_set=False)


@register_lowering(_conv_op, type_promotion_kind=None)
def _lower_chunk_conv(t: Any, conv: Any, pos: Any, chunk: int) -> Any:
    if not uses_triton(t):
        return on_cpu(_conv_kernel, _conv_fallback, (t, conv, pos), chunk, width=t.get_size()[2])
    t.realize()
    # Taps beside each other per channel, once: read as [Dt, 1, K] they are a gather for every token.
    taps = ir.ExternKernel.require_contiguous(clone(permute(conv, [2, 1, 0])))
    load_t, load_w = t.make_loader(), taps.make_loader()
    batch, length, width = t.get_size()
    kernel = V.graph.sizevars.guard_int(conv.get_size()[-1])
    inside = _Border(pos, chunk, length)
    accumulator = state_dtype(t.get_dtype())

    def inner(index: Any) -> Any:
        b, s, d = index
        zero = sympy.Integer(0)
        total = None
        for k in range(kernel):
            shift = sympy.Integer(k - kernel // 2)

            def tap(shift: Any = shift) -> Any:
                return ops.to_dtype(load_t([b, s + shift, d]), accumulator)

            value = tap() if shift == 0 and pos is None else ops.masked(inside(b, s, shift), tap, 0.0)
            term = ops.mul(value, ops.to_dtype(load_w([sympy.Integer(k), zero, d]), accumulator))
            total = term if total is None else ops.add(total, term)
        return ops.to_dtype(total, t.get_dtype())

    return ir.Pointwise.create(
        device=t.get_device(), dtype=t.get_dtype(), inner_fn=inner, ranges=[batch, length, width]
    )


def chunk_conv_out(t: Tensor, conv: Tensor, *pos: Tensor, chunk: int, out: Tensor) -> Tensor:
    """:func:`cpu_conv.chunk_conv` into ``out [B, T, Dt]``."""
    return cpu_conv.chunk_conv(t, conv, pos[0] if pos else None, chunk, out=out)


_conv_kernel = ExternKernelChoice(chunk_conv_out, name="ttt_chunk_conv")


@register_lowering(_dweight_op, type_promotion_kind=None)
def _lower_chunk_conv_dweight(dv: Any, t: Any, pos: Any, chunk: int, kernel: int) -> Any:
    if not uses_triton(t):
        return _dweight_fallback(dv, t, pos, chunk, kernel)
    t.realize()
    dv.realize()
    load_t, load_dv = t.make_loader(), dv.make_loader()
    batch, length, width = t.get_size()
    inside = _Border(pos, chunk, length)
    accumulator = state_dtype(t.get_dtype())

    def inner(index: Any, tokens: Any) -> Any:
        (d, _, k), (b, s) = index, tokens
        shift = k - kernel // 2

        def product() -> Any:
            pair = (ops.to_dtype(x, accumulator) for x in (load_dv([b, s, d]), load_t([b, s + shift, d])))
            return ops.mul(*pair)

        return ops.masked(inside(b, s, shift), product, 0.0)

    total = ir.Reduction.create(
        device=t.get_device(),
        dst_dtype=accumulator,
        src_dtype=accumulator,
        inner_fn=inner,
        ranges=[width, sympy.Integer(1), sympy.Integer(kernel)],
        reduction_ranges=[batch, length],
        reduction_type="sum",
    )
    total.realize()
    load = total.make_loader()
    return ir.Pointwise.create(
        device=t.get_device(),
        dtype=t.get_dtype(),
        inner_fn=lambda index: ops.to_dtype(load(index), t.get_dtype()),
        ranges=[width, sympy.Integer(1), sympy.Integer(kernel)],
    )


class _Border:
    """Whether token ``s + shift`` exists and lies in the chunk of token ``s``."""

    def __init__(self, pos: Any, chunk: int, length: Any) -> None:
        self.chunk, self.length = chunk, length
        self.load = None
        if pos is not None:
            pos = ir.ExternKernel.realize_input(pos)
            places = memoised("places", pos, chunk, lambda: _places(pos, chunk))
            self.load, self.rows = places.make_loader(), places.get_size()[0]

    def __call__(self, b: Any, s: Any, shift: Any) -> Any:
        zero = ops.constant(0, torch.int64)
        moved = ops.index_expr(shift, torch.int64)
        if self.load is None:
            place = ops.index_expr(ModularIndexing(s, 1, sympy.Integer(self.chunk)), torch.int64)
            size = ops.index_expr(
                sympy.Min(self.chunk, self.length - s + ModularIndexing(s, 1, self.chunk)), torch.int64
            )
        else:
            row = sympy.Integer(0) if self.rows == 1 else b
            place, size = (ops.to_dtype(self.load([row, s, sympy.Integer(i)]), torch.int64) for i in (0, 1))
        target = ops.add(place, moved)
        return ops.and_(ops.ge(target, zero), ops.lt(target, size))
