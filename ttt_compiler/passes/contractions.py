"""Weighted contractions: the operations that multiply data by a weight.

``F.linear``, ``addmm`` (HF ``Conv1D``), ``mm``, ``matmul``, ``bmm``, ``einsum`` and ``grouped_mm``
all come out as one :class:`Contraction`. A product of two data values (attention scores) is none.

May be changed here: how one more spelling names its operands. Whether a contraction is an MLP's
down-projection is decided in ``find_mlps.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from .graph import GraphView, flat_nodes
from .op_classes import PERMUTING, OpClass
from .tokens import permutation


@dataclass(frozen=True, eq=False)
class Contraction:
    """``data [..., d_in]`` times a weight gives ``node [..., d_out]``.

    ``transposed`` is about the *root* weight, ``operand_transposed`` about the operand as the operation
    gets it: True when it is ``[d_in, d_out]``.
    """

    node: fx.Node
    h: fx.Node  # the data operand exactly as passed
    data: fx.Node  # the value it has there, after in-place writes
    weight_operand: fx.Node
    weight: fx.Node  # placeholder or attribute the operand is made from
    bias: fx.Node | None
    d_in: int
    d_out: int
    transposed: bool
    operand_transposed: bool
    scale: float  # the product is multiplied by it (alpha of addmm)
    plain: bool  # node == data @ weight (+ a bias per output feature), nothing else
    kind: str  # "dense" | "moe"


@dataclass(frozen=True)
class _Operands:
    """The two factors as written; ``in_first`` tells how the second one is laid out."""

    first: fx.Node
    second: fx.Node
    bias: fx.Node | None
    in_first: bool  # a weight in the second place is [.., d_in, d_out]
    scale: float = 1.0
    bias_scale: float = 1.0


def weighted_contractions(view: GraphView) -> dict[fx.Node, Contraction]:
    """Every weighted contraction of the graph, in graph order."""
    found: dict[fx.Node, Contraction] = {}
    for node in view.nodes:
        if view.op_class(node) is OpClass.CONTRACT and view.is_data(node):
            contraction = _recognise(view, node)
            if contraction is not None:
                found[node] = contraction
    return found


def _argument(node: fx.Node, place: int, *keys: str) -> object:
    if place < len(node.args):
        return node.args[place]
    return next((node.kwargs[k] for k in keys if k in node.kwargs), None)


def _operands(view: GraphView, node: fx.Node) -> _Operands | None:
    name = view.name(node)
    bias: object = None
    if name == "linear":
        first = _argument(node, 0, "input")
        second = _argument(node, 1, "weight")
        bias = _argument(node, 2, "bias")
    elif name in ("addmm", "baddbmm", "addbmm"):
        bias = _argument(node, 0, "input")
        first = _argument(node, 1, "mat1", "batch1")
        second = _argument(node, 2, "mat2", "batch2")
    elif name == "einsum":
        factors = list(flat_nodes(node.args[1:]))
        if len(factors) != 2:
            return None
        first, second = factors
    else:
        first = _argument(node, 0, "input", "self", "mat_a")
        second = _argument(node, 1, "other", "mat2", "weight", "vec", "mat_b")
    scales = [node.kwargs.get(k, 1) for k in ("alpha", "beta")]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    if not all(isinstance(s, (int, float)) for s in scales):
        return None
    bias = bias if isinstance(bias, fx.Node) else None
    return _Operands(first, second, bias, name != "linear", *(float(s) for s in scales))  # type: ignore[arg-type]


def _weight_root(view: GraphView, operand: fx.Node) -> tuple[fx.Node | None, bool]:
    """Root of a weight operand, and whether it is picked out of a weight by a data index."""
    if view.is_data(operand):
        return view.gathered_root(operand), True
    return view.root(operand), False


def _recognise(view: GraphView, node: fx.Node) -> Contraction | None:
    operands = _operands(view, node)
    if operands is None:
        return None
    first = view.resolve(node, operands.first)
    second = view.resolve(node, operands.second)
    root, routed = _weight_root(view, second)
    weight_second = root is not None and view.is_data(first)
    if weight_second and routed:
        # Both may be data: the one that is no indexed weight is the activation.
        weight_second = view.gathered_root(first) is None
    if weight_second:
        h, data, weight = operands.first, first, second
    else:
        root, routed = _weight_root(view, first)
        h, data, weight = operands.second, second, first
    if root is None or not view.is_data(data):
        return None
    sizes = _sizes(view, node, data, weight, weight_second)
    if sizes is None:
        return None
    d_in, d_out, in_before_out = sizes
    if in_before_out is None:
        in_before_out = operands.in_first if weight_second else False
    rank = len(view.shape(weight) or ())
    batched = rank > 2 or view.name(node) == "grouped_mm"
    swaps = _count_transposes(view, weight)
    bias = operands.bias
    per_feature = bias is None or (not view.is_data(bias) and len(view.shape(bias) or ()) == 1)
    return Contraction(
        node=node,
        h=h,
        data=data,
        weight_operand=operands.second if weight_second else operands.first,
        weight=root,
        bias=bias,
        d_in=d_in,
        d_out=d_out,
        transposed=in_before_out != bool(swaps % 2),
        operand_transposed=in_before_out,
        scale=operands.scale,
        plain=per_feature and operands.scale == operands.bias_scale == 1.0,
        kind="moe" if routed or batched else "dense",
    )


def _sizes(
    view: GraphView, node: fx.Node, data: fx.Node, weight: fx.Node, weight_second: bool
) -> tuple[int, int, bool | None] | None:
    """``(d_in, d_out, weight operand is [in, out])``, the last None when the spelling decides."""
    data_shape, weight_shape, out_shape = view.shape(data), view.shape(weight), view.shape(node)
    if data_shape is None or weight_shape is None or out_shape is None or len(weight_shape) < 2:
        return None
    if view.name(node) == "einsum":
        return _einsum_sizes(node, weight_shape, weight_second)
    if not data_shape or not out_shape:
        return None
    d_in, d_out = data_shape[-1], out_shape[-1]
    if not weight_second:
        # W @ x[..., None]; W @ xᵀ with more columns contracts over an axis that is not the last.
        if len(data_shape) < 2 or data_shape[-1] != 1:
            return None
        d_in, d_out = data_shape[-2], out_shape[-2]
    if not isinstance(d_in, int) or not isinstance(d_out, int):
        return None
    if {d_in, d_out} != set(weight_shape[-2:]):
        return None
    return d_in, d_out, None


def _einsum_sizes(
    node: fx.Node, weight_shape: Sequence[object], weight_second: bool
) -> tuple[int, int, bool | None] | None:
    equation = node.args[0]
    if not isinstance(equation, str) or "->" not in equation:
        return None
    left, out = equation.replace(" ", "").split("->")
    terms = left.split(",")
    if len(terms) != 2:
        return None
    data_term, weight_term = terms if weight_second else terms[::-1]
    if "." in weight_term or len(weight_term) != len(weight_shape):
        return None
    contracted = [c for c in weight_term if c in data_term and c not in out]
    produced = [c for c in weight_term if c not in data_term and c in out]
    # The features must be the last axis of both the data and the result.
    if not contracted or not produced:
        return None
    if contracted[-1] != data_term[-1] or produced[-1] != out[-1]:
        return None
    # And what is in front of them must keep its order.
    if [c for c in data_term if c not in contracted] != [c for c in out if c not in produced]:
        return None
    size = {c: d for c, d in zip(weight_term, weight_shape, strict=True) if isinstance(d, int)}
    if any(c not in size for c in contracted) or produced[-1] not in size:
        return None
    in_before_out = weight_term.index(contracted[-1]) < weight_term.index(produced[-1])
    return math.prod(size[c] for c in contracted), size[produced[-1]], in_before_out


def _count_transposes(view: GraphView, weight: fx.Node) -> int:
    """How often the last two axes are swapped between the root and the operand."""
    swaps = 0
    node = weight
    while node.op not in ("placeholder", "get_attr") and view.inputs(node):
        if view.name(node) in PERMUTING:
            swaps += _swaps_last_two(view, node)
        candidates = [i for i in view.inputs(node) if len(view.shape(i) or ()) >= 2]
        if not candidates:
            break
        node = candidates[0]
    return swaps


def _swaps_last_two(view: GraphView, node: fx.Node) -> bool:
    rank, order = len(view.shape(node) or ()), permutation(view, node)
    return rank == 2 if order is None else order[-2:] == (rank - 1, rank - 2)
