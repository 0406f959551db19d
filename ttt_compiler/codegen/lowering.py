"""Inductor lowerings of the fast-weight ops for CPU.

- ``ttt::chunk_conv`` becomes a loop of Inductor's own C++ code generator: K masked loads, fused with what
  surrounds it. With positions (documents inside of the batch) it stays the op's own kernel.
- ``ttt::chunk_scan`` becomes an extern kernel with an ``out=`` buffer, so its result lives in the graph's
  planned memory. Its GEMMs stay library calls: Inductor's GEMM templates measured slower.
- ``ttt::fast_weight_step`` has none: it mutates its state in place and Inductor calls it as it is.

May be changed here: how a node is lowered. Import once before compiling; the compile caches learn of
changes through ``pipeline_uuid``. Checked on torch 2.13.0.
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
from ttt_compiler.codegen.cpu import scan as cpu_scan
from ttt_compiler.spec import state_dtype

_conv_op = torch.ops.ttt.chunk_conv.default
_scan_op = torch.ops.ttt.chunk_scan.default
_conv_fallback = fallback_handler(_conv_op, add_to_fallback_set=False)
_scan_fallback = fallback_handler(_scan_op, add_to_fallback_set=False)


def chunk_scan_out(
    h: Tensor,
    v: Tensor,
    w0: Tensor,
    *optional: Tensor,
    chunk: int,
    decay: float,
    on_nonfinite: str,
    has_bias: bool,
    has_pos: bool,
    out: Tensor,
) -> Tensor:
    """:func:`cpu_scan.chunk_scan` into ``out [B, T, D]``; optional inputs are those that exist, in order."""
    rest = list(optional)
    bias = rest.pop(0) if has_bias else None
    pos = rest.pop(0) if has_pos else None
    return cpu_scan.chunk_scan(h, v, w0, bias, pos, chunk, decay, on_nonfinite, out=out)


_scan_kernel = ExternKernelChoice(chunk_scan_out, name="ttt_chunk_scan")


@register_lowering(_scan_op, type_promotion_kind=None)
def _lower_chunk_scan(
    h: Any,
    v: Any,
    w0: Any,
    bias: Any,
    pos: Any,
    chunk: int,
    decay: float = 1.0,
    on_nonfinite: str = "raise",
) -> Any:
    if h.get_device().type != "cpu":
        return _scan_fallback(h, v, w0, bias, pos, chunk, decay, on_nonfinite)
    h, v = (ir.ExternKernel.require_contiguous(x) for x in (h, v))
    inputs = [ir.ExternKernel.realize_input(x) for x in (h, v, w0, bias, pos) if x is not None]
    batch, length, _ = h.get_size()
    layout = ir.FixedLayout(h.get_device(), h.get_dtype(), [batch, length, w0.get_size()[0]])
    choice = _scan_kernel.bind(
        inputs,
        layout,
        chunk=chunk,
        decay=decay,
        on_nonfinite=on_nonfinite,
        has_bias=bias is not None,
        has_pos=pos is not None,
    )
    return choice.output_node()


@register_lowering(_conv_op, type_promotion_kind=None)
def _lower_chunk_conv(t: Any, conv: Any, pos: Any, chunk: int) -> Any:
    if pos is not None or t.get_device().type != "cpu":
        return _conv_fallback(t, conv, pos, chunk)
    t.realize()
    # Taps beside each other per channel, once: read as [Dt, 1, K] they are a gather for every token.
    taps = ir.ExternKernel.require_contiguous(clone(permute(conv, [2, 1, 0])))
    load_t, load_w = t.make_loader(), taps.make_loader()
    batch, length, width = t.get_size()
    kernel = V.graph.sizevars.guard_int(conv.get_size()[-1])
    accumulator = state_dtype(t.get_dtype())

    def inner(index: Any) -> Any:
        b, s, d = index
        zero = sympy.Integer(0)
        total = None
        for k in range(kernel):
            shift = k - kernel // 2

            def tap(shift: int = shift) -> Any:
                return ops.to_dtype(load_t([b, s + shift, d]), accumulator)

            value = tap() if shift == 0 else ops.masked(_inside(s, shift, chunk, length), tap, 0.0)
            term = ops.mul(value, ops.to_dtype(load_w([sympy.Integer(k), zero, d]), accumulator))
            total = term if total is None else ops.add(total, term)
        return ops.to_dtype(total, t.get_dtype())

    return ir.Pointwise.create(
        device=t.get_device(), dtype=t.get_dtype(), inner_fn=inner, ranges=[batch, length, width]
    )


def _inside(s: Any, shift: int, chunk: int, length: Any) -> Any:
    """Whether token ``s + shift`` exists and lies in the chunk of token ``s``."""
    place = ops.index_expr(ModularIndexing(s, 1, sympy.Integer(chunk)), torch.int64)
    if shift < 0:
        return ops.ge(place, ops.constant(-shift, torch.int64))
    in_chunk = ops.lt(place, ops.constant(chunk - shift, torch.int64))
    exists = ops.lt(ops.index_expr(s + shift, torch.int64), ops.index_expr(length, torch.int64))
    return ops.and_(in_chunk, exists)
