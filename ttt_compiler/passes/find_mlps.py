"""Find the MLP down-projections of a captured graph by dataflow, never by name.

For every weighted contraction: what feeds it must be a nonlinear function, token by token, of
projections of one value x (``mlp_cone.py``, ``tokens.py``), the widths must go d_model -> d_ff ->
d_model, and the result must join the residual stream (``residual.py``). MLPs side by side are told
apart by ``siblings.py``, unsupported spellings are named by ``near_misses.py``. Everything else is
refused with a reason.

May be changed here: the acceptance rule. Which higher-order operators are looked into is in
``bodies.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from .bodies import ONCE, Body, bodies
from .contractions import Contraction, weighted_contractions
from .graph import GraphView, StaticTest
from .mlp_cone import trace_mlp
from .near_misses import near_miss
from .residual import follow_output
from .siblings import Branch, is_adapter, is_shared_expert


@dataclass(frozen=True, eq=False)
class MLPSite:
    """One down-projection ``h [.., d_ff] -> [.., d_model]`` and the MLP it belongs to.

    ``graph_module`` is the module whose graph holds the nodes: the captured one or the body of a
    higher-order operator. ``h`` is the data operand exactly as passed, ``x`` the value all
    up-projections read, behind casts, views and dropout, ``x_operand`` the same as one of them gets
    it. ``transposed`` tells that the root ``weight`` is stored ``[d_ff, d_model]``,
    ``operand_transposed`` that ``weight_operand`` (what the contraction gets: the root, a view of it,
    or a value computed from it) is; ``bias`` is given only if the contraction adds it. ``plain`` is
    False when the contraction does more than that (``alpha``, ``beta``, a matrix added); ``scale`` is
    what it multiplies the product by.

    ``kind`` is ``"moe"`` for routed experts, ``"shared"`` for a shared expert beside them (it sees
    every token, in sequence order), else ``"dense"``.

    ``top_weight`` is the weight's placeholder in the outermost graph: the node whose source and
    example input identify the parameter when the site lies in a body (else it is ``weight``). In a
    scan over layers that is the stack ``[L, ...]`` that ``weight`` is sliced from.

    ``merge`` is the addition that joins the residual stream, None when this graph has none; ``view``
    is what the graph was read through.

    ``calls`` leads from the outermost graph to the body: the higher-order nodes, outermost first;
    empty when the site lies in the outermost graph itself. A body that is called several times gives
    one site per call, with the same nodes and another ``calls``.

    ``body`` is None when the site runs once per run of the graph; else how the outermost body that
    does not is run: ``"scan"``, ``"cond"``, ``"while_loop"``, ``"map"``, ``"associative_scan"``.
    """

    graph_module: fx.GraphModule
    contraction: fx.Node
    h: fx.Node
    x: fx.Node
    x_operand: fx.Node
    weight: fx.Node
    weight_operand: fx.Node
    transposed: bool
    operand_transposed: bool
    scale: float
    plain: bool
    bias: fx.Node | None
    d_model: int
    d_ff: int
    activation: str
    gated: bool
    kind: str
    notes: tuple[str, ...]
    top_weight: fx.Node
    merge: fx.Node | None
    view: GraphView
    calls: tuple[fx.Node, ...] = ()
    body: str | None = None

    @property
    def call(self) -> fx.Node | None:
        """The higher-order node in the outermost graph, None when the site lies there itself."""
        return self.calls[0] if self.calls else None


@dataclass(frozen=True, eq=False)
class Rejection:
    """A weighted contraction that is no MLP down-projection, and why."""

    node: fx.Node
    weight: fx.Node | None
    reason: str


@dataclass(frozen=True)
class MLPReport:
    """What was found, in graph order; sites in a body stand where the body is called.

    ``sites`` run once per run of the graph and can be rewritten in place. ``nested`` are MLPs in the
    body of a loop or a branch (``MLPSite.body`` says which): they are MLPs all right, but one node
    stands for several layers, or for none.
    """

    sites: tuple[MLPSite, ...]
    rejections: tuple[Rejection, ...]
    nested: tuple[MLPSite, ...] = ()

    @property
    def matched_count(self) -> int:
        """Number of sites."""
        return len(self.sites)


def find_mlps(gm: fx.GraphModule, is_static: StaticTest | None = None) -> MLPReport:
    """Find every MLP down-projection in ``gm``; the graph is not changed.

    ``is_static`` says which placeholders are weights. By default that is read off Dynamo's sources,
    and off the way an input is used when there are none.
    """
    finder = _Finder(gm, is_static)
    sites = tuple(s for s in finder.sites if s.body is None)
    nested = tuple(s for s in finder.sites if s.body is not None)
    return MLPReport(sites, tuple(finder.rejections), nested)


class _Finder:
    """One graph; bodies get their own, with the caller's taint mapped onto their placeholders."""

    def __init__(
        self,
        gm: fx.GraphModule,
        is_static: StaticTest | None,
        top: Mapping[fx.Node, fx.Node] | None = None,
    ) -> None:
        self.view = GraphView(gm, is_static)
        self.top = top or {}
        self.sites: list[MLPSite] = []
        self.rejections: list[Rejection] = []
        self._contractions = weighted_contractions(self.view)
        outcomes = {node: self._judge(c) for node, c in self._contractions.items()}
        found = [o[1] for o in outcomes.values() if not isinstance(o, str)]
        for node in self.view.nodes:
            for body in bodies(gm, node):
                self._enter(node, body)
            missed = near_miss(self.view, node)
            if missed is not None:
                self.rejections.append(Rejection(node, *missed))
            if node in outcomes:
                self._decide(node, outcomes[node], found)

    def _decide(self, node: fx.Node, outcome: _Outcome, found: list[Branch]) -> None:
        if not isinstance(outcome, str):
            site, branch = outcome
            if not is_adapter(self.view, branch, found):
                shared = is_shared_expert(self.view, branch, found)
                self.sites.append(replace(site, kind="shared") if shared else site)
                return
            outcome = f"bottleneck: {site.d_ff} hidden features for {site.d_model} (an adapter)"
        self.rejections.append(Rejection(node, self._contractions[node].weight, outcome))

    def _judge(self, down: Contraction) -> _Outcome:
        if not self.view.is_data(down.weight_operand) and self.view.is_product(down.weight_operand):
            return "its weight is a product of weights, not one weight"
        cone = trace_mlp(self.view, self._contractions, down)
        if isinstance(cone, str):
            return cone
        path = follow_output(self.view, self._contractions, down, cone.x)
        if path.refusal is not None:
            return path.refusal
        expands = down.d_in > down.d_out
        if path.merge is None:
            if path.nonlinear_use:
                return f"no residual, and {path.nonlinear_use} is applied to its output (a gate)"
            if not expands:
                return "no residual, and it does not contract a wider hidden layer"
        if cone.opaque and (path.merge is None or not expands):
            return "a foreign kernel stands before it, without both a residual and an expansion"
        notes = cone.notes
        if path.bypass:
            notes += ("joins a value that bypasses it, not a plain residual",)
        elif path.merge is None:
            notes += ("no residual in this graph",)
        routed = cone.routed or down.kind == "moe"
        site = MLPSite(
            graph_module=self.view.graph_module,
            contraction=down.node,
            h=down.h,
            x=cone.x,
            x_operand=cone.x_operand,
            weight=down.weight,
            weight_operand=down.weight_operand,
            transposed=down.transposed,
            operand_transposed=down.operand_transposed,
            scale=down.scale,
            plain=down.plain,
            bias=down.bias,
            d_model=down.d_out,
            d_ff=down.d_in,
            activation=cone.activation,
            gated=cone.gated,
            kind="moe" if routed else "dense",
            notes=notes,
            top_weight=self.top.get(down.weight, down.weight),
            merge=path.merge,
            view=self.view,
        )
        return site, Branch(down, cone.x, routed, path)

    def _enter(self, node: fx.Node, body: Body) -> None:
        """Search one body of a higher-order operator with the taint of its operands."""
        caller = body.caller
        top = {p: self.top.get(g, g) for p, g in caller.items()}

        def is_static(placeholder: fx.Node) -> bool:
            given = caller.get(placeholder)
            return given is not None and placeholder not in body.carried and not self.view.is_data(given)

        inner = _Finder(body.graph_module, is_static, top)
        self.rejections += inner.rejections
        if body.runs is None:
            reason = f"an MLP in the body of {body.operator}, which is not run as it stands"
            self.rejections += [Rejection(s.contraction, s.weight, reason) for s in inner.sites]
            return
        note = f"in the body of {body.operator}"
        runs = None if body.runs == ONCE else body.runs
        self.sites += [
            replace(s, notes=(*s.notes, note), calls=(node, *s.calls), body=runs or s.body)
            for s in inner.sites
        ]


_Outcome = tuple[MLPSite, Branch] | str
