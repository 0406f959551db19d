"""Is there a nonlinearity between the projections, which one, and is it a gate?

May be changed here: what counts as an activation. Two things do: a pointwise function that is not
affine, and a product of two branches of different origin (a gate, with or without activation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from .graph import GraphView
from .op_classes import OpClass, class_of, higher_order_name, is_affine, is_foreign, op_name


class _Region(Protocol):
    """The part of a cone that is read here: nodes in graph order, projections, foreign kernels."""

    @property
    def nodes(self) -> tuple[fx.Node, ...]: ...
    @property
    def ups(self) -> tuple[fx.Node, ...]: ...
    @property
    def opaque(self) -> frozenset[fx.Node]: ...


@dataclass(frozen=True)
class Activation:
    """``name`` joins the operations in graph order: ``silu``, ``pow+tanh``, ``bilinear``."""

    name: str
    gated: bool


Branch = tuple[fx.Node, fx.Node | None]  # a projection, and which part of a split one


def find_activation(view: GraphView, region: _Region, operand: fx.Node, d_ff: int) -> Activation | None:
    """Return the nonlinearity on the full-width paths of a region, None when there is none."""
    origins_of = branches(view, region)
    wide = _full_width(view, region, operand, d_ff)
    column = view.width(operand) == 1
    names: list[str] = []
    gated = False
    for node in region.nodes:
        if node not in wide:
            continue
        inputs = [i for i in view.data_inputs(node) if column or view.width(i) != 1]
        origins = [origins_of.get(i, frozenset({(i, None)})) for i in inputs]
        disjoint = len(origins) == 2 and not origins[0] & origins[1]
        if node in region.opaque:
            names.append(view.name(node))
            gated |= disjoint
            continue
        if view.op_class(node) is OpClass.OTHER:
            inlined = inlined_pointwise(view, node) or []
            names += [n for n in inlined if not is_affine(n)]
            gated |= disjoint and any(n in ("mul", "div") for n in inlined)
        elif view.op_class(node) is OpClass.POINTWISE and inputs:
            name = view.name(node)
            gated |= name == "glu" or (name in ("mul", "div") and disjoint)
            if _is_nonlinear(node, name, disjoint):
                names.append("relu" if name in _BOUNDS and not disjoint else name)
    if names:
        return Activation("+".join(dict.fromkeys(names)), gated)
    return Activation("bilinear", gated=True) if gated else None


_BOUNDS = ("clamp", "clamp_min", "clamp_max", "maximum", "minimum")


def _is_nonlinear(node: fx.Node, name: str, disjoint: bool) -> bool:
    if name in _BOUNDS:
        # Clamping at zero is relu, the larger of two branches is maxout; other bounds only guard
        # against overflow.
        bounds = [*node.args[1:], *node.kwargs.values()]
        return disjoint or any(isinstance(b, (int, float)) and b == 0 for b in bounds)
    if name == "pow" and len(node.args) > 1 and node.args[1] == 1:
        return False
    return not is_affine(name)


def branches(view: GraphView, region: _Region) -> dict[fx.Node, frozenset[Branch]]:
    """Which projections, or parts of a split projection, every node is made of."""
    found: dict[fx.Node, frozenset[Branch]] = {u: frozenset({(u, None)}) for u in region.ups}
    for node in region.nodes:
        merged = frozenset[Branch]().union(*(found.get(i, frozenset()) for i in view.inputs(node)))
        picks_part = view.op_class(node) is OpClass.SPLIT and isinstance(
            node.meta.get("example_value", node.meta.get("val")), torch.Tensor
        )
        if picks_part:
            merged = frozenset((up, part or node) for up, part in merged)
        found[node] = merged
    return found


def _full_width(view: GraphView, region: _Region, operand: fx.Node, d_ff: int) -> set[fx.Node]:
    """Nodes of the region that reach the operand without passing a statistic of width one."""
    members = set(region.nodes)
    wide: set[fx.Node] = set()
    column = view.width(operand) == 1  # W @ h[..., None]: the features are on the axis before the last
    pending = [operand]
    while pending:
        node = pending.pop()
        if node in wide or node not in members:
            continue
        layout = view.op_class(node) is OpClass.VIEW
        if view.width(node) == 1 and d_ff != 1 and not layout and not column:
            continue
        wide.add(node)
        pending += view.data_inputs(node)
    return wide


def inlined_pointwise(view: GraphView, node: fx.Node) -> list[str] | None:
    """Pointwise operations inside an ``autograd.Function``; None for any other node.

    Dynamo keeps a custom ``autograd.Function`` as one node with its forward as a sub-graph.
    """
    if higher_order_name(node) != "autograd_function_apply" or not node.args:
        return None
    body = subgraph(view.graph_module, node.args[0])
    if body is None:
        return None
    names: list[str] = []
    elementwise = (OpClass.POINTWISE, OpClass.CAST, OpClass.VIEW, OpClass.SPLIT, OpClass.DROPOUT)
    for inner in body.graph.nodes:
        if inner.op not in ("call_function", "call_method"):
            continue
        name = op_name(inner)
        if name.startswith(("_set_grad", "_log_api")):
            continue
        op_class = class_of(name)
        if op_class not in elementwise:
            return None
        if op_class is OpClass.POINTWISE:
            names.append(name)
    return names or None


def subgraph(gm: fx.GraphModule, operand: object) -> fx.GraphModule | None:
    """Return the body a higher-order operator's operand names, None for any other operand."""
    if not isinstance(operand, fx.Node) or operand.op != "get_attr":
        return None
    found: object = gm
    for part in str(operand.target).split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, fx.GraphModule) else None


def looks_like_fused_activation(view: GraphView, node: fx.Node) -> bool:
    """Whether a foreign kernel has the shapes of an activation.

    One or two data operands of the result's shape, or one operand of twice its width.
    """
    if not is_foreign(node):
        return False
    inputs, out = view.data_inputs(node), view.shape(node)
    shapes = [view.shape(i) for i in inputs]
    if out is None or not 1 <= len(inputs) <= 2 or any(s is None for s in shapes):
        return False
    if all([str(d) for d in s or ()] == [str(d) for d in out] for s in shapes):
        return True
    width, before = view.width(node), view.width(inputs[0])
    return len(inputs) == 1 and width is not None and before == 2 * width
