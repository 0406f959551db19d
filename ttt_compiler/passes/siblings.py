"""MLPs side by side: shared experts beside routed ones, and adapters beside an MLP.

Two MLPs are *beside* each other when their outputs end in one sum and neither is computed from the other. A
**shared expert** is a dense MLP beside routed experts that reads the same value as they do, whatever gates
its output. A dense MLP beside routed experts with an input of its own (another norm, or another point of the
residual stream: Arctic, gemma4) is a block of its own, and stays ``dense``.

May be changed here: those two definitions, and how narrow an MLP may be beside another.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .contractions import Contraction
from .graph import GraphView
from .op_classes import SELECTING, OpClass
from .residual import OutputPath

_DEPTH = 12
_PASSING = (OpClass.VIEW, OpClass.CAST, OpClass.DROPOUT, OpClass.SPLIT)


@dataclass(frozen=True, eq=False)
class Branch:
    """An accepted down-projection: where its MLP reads, and where its output goes."""

    down: Contraction
    x: fx.Node
    routed: bool
    path: OutputPath


def is_shared_expert(view: GraphView, branch: Branch, branches: list[Branch]) -> bool:
    """Whether ``branch`` is a dense MLP that works on the input of the routed experts beside it."""
    if branch.routed:
        return False
    return any(o.routed and _beside(view, branch, o) and _reads(view, o.x, branch.x) for o in branches)


def is_adapter(view: GraphView, branch: Branch, branches: list[Branch]) -> bool:
    """Whether a bottleneck is none of the narrow MLPs that work side by side.

    Those are experts: as wide as another one, or at least half as wide as the routed ones.
    """
    width = branch.down.d_in
    if branch.routed or width >= branch.down.d_out:
        return False
    for other in branches:
        peer = 2 * width >= other.down.d_in if other.routed else width == other.down.d_in
        if other is not branch and peer and _beside(view, branch, other):
            return False
    return True


def _beside(view: GraphView, a: Branch, b: Branch) -> bool:
    if view.depends_on(a.x, b.down.node) or view.depends_on(b.x, a.down.node):
        return False
    if a.path.merge is None or b.path.merge is None:
        return any(view.name(n) in ("add", "index_add") for n in a.path.passed & b.path.passed)
    first, last = sorted((a.path.merge, b.path.merge), key=view.order.__getitem__)
    return _is_summand(view, first, last)


def _is_summand(view: GraphView, part: fx.Node, total: fx.Node) -> bool:
    """Whether ``total`` is ``part`` plus other values, seen through layout and scales."""
    pending = [(total, _DEPTH)]
    while pending:
        node, depth = pending.pop()
        if node is part:
            return True
        inputs = view.data_inputs(node)
        if depth and view.order[node] > view.order[part]:
            if view.name(node) in ("add", "sub"):
                pending += [(i, depth - 1) for i in inputs]
            elif view.op_class(node) in _PASSING or (view.name(node) in ("mul", "div") and len(inputs) == 1):
                pending += [(i, depth - 1) for i in inputs[:1]]
    return False


def _reads(view: GraphView, routed_x: fx.Node, x: fx.Node) -> bool:
    """Whether routed experts read x: as it is, a choice of its tokens, or scaled by router weights."""
    node = routed_x
    for _ in range(_DEPTH):
        if node is x:
            return True
        inputs = view.data_inputs(node)
        if not inputs:
            return False
        if view.name(node) in ("mul", "div"):
            # A factor per token does not change what is read.
            wide = [i for i in inputs if view.width(i) != 1]
            if len(wide) != 1:
                return False
            node = wide[0]
        elif view.op_class(node) in _PASSING or view.name(node) in SELECTING:
            node = inputs[0]
        else:
            return False
    return False
