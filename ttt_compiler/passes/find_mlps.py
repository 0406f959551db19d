"""Find the MLP down-projections of a captured graph by dataflow, never by name.

For every weighted contraction: what feeds it must be a nonlinear function, token by token, of
projections of one value x (``mlp_cone.py``), the widths must go d_model -> d_ff -> d_model, and the
result must join the residual stream (``residual.py``). Everything else is refused with a reason.

May be changed here: the acceptance rule, and which higher-order operators are looked into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from .activation import subgraph
from .contractions import Contraction, weighted_contractions
from .graph import GraphView, StaticTest
from .mlp_cone import trace_mlp
from .op_classes import higher_order_name
from .residual import follow_output

# Higher-order operators whose body runs exactly once, as if it stood in place of the operator.
_TRANSPARENT = (
    "tag_activation_checkpoint",
    "wrap_activation_checkpoint",
    "invoke_subgraph",
    "wrap",
    "wrap_with_set_grad_enabled",
    "wrap_with_autocast",
    "dynamo_bypassing_wrapper",
)

# nn.TransformerEncoderLayer in eval mode is one operation that contains its MLP.
_FUSED_ENCODER_LAYER = "_transformer_encoder_layer_fwd"
_FUSED_ENCODER_REASON = (
    "a fused encoder layer hides its MLP; call torch.backends.mha.set_fastpath_enabled(False)"
)


@dataclass(frozen=True, eq=False)
class MLPSite:
    """One down-projection ``h [.., d_ff] -> [.., d_model]`` and the MLP it belongs to.

    ``graph_module`` is the module whose graph holds the nodes: the captured one or the body of a
    higher-order operator. ``h`` is the data operand exactly as passed, ``x`` the value all
    up-projections read, behind casts, views and dropout, ``x_operand`` the same as one of
    them gets it. ``transposed`` tells that the root
    ``weight`` is stored ``[d_ff, d_model]``, ``operand_transposed`` that ``weight_operand`` (what the
    contraction gets: the root, a view of it, or a value computed from it) is; ``bias`` is given only if
    the contraction adds it.

    ``top_weight`` is the weight's placeholder in the outermost graph: the node whose source and
    example input identify the parameter when the site lies in a body (else it is ``weight``). A
    body that is called several times gives one site per call, told apart by ``top_weight`` only.

    ``merge`` is the addition that joins the residual stream, None when this graph has none; ``view``
    is what the graph was read through.
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


@dataclass(frozen=True, eq=False)
class Rejection:
    """A weighted contraction that is no MLP down-projection, and why."""

    node: fx.Node
    weight: fx.Node | None
    reason: str


@dataclass(frozen=True)
class MLPReport:
    """What was found, in graph order; sites in a body stand where the body is called."""

    sites: tuple[MLPSite, ...]
    rejections: tuple[Rejection, ...]

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
    return MLPReport(tuple(finder.sites), tuple(finder.rejections))


@dataclass(frozen=True, eq=False)
class _Candidate:
    site: MLPSite
    merge: fx.Node | None


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
        contractions = weighted_contractions(self.view)
        outcomes: dict[fx.Node, _Candidate | str] = {
            node: self._judge(contractions, c) for node, c in contractions.items()
        }
        candidates = [o for o in outcomes.values() if isinstance(o, _Candidate)]
        for node in self.view.nodes:
            operator_name = higher_order_name(node)
            if operator_name is not None:
                self._enter(node, operator_name)
            if self.view.name(node) == _FUSED_ENCODER_LAYER:
                self.rejections.append(Rejection(node, None, _FUSED_ENCODER_REASON))
            outcome = outcomes.get(node)
            if isinstance(outcome, _Candidate):
                outcome = self._refuse_bottleneck(outcome, candidates) or outcome
            if isinstance(outcome, _Candidate):
                self.sites.append(outcome.site)
            elif outcome is not None:
                self.rejections.append(Rejection(node, contractions[node].weight, outcome))

    def _judge(self, contractions: Mapping[fx.Node, Contraction], down: Contraction) -> _Candidate | str:
        cone = trace_mlp(self.view, contractions, down)
        if isinstance(cone, str):
            return cone
        path = follow_output(self.view, down, cone.x)
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
            bias=down.bias,
            d_model=down.d_out,
            d_ff=down.d_in,
            activation=cone.activation,
            gated=cone.gated,
            kind="moe" if cone.routed or down.kind == "moe" else "dense",
            notes=notes,
            top_weight=self.top.get(down.weight, down.weight),
            merge=path.merge,
            view=self.view,
        )
        return _Candidate(site, path.merge)

    def _refuse_bottleneck(self, candidate: _Candidate, candidates: list[_Candidate]) -> str | None:
        """Refuse an adapter; a narrow *shared expert* works beside another MLP, not behind it."""
        site = candidate.site
        if site.kind == "moe" or site.d_ff >= site.d_model:
            return None
        for other in candidates:
            beside = (
                other is not candidate
                and candidate.merge is not None
                and other.merge is candidate.merge
                and not self.view.depends_on(site.x, other.site.contraction)
            )
            same_size = other.site.d_ff == site.d_ff or other.site.d_ff >= site.d_model
            if beside and (other.site.kind == "moe" or same_size):
                return None
        return f"bottleneck: {site.d_ff} hidden features for {site.d_model} (an adapter)"

    def _enter(self, node: fx.Node, name: str) -> None:
        """Search the bodies of a higher-order operator with the taint of its operands."""
        for place, operand in enumerate(node.args):
            body = subgraph(self.view.graph_module, operand)
            if body is None:
                continue
            given = [a for a in node.args[place + 1 :] if not isinstance(a, str)]
            inner = self._search_body(body, given)
            if name in _TRANSPARENT:
                note = f"in the body of {name}"
                self.sites += [replace(s, notes=(*s.notes, note)) for s in inner.sites]
            else:
                reason = f"an MLP in the body of {name}, which does not run once per call"
                self.rejections += [Rejection(s.contraction, s.weight, reason) for s in inner.sites]
            self.rejections += inner.rejections

    def _search_body(self, body: fx.GraphModule, given: Sequence[object]) -> _Finder:
        placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
        # Operands that precede the lifted values (flags, other bodies) leave the tail aligned.
        aligned = zip(reversed(placeholders), reversed(given), strict=False)
        caller = {p: g for p, g in aligned if isinstance(g, fx.Node)}
        top = {p: self.top.get(g, g) for p, g in caller.items()}

        def is_static(node: fx.Node) -> bool:
            return node in caller and not self.view.is_data(caller[node])

        return _Finder(body, is_static, top)
