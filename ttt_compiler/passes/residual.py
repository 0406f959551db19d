"""The far side of an MLP: from the down-projection forward to where its output joins the residual.

Bias, dropout, norms, scales, router weights, un-permutation and parallel branches may stand
between.

May be changed here: what may stand between, and which additions count as a residual.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from torch import fx

from .contractions import Contraction
from .graph import GraphView
from .op_classes import OpClass, is_affine

_MAX_STEPS = 400
# After the first addition that bypasses the MLP, how far to look for a plain residual.
_STEPS_AFTER_BYPASS = 80
_MERGES = ("add", "sub", "addcmul", "lerp")
_NORM_ARITHMETIC = ("pow", "square", "sqrt", "rsqrt", "reciprocal", "clamp", "clamp_min", "abs")


@dataclass(frozen=True, eq=False)
class OutputPath:
    """Where the output goes.

    ``merge`` is the addition that closes the MLP: with a value x was computed from (a residual) or,
    if ``bypass``, with one that is not computed from x (hyper-connections, several streams).
    ``nonlinear_use`` names a nonlinearity applied to the output when nothing of the kind was found.
    """

    merge: fx.Node | None
    bypass: bool
    nonlinear_use: str | None


def follow_output(view: GraphView, down: Contraction, x: fx.Node) -> OutputPath:
    """Walk forward from ``down``, earliest node first, to the residual add."""
    reached: set[fx.Node] = {down.node}
    bypass: fx.Node | None = None
    nonlinear_use: str | None = None
    heap: list[tuple[int, fx.Node]] = []
    queued: set[fx.Node] = set()

    def push_users(node: fx.Node) -> None:
        for user in view.users(node):
            if user not in queued and view.is_data(user):
                queued.add(user)
                heapq.heappush(heap, (view.order[user], user))

    push_users(down.node)
    budget = _MAX_STEPS
    while heap and budget:
        budget -= 1
        _, node = heapq.heappop(heap)
        if _ends_path(view, node):
            continue
        name = view.name(node)
        if name in _MERGES:
            others = [i for i in view.data_inputs(node) if i not in reached]
            if any(_carries_residual(view, o, x, down.d_out) for o in others):
                return OutputPath(node, bypass=False, nonlinear_use=None)
            if bypass is None and name == "add" and _bypasses(view, others, x, down.d_out):
                bypass = node
                budget = min(budget, _STEPS_AFTER_BYPASS)
        elif (
            bypass is None
            and nonlinear_use is None
            and view.op_class(node) is OpClass.POINTWISE
            and not is_affine(name)
            and name not in _NORM_ARITHMETIC
            and view.width(node) == down.d_out
        ):
            nonlinear_use = name
        reached.add(node)
        push_users(node)
    return OutputPath(bypass, bypass is not None, None if bypass else nonlinear_use)


def _ends_path(view: GraphView, node: fx.Node) -> bool:
    op_class = view.op_class(node)
    if op_class is OpClass.MIX:
        # A short convolution over the MLP's output keeps its meaning (Inkling).
        return "conv" not in view.name(node)
    return op_class in (OpClass.CONTRACT, OpClass.OTHER)


def _carries_residual(view: GraphView, other: fx.Node, x: fx.Node, d_model: int) -> bool:
    """Whether x is computed from ``other``, seen through layout, scales and branches' adds."""
    pending = [(other, 4)]
    while pending:
        node, depth = pending.pop()
        width = view.width(node)
        # A multiple of d_model: several residual streams side by side.
        if view.depends_on(x, node) and width is not None and width % d_model == 0:
            return True
        inputs = view.data_inputs(node)
        layout = view.op_class(node) in (OpClass.VIEW, OpClass.CAST, OpClass.DROPOUT)
        scale = view.name(node) in ("mul", "div") and len(inputs) == 1
        if layout or scale:
            pending += [(i, depth) for i in inputs[:1]]
        elif view.name(node) == "add" and depth:
            pending += [(i, depth - 1) for i in inputs]
    return False


def _bypasses(view: GraphView, others: list[fx.Node], x: fx.Node, d_model: int) -> bool:
    return any(not view.depends_on(o, x) and (view.width(o) or 1) % d_model == 0 for o in others)
