"""The far side of an MLP: from the down-projection forward to where its output joins the residual.

Bias, dropout, norms, scales, router weights, un-permutation and parallel branches may stand
between.

May be changed here: what may stand between, and which additions count as a residual.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from .contractions import Contraction
from .graph import GraphView
from .op_classes import PERMUTING, OpClass, is_affine
from .tokens import moves_last_axis

Contractions = Mapping[fx.Node, Contraction]

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
    ``refusal`` says what on the way makes the projection none of an MLP. ``nonlinear_use`` names a
    nonlinearity applied to the output when no merge was found. ``passed`` are the nodes on the way,
    the projection and the merge included.
    """

    merge: fx.Node | None
    bypass: bool
    nonlinear_use: str | None
    refusal: str | None
    passed: frozenset[fx.Node]


@dataclass(frozen=True)
class _Trail:
    """How a value on the way was made from the output."""

    gate: str | None = None  # a nonlinearity that every path to it passes
    turned: bool = False  # its last axis is not the output's


def follow_output(view: GraphView, contractions: Contractions, down: Contraction, x: fx.Node) -> OutputPath:
    """Walk forward from ``down``, earliest node first, to the residual add."""
    return _Walk(view, contractions, down, x).run()


class _Walk:
    def __init__(self, view: GraphView, contractions: Contractions, down: Contraction, x: fx.Node) -> None:
        self.view, self.contractions, self.down, self.x = view, contractions, down, x
        self.trails: dict[fx.Node, _Trail] = {down.node: _Trail()}
        self.bypass: fx.Node | None = None
        self.nonlinear_use: str | None = None
        self.mixed_by: str | None = None
        self.leaves = False  # reaches another projection or the end of the graph
        self._heap: list[tuple[int, fx.Node]] = []
        self._queued: set[fx.Node] = set()

    def run(self) -> OutputPath:
        view = self.view
        self._push_users(self.down.node)
        budget = _MAX_STEPS
        while self._heap and budget:
            budget -= 1
            _, node = heapq.heappop(self._heap)
            if self._ends(node):
                continue
            self.trails[node] = trail = self._trail(node)
            name = view.name(node)
            if name in _MERGES:
                others = [i for i in view.data_inputs(node) if i not in self.trails]
                if trail.turned and any(view.depends_on(self.x, o) for o in others):
                    return self._answer(None, refusal="mixes tokens: its output is transposed again after it")
                if any(_carries_residual(view, o, self.x, self.down.d_out) for o in others):
                    if trail.gate is None and (ends_in := self._swallowed_by(node)) is not None:
                        why = f"the sum with its input goes into {ends_in} alone, it is no residual stream"
                        return self._answer(None, refusal=why)
                    if trail.gate is None:
                        return self._answer(node)
                    why = f"{trail.gate} is applied to its output before it joins the residual (a gate)"
                    return self._answer(None, refusal=why)
                found = self.bypass is None and name == "add" and trail.gate is None
                if found and _bypasses(view, others, self.x, self.down.d_out):
                    self.bypass = node
                    budget = min(budget, _STEPS_AFTER_BYPASS)
            self._push_users(node)
        if self.bypass is None and self.mixed_by and not self.leaves:
            return self._answer(None, refusal=f"its output goes into {self.mixed_by}, not into the residual")
        return self._answer(self.bypass)

    def _answer(self, merge: fx.Node | None, refusal: str | None = None) -> OutputPath:
        bypass = merge is not None and merge is self.bypass
        use = None if merge is not None else self.nonlinear_use
        return OutputPath(merge, bypass, use, refusal, frozenset(self.trails))

    def _push_users(self, node: fx.Node) -> None:
        for user in self.view.users(node):
            if user not in self._queued and self.view.is_data(user):
                self._queued.add(user)
                heapq.heappush(self._heap, (self.view.order[user], user))

    def _ends(self, node: fx.Node) -> bool:
        """Whether the output stops being one value per token and feature here; remembers how."""
        op_class, name = self.view.op_class(node), self.view.name(node)
        if op_class is OpClass.MIX:
            # A short convolution over the MLP's output keeps its meaning (Inkling).
            if "conv" in name:
                return False
            # Routed experts put their rows back with a scatter.
            self.leaves |= "scatter" in name
            self.mixed_by = self.mixed_by or name
            return True
        if op_class is OpClass.CONTRACT and node not in self.contractions:
            self.mixed_by = self.mixed_by or f"{name} of activations (attention)"
            return True
        self.leaves |= op_class in (OpClass.CONTRACT, OpClass.OTHER)
        return op_class in (OpClass.CONTRACT, OpClass.OTHER)

    def _swallowed_by(self, merge: fx.Node) -> str | None:
        """What takes the sum in the place of a further layer: a softmax (a router), attention scores."""
        pending, seen, name = [merge], set(), None
        while pending:
            for user in self.view.users(pending.pop()):
                if user in seen:
                    continue
                seen.add(user)
                op_class = self.view.op_class(user)
                scores = op_class is OpClass.CONTRACT and user not in self.contractions
                if "softmax" in self.view.name(user) or scores:
                    name = self.view.name(user)
                elif op_class in (OpClass.VIEW, OpClass.CAST):
                    pending.append(user)
                else:
                    return None
        return name

    def _trail(self, node: fx.Node) -> _Trail:
        view, name = self.view, self.view.name(node)
        sources = [self.trails[i] for i in view.data_inputs(node) if i in self.trails]
        wide = [self.trails[i] for i in view.data_inputs(node) if i in self.trails and view.width(i) != 1]
        turned = any(s.turned for s in wide or sources)
        if name in PERMUTING and moves_last_axis(view, node):
            turned = not turned
        if name in _MERGES:
            gate = None if any(s.gate is None for s in sources) else sources[0].gate
        else:
            gate = next((s.gate for s in wide or sources if s.gate), None)
        if self._is_nonlinear(node, name):
            gate = gate or name
            if self.bypass is None:
                self.nonlinear_use = self.nonlinear_use or name
        return _Trail(gate, turned)

    def _is_nonlinear(self, node: fx.Node, name: str) -> bool:
        view = self.view
        return (
            view.op_class(node) is OpClass.POINTWISE
            and not is_affine(name)
            and name not in _NORM_ARITHMETIC
            and view.width(node) == self.down.d_out
            and view.dtype(node) is not torch.bool
        )


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
