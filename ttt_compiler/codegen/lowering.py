"""Inductor lowerings of the scan ops; those of what makes v are in ``lowering_conv.py`` and
``lowering_values.py``.

- On GPUs they become templates of our Triton kernel, see ``lowering_gpu.py``.
- On CPU ``ttt::chunk_scan`` becomes an extern kernel with an ``out=`` buffer, so its result lives in the
  graph's planned memory. Its GEMMs stay library calls: Inductor's GEMM templates measured slower.
- ``ttt::fast_weight_step`` has none: it mutates its state in place and Inductor calls it as it is.

May be changed here: how a node is lowered. Import once before compiling; the compile caches learn of
changes through ``pipeline_uuid``. Checked on torch 2.13.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.select_algorithm import ExternKernelChoice
from torch._inductor.virtualized import V

from ttt_compiler.codegen import lowering_conv as lowering_conv
from ttt_compiler.codegen import lowering_values as lowering_values
from ttt_compiler.codegen import ops as ttt_ops  # noqa: F401  (the ops must exist)
from ttt_compiler.codegen.cpu import scan as cpu_scan
from ttt_compiler.codegen.target import uses_triton

_scan_op = torch.ops.ttt.chunk_scan.default
_backward_op = torch.ops.ttt.chunk_scan_backward.default
_scan_fallback = fallback_handler(_scan_op, add_to_fallback_set=False)
_keeping_op = torch.ops.ttt.chunk_scan_keeping.default
_backward_fallback = fallback_handler(_backward_op, add_to_fallback_set=False)


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
    if uses_triton(h):
        from ttt_compiler.codegen import lowering_gpu

        return lowering_gpu.chunk_scan(h, v, w0, bias, pos, chunk, decay, on_nonfinite)
    if V.graph.cpp_wrapper:
        # A graph without Python (AOTInductor) finds the op by its name.
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


@register_lowering(_backward_op, type_promotion_kind=None)
def _lower_chunk_scan_backward(
    dy: Any,
    h: Any,
    v: Any,
    w0: Any,
    pos: Any,
    chunk: int,
    decay: float = 1.0,
    on_nonfinite: str = "raise",
    kept: Any = None,
) -> Any:
    if uses_triton(h):
        from ttt_compiler.codegen import lowering_gpu

        return lowering_gpu.chunk_scan_backward(dy, h, v, w0, pos, chunk, decay, on_nonfinite)
    return _backward_fallback(dy, h, v, w0, pos, chunk, decay, on_nonfinite, kept)


# Two outputs, of which Inductor plans neither.
register_lowering(_keeping_op, type_promotion_kind=None)(
    fallback_handler(_keeping_op, add_to_fallback_set=False)
)
