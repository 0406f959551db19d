"""What the scan ops become on GPUs: our template, and sums that Inductor fuses with what follows.

The gradients are scans too. With ``S_i`` the sum of ``dy_k^T h_k`` over later chunks of the document:
``dh_i = dy_i W_i + v_i S_i`` is a forward scan over ``W^T`` and a reverse one over ``S^T``;
``dv_i = h_i S_i^T`` is a reverse scan over S, whose last state is dW0. So nothing of the size of the states
is stored, for six units of ``2 T D F`` instead of the five that one fused reverse kernel would take: its tile
would have to be summed along both of its sides.

A chunk that holds NaN or Inf cannot raise here without stopping the device for every call: with
``on_nonfinite="raise"`` what it writes shows in every later output of its document, as NaN; ``"skip"`` leaves
its write out. May be changed here: how the scans are put together. Checked on torch 2.13.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings
from torch._inductor.select_algorithm import ExternKernelChoice, realize_inputs
from torch._inductor.virtualized import V

from ttt_compiler.codegen.choose import ScanPlan, gradient_form, scan_plan
from ttt_compiler.codegen.forms import ScanShape
from ttt_compiler.codegen.gpu.library import chunk_scan_library
from ttt_compiler.codegen.gpu.scan import precision
from ttt_compiler.codegen.kernels.tiles import DECAY, GRADIENT, SCAN, Tile
from ttt_compiler.codegen.target import memoised
from ttt_compiler.codegen.templates.chunk_scan import partial_scan, rows_contiguous, scratch, summed

_aten = torch.ops.aten
_library = ExternKernelChoice(chunk_scan_library, name="ttt_chunk_scan_library")
_skip = fallback_handler(torch.ops.ttt.skip_nonfinite.default, add_to_fallback_set=False)
_backward_library = fallback_handler(
    torch.ops.ttt.chunk_scan_backward_library.default, add_to_fallback_set=False
)
_table = fallback_handler(torch.ops.ttt.chunk_table.default, add_to_fallback_set=False)


def chunk_scan(
    h: Any, v: Any, w0: Any, bias: Any, pos: Any, chunk: int, decay: float, on_nonfinite: str
) -> Any:
    """IR of ``y [B, T, D]``; the arguments are those of the op."""
    if _empty(h):
        return lowerings[_aten.full.default]([*h.get_size()[:2], w0.get_size()[0]], 0, **_like(h))
    # Without Python (AOTInductor) there is nobody to call the library form.
    only_kernel = pos is not None or on_nonfinite != "raise" or bool(V.graph.cpp_wrapper)
    use = SCAN if decay == 1.0 else DECAY
    plan = _plan(h, v, chunk, use, only_kernel=only_kernel, decays=decay != 1.0)
    if plan.form == "library":
        return _by_library(h, v, w0, bias, chunk, plan.span, decay)
    _invite_activation(h, w0.get_size()[0], plan.tiles[0])
    h, v, w0 = rows_contiguous(h), rows_contiguous(v), realize_inputs(w0)
    table = _chunks(pos, chunk, v, h, on_nonfinite)
    partial = partial_scan(h, h, v, w0, table, chunk, plan, decay=decay, precision=precision(h.get_dtype()))
    return summed(partial, h.get_dtype(), *([] if bias is None else [bias]))


def chunk_scan_backward(
    dy: Any, h: Any, v: Any, w0: Any, pos: Any, chunk: int, decay: float, on_nonfinite: str
) -> tuple[Any, Any, Any]:
    """IR of the gradients of h, v and w0."""
    if _empty(h):
        zeros = (lowerings[_aten.full.default](x.get_size(), 0, **_like(x)) for x in (h, v, w0))
        return tuple(zeros)
    free = pos is None and on_nonfinite == "raise"
    if free and gradient_form(h.get_device(), _shape(h, v, chunk)) == "library":
        rows = (ir.ExternKernel.require_contiguous(x) for x in (dy, h, v))
        return tuple(_backward_library(*rows, realize_inputs(w0), chunk, decay))
    transposed = realize_inputs(lowerings[_aten.permute.default](w0, [1, 0]))
    outer = (dy, h)
    dy, h, v = rows_contiguous(dy), rows_contiguous(h), rows_contiguous(v)
    table = _chunks(pos, chunk, v, h, on_nonfinite)
    # With several documents or decay the last state is not the sum over all chunks.
    whole = table is None and decay == 1.0
    given: dict[str, Any] = {"decay": decay, "precision": precision(h.get_dtype())}
    use = GRADIENT if decay == 1.0 else DECAY
    turned = _plan(dy, h, chunk, use, apart=True, only_kernel=True)
    by_w = partial_scan(dy, v, h, transposed, table, chunk, turned, **given)
    by_s = partial_scan(v, dy, h, None, table, chunk, turned, reverse=True, **given)
    batch, (d, f) = h.get_size()[0], w0.get_size()
    final = scratch([batch, d, f], h.get_device()) if whole else None
    states = None if final is None else realize_inputs(final)
    plan = _plan(h, dy, chunk, use, final=whole, only_kernel=True)
    dv = partial_scan(h, h, dy, None, table, chunk, plan, reverse=True, final=states, **given)
    dh = lowerings[_aten.add.Tensor](summed(by_w, torch.float32), lowerings[_aten.sum.dim_IntList](by_s, [0]))
    if final is not None:
        dw0 = summed(final, w0.get_dtype())
    else:
        dw0 = lowerings[torch.ops.prims.convert_element_type.default](_outer(*outer), w0.get_dtype())
    return _to(dh, h), summed(dv, v.get_dtype()), dw0


def _plan(
    q: Any,
    v: Any,
    chunk: int,
    use: str,
    *,
    only_kernel: bool,
    apart: bool = False,
    final: bool = False,
    decays: bool = False,
) -> ScanPlan:
    """What the cost model says of this scan; of lengths that vary, for the length seen first."""
    shape = replace(_shape(q, v, chunk), final=final, apart=apart)
    return scan_plan(q.get_device(), use, shape, only_kernel=only_kernel, decays=decays)


def _shape(q: Any, v: Any, chunk: int) -> ScanShape:
    hint = V.graph.sizevars.optimization_hint
    batch, length, inner = (max(hint(x), 1) for x in q.get_size())
    return ScanShape(length, hint(v.get_size()[-1]), inner, chunk, batch, q.get_dtype())


def _by_library(h: Any, v: Any, w0: Any, bias: Any, chunk: int, span: int, decay: float) -> Any:
    """Products by torch's library, in a loop of its own."""
    h, v = (ir.ExternKernel.require_contiguous(x) for x in (h, v))
    inputs = [ir.ExternKernel.realize_input(x) for x in (h, v, w0)]
    batch, length, _ = h.get_size()
    layout = ir.FixedLayout(h.get_device(), h.get_dtype(), [batch, length, w0.get_size()[0]])
    y = _library.bind(inputs, layout, chunk=chunk, span=span, decay=decay).output_node()
    return y if bias is None else lowerings[_aten.add.Tensor](y, bias)


def _invite_activation(h: Any, outer: Any, tile: Tile) -> None:
    """Let Inductor compute ``h`` while it is loaded, where that moves fewer bytes.

    A tile of D reads gate and up instead of h; h itself is neither written nor read once more. Inductor's
    own rule refuses whatever reads more than it writes. Checked on 2.13: ``invoke_quant_ops``.
    """
    buffer = h.data.data if isinstance(h, ir.TensorBox) and isinstance(h.data, ir.StorageBox) else None
    if not isinstance(buffer, ir.Pointwise):
        return
    across = -(-V.graph.sizevars.optimization_hint(outer) // tile.outer)
    reads = len(buffer.get_read_names())
    if reads * across < reads + 1 + across:
        name = h.realize()
        if name is not None:
            V.graph.invoke_quant_ops.add(V.graph.get_buffer(name).get_operation_name())


def _outer(dy: Any, h: Any) -> Any:
    """``dy^T h`` over all tokens of the batch."""
    rows = [lowerings[_aten.reshape.default](x, [-1, x.get_size()[-1]]) for x in (dy, h)]
    return lowerings[_aten.mm.default](lowerings[_aten.permute.default](rows[0], [1, 0]), rows[1])


def _empty(x: Any) -> bool:
    """Whether x has no elements; Dynamo makes graphs of their own for sizes of zero."""
    return any(V.graph.sizevars.statically_known_equals(n, 0) for n in x.get_size())


def _like(x: Any) -> dict[str, Any]:
    return {"dtype": x.get_dtype(), "device": x.get_device()}


def _to(x: Any, like: Any) -> Any:
    return lowerings[torch.ops.prims.convert_element_type.default](x, like.get_dtype())


def _chunks(pos: Any, chunk: int, v: Any, h: Any, on_nonfinite: str) -> Any:
    table = None
    if pos is not None:
        pos = realize_inputs(pos)
        table = memoised("table", pos, chunk, lambda: realize_inputs(_table(pos, chunk)))
    return table if on_nonfinite == "raise" else realize_inputs(_skip(table, v, h, chunk))
