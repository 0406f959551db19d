"""The scan kernel as an Inductor template, and the sum over its partial outputs.

Inductor may compute q while it is loaded (the activation) when q is made for the scan alone, and fuses what
follows (bias, residual, casts) into the sum over S, or into the kernel itself when one tile spans I. May be
changed here: what is fused, and how a choice is made among tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import empty, lowerings
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
    realize_inputs,
)
from torch._inductor.virtualized import V

from ttt_compiler.codegen.choose import ScanPlan
from ttt_compiler.codegen.kernels.chunk_scan import chunk_scan_kernel, scan_constants
from ttt_compiler.codegen.kernels.chunk_table import chunk_table
from ttt_compiler.codegen.templates.from_kernel import template_source

_aten = torch.ops.aten

_HEADER = """
{%- set names = ["q"] + ([] if SHARED else ["k"]) + ["v"] + (["base"] if HAS_BASE else [])
    + (["table"] if HAS_TABLE else []) + (["final"] if HAS_FINAL else []) -%}
{{def_kernel(*names)}}
{%- set at = ("at_b", "at_t", "at_i") -%}
{%- set load_q = load_input("q", "x", at, mask="m_x", indent_width=20, index_shape=("BM", "BI")) -%}
{%- set store_y = store_output(("to_g", "to_b", "to_t", "to_o"), "acc", "m_y", indent_width=20,
    val_shape=("BM", "BO")) %}
    B = {{size("q", 0)}}
    T = {{size("q", 1)}}
    I = {{size("q", 2)}}
    O = {{size("v", 2)}}
    stride_vb = {{stride("v", 0)}}
    stride_vt = {{stride("v", 1)}}
{% if not SHARED %}
    stride_kb = {{stride("k", 0)}}
    stride_kt = {{stride("k", 1)}}
{% endif %}
{% if HAS_BASE %}
    stride_bo = {{stride("base", 0)}}
    stride_bi = {{stride("base", 1)}}
{% endif %}
{% if HAS_TABLE %}
    stride_tb = {{stride("table", 0)}} * TABLE_ROWS
    stride_tk = {{stride("table", 1)}}
{% endif %}
{% if ACCUMULATES %}
    partial = out_ptr0
{% endif %}
"""


@SymbolicGridFn
def _grid(groups: Any, batch: Any, length: Any, outer: Any, meta: dict[str, Any], *, cdiv: Any) -> Any:
    return (cdiv(outer, meta["BO"]), groups, batch)


@functools.cache
def scan_template() -> TritonTemplate:
    """The template, made at its first use: it needs Inductor."""
    return TritonTemplate(
        name="ttt_chunk_scan", grid=_grid, source=template_source(chunk_scan_kernel, _HEADER)
    )


def partial_scan(
    q: Any,
    k: Any,
    v: Any,
    base: Any,
    table: Any,
    chunk: int,
    plan: ScanPlan,
    *,
    decay: float,
    reverse: bool = False,
    final: Any = None,
    precision: str,
) -> Any:
    """The partial outputs ``[S, B, T, O]`` in fp32; see :func:`chunk_scan_partial`.

    Args:
        q: IR nodes, like those that follow.
        k: see q; q itself when they are equal.
        v: see q.
        base: ``[O, I]`` or None.
        table: int32, or None.
        chunk: C.
        plan: tiles, best first; more than one is measured under ``max_autotune`` only.
        decay: gamma.
        reverse: from the last chunk to the first.
        final: fp32 ``[B, O, I]`` to be filled with all that was written, or None.
        precision: of fp32 products.
    """
    shared = k is q
    inputs = [q, *([] if shared else [k]), v, *(x for x in (base, table, final) if x is not None)]
    batch, length, inner = q.get_size()
    outer = v.get_size()[-1]
    deep = V.graph.sizevars.guard_int(inner)
    layout = ir.FixedLayout(q.get_device(), torch.float32, [plan.groups, batch, length, outer])
    choices: list[Any] = []
    for tile in plan.tiles if config.max_autotune else plan.tiles[:1]:
        constants = scan_constants(
            chunk,
            tile,
            deep,
            plan.groups,
            decay=decay,
            reverse=reverse,
            shared=shared,
            precision=repr(precision),
        )
        error = scan_template().maybe_append_choice(
            choices,
            input_nodes=tuple(inputs),
            layout=layout,
            mutated_inputs=None if final is None else [final],
            num_warps=tile.warps,
            num_stages=tile.stages,
            HAS_BASE=base is not None,
            HAS_TABLE=table is not None,
            HAS_INIT=False,
            HAS_FINAL=final is not None,
            HAS_SLOTS=False,
            TABLE_ROWS=0 if table is None else int(table.get_size()[0] != 1),
            **constants,
        )
        if error is not None:
            raise error
    # Measured on chunks of the usual length: Inductor's own example has none, and the kernel nothing to do.
    made = None if table is None else {inputs.index(table): functools.partial(_example_table, chunk=chunk)}
    node, _ = autotune_select_algorithm("ttt_chunk_scan", choices, inputs, layout, input_gen_fns=made)
    if plan.groups * min(t.inner for t in plan.tiles) < deep:
        # Programs add to what they stored: nothing may be done to it in between. Checked on torch 2.13.
        node.data.data.allow_epilogue_fusion = False
    return node


def _example_table(table: Any, chunk: int) -> torch.Tensor:
    """A table of chunks like ``table``'s, of documents as long as the call."""
    hint = V.graph.sizevars.optimization_hint
    rows, _, columns = (hint(n) for n in table.get_size())
    pos = torch.arange(columns - 2, device=table.get_device()).expand(rows, -1)
    return chunk_table(pos, chunk)


def summed(partial: Any, dtype: torch.dtype, *terms: Any) -> Any:
    """The sum over S, with further terms, in ``dtype``: pointwise, so it fuses with what follows."""
    total = lowerings[_aten.sum.dim_IntList](partial, [0])
    for term in terms:
        total = lowerings[_aten.add.Tensor](total, term)
    return lowerings[torch.ops.prims.convert_element_type.default](total, dtype)


def rows_contiguous(x: Any) -> Any:
    """A tensor in memory whose last dimension is contiguous."""
    return realize_inputs(ir.ExternKernel.require_stride1(realize_inputs(x)))


def scratch(sizes: Sequence[Any], device: torch.device) -> Any:
    """An fp32 buffer that a kernel fills."""
    buffer = empty(list(sizes), dtype=torch.float32, device=device)
    buffer.realize()
    return buffer
