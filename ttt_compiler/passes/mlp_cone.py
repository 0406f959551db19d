"""The hidden half of an MLP: from a contraction's operand back to the projections that feed it.

:func:`trace_mlp` answers with an :class:`MLPCone` (the common input x, the activation, whether it
is gated) or with the reason why what lies behind the operand is no MLP.

May be changed here: which operations may stand between the up- and the down-projection, and what
counts as a nonlinearity. What happens after the down-projection is in ``residual.py``.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from .activation import find_activation, inlined_pointwise, looks_like_fused_activation
from .contractions import Contraction
from .graph import GraphView
from .op_classes import PERMUTING, SELECTING, OpClass
from .tokens import TokensMixError, follow_axes, token_count, tokens_as_features

_MAX_NODES = 160
_MAX_LAYERS = 4
_LAYOUT = (OpClass.VIEW, OpClass.CAST, OpClass.DROPOUT)
_ONE_OPERAND = (*_LAYOUT, OpClass.SPLIT, OpClass.NORM, OpClass.REDUCE)

Contractions = Mapping[fx.Node, Contraction]


@dataclass(frozen=True, eq=False)
class Up:
    """One up-projection: what it reads (after stripping) and its widths."""

    contraction: Contraction
    x: fx.Node
    d_in: int
    d_out: int
    routed: bool  # its input was picked out of x by an index tensor


@dataclass(frozen=True, eq=False)
class MLPCone:
    """Everything between x and the data operand of a down-projection."""

    x: fx.Node
    x_operand: fx.Node  # x as an up-projection gets it, in the layout of the hidden activation
    activation: str
    gated: bool
    routed: bool
    opaque: bool  # a foreign kernel stands where the activation is expected
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Region:
    """Nodes between the up-projections (exclusive) and the operand (inclusive), in graph order."""

    nodes: tuple[fx.Node, ...]
    ups: tuple[fx.Node, ...]
    opaque: frozenset[fx.Node]


def trace_mlp(view: GraphView, contractions: Contractions, down: Contraction) -> MLPCone | str:
    """Return the MLP behind ``down`` or, in a few plain words, why there is none."""
    return _trace(view, contractions, down.data, down.d_in, down.d_out, layers=2)


def _trace(
    view: GraphView,
    contractions: Contractions,
    operand: fx.Node,
    d_ff: int,
    d_model: int,
    layers: int,
) -> MLPCone | str:
    region = _collect(view, contractions, operand, d_ff)
    if isinstance(region, str):
        return region
    ups = _common_input(view, contractions, region.ups)
    if isinstance(ups, str):
        return ups
    if any(tokens_as_features(view, n) for n in (operand, *(u.contraction.data for u in ups))):
        return "mixes tokens: the token axis stands where features are contracted"
    parts = any(view.op_class(n) is OpClass.SPLIT or view.name(n) == "glu" for n in region.nodes)
    wider_is_fine = parts or bool(region.opaque)
    for up in ups:
        if up.d_out != d_ff and not (wider_is_fine and up.d_out > d_ff):
            return f"width: a projection of width {up.d_out} feeds a contraction over {d_ff}"
    routed = _stays_with_tokens(view, region, operand, d_ff, ups)
    if isinstance(routed, str):
        return routed
    found = find_activation(view, region, operand, d_ff)
    if found is None:
        return "no nonlinearity between the projections (low-rank or linear chain)"
    notes = []
    if region.opaque:
        notes.append("the activation is a foreign kernel: " + found.name)
    if any(up.d_in != up.contraction.d_in for up in ups):
        notes.append("low-rank side path beside an up-projection")
    if any(_reorders_tokens(view, up) for up in ups):
        notes.append("its token axes are permuted between x and the projections")
    cone = MLPCone(
        x=ups[0].x,
        x_operand=next((u.contraction.h for u in ups if u.d_in == u.contraction.d_in), ups[0].x),
        activation=found.name,
        gated=found.gated,
        routed=routed or any(u.routed or u.contraction.kind == "moe" for u in ups),
        opaque=bool(region.opaque),
        notes=tuple(notes),
    )
    if all(up.d_in == d_model for up in ups):
        return cone
    # The input has another width: a deeper MLP, if what feeds these projections is one more layer.
    widths = sorted({up.d_in for up in ups})
    if len(ups) == 1 and layers < _MAX_LAYERS:
        last = ups[0].contraction
        inner = _trace(view, contractions, last.data, last.d_in, d_model, layers + 1)
        if isinstance(inner, MLPCone):
            note = f"{layers + 1} layers deep"
            notes_of_both = (note, *(n for n in inner.notes if "deep" not in n), *cone.notes)
            return replace(cone, x=inner.x, x_operand=inner.x_operand, notes=notes_of_both)
    return f"width: reads {', '.join(map(str, widths))} features but returns {d_model}"


def _stays_with_tokens(
    view: GraphView, region: Region, operand: fx.Node, d_ff: int, ups: list[Up]
) -> bool | str:
    """Whether tokens are routed inside of the region, or why it is not token by token."""
    try:
        routed = follow_axes(view, region.nodes, region.ups, operand)
    except TokensMixError as e:
        return str(e)
    after = token_count(view, operand, d_ff)
    for up in ups:
        before = token_count(view, up.contraction.node, up.contraction.d_out)
        if not routed and None not in (before, after) and before != after:
            return f"mixes tokens: {before} tokens are projected, {after} are contracted"
    return routed


def _reorders_tokens(view: GraphView, up: Up) -> bool:
    """Whether x has its token axes in another order than the projection that reads it."""
    node = up.contraction.data
    while node is not up.x and view.data_inputs(node):
        if view.name(node) in PERMUTING:
            return True
        node = view.inputs(node)[0]
    return False


def strip_layout(view: GraphView, node: fx.Node, width: int | None) -> tuple[fx.Node, bool]:
    """Walk back through views, casts, dropout and token selection to the value itself.

    Returns it and whether an index tensor picked tokens on the way. Of the values passed, the
    earliest that has ``width`` features is returned, so that merging heads is not stripped.
    """
    best, routed = node, False
    selected = False
    while True:
        inputs = view.data_inputs(node)
        op_class = view.op_class(node)
        if op_class is OpClass.GATHER and view.name(node) in SELECTING:
            selected = True
        elif op_class not in _LAYOUT:
            return best, routed
        first = view.inputs(node)[0]
        if first not in inputs:
            return best, routed
        node = first
        if width is None or view.width(node) == width:
            best, routed = node, selected


def _collect(view: GraphView, contractions: Contractions, operand: fx.Node, d_ff: int) -> Region | str:
    """Walk back from ``operand``, latest node first.

    That order meets an up-projection before its own input, so ``act(W x) * x`` stops at x.
    """
    nodes: list[fx.Node] = []
    ups: list[fx.Node] = []
    opaque: set[fx.Node] = set()
    boundary: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    heap = [(-view.order[operand], operand)]
    while heap:
        _, node = heapq.heappop(heap)
        if node in seen or not view.is_data(node):
            continue
        seen.add(node)
        if node in boundary:
            continue
        if node in contractions:
            ups.append(node)
            read = contractions[node]
            boundary |= {read.data, strip_layout(view, read.data, read.d_in)[0]}
            continue
        if view.gathered_root(node) is not None:
            continue  # a bias or scale of the routed expert
        reason = _blocks(view, node)
        if reason is not None:
            return reason
        if view.op_class(node) is OpClass.OTHER and inlined_pointwise(view, node) is None:
            opaque.add(node)
        nodes.append(node)
        if len(nodes) > _MAX_NODES:
            return "too many operations before the contraction"
        for source in feature_sources(view, node, d_ff):
            heapq.heappush(heap, (-view.order[source], source))
    if not ups:
        return "no projection before it"
    return Region(tuple(reversed(nodes)), tuple(reversed(ups)), frozenset(opaque))


def _blocks(view: GraphView, node: fx.Node) -> str | None:
    """Why this node cannot stand between the projections of an MLP, None when it can."""
    name, op_class = view.name(node), view.op_class(node)
    if node.op == "placeholder":
        return f"reads the graph input {node.name} without a projection"
    if op_class is OpClass.MIX:
        if name in ("embedding", "embedding_bag"):
            return "reads the residual stream (an embedding is reached without a projection)"
        return f"follows {name}, which mixes tokens or features"
    if op_class is OpClass.CONTRACT:
        return f"follows {name} of activations, not of one weight (attention, or a computed weight)"
    if name in ("cat", "stack", "hstack", "vstack"):
        return _joined(view, node, name)
    if op_class is OpClass.OTHER:
        known = inlined_pointwise(view, node) is not None
        if not known and not looks_like_fused_activation(view, node):
            return f"follows {name}, an operation of unknown effect"
    return None


def _joined(view: GraphView, node: fx.Node, name: str) -> str:
    parts = [i for i in view.data_inputs(node) if view.width(i) is not None]
    whole = view.width(node)
    widths = [w for p in parts if (w := view.width(p)) is not None]
    if name == "cat" and len(parts) > 1 and whole is not None and sum(widths) == whole:
        sizes = " + ".join(map(str, widths))
        return f"follows cat of {len(parts)} values ({sizes} features): one projection of several branches"
    return f"follows {name}: the hidden activation is joined with other values or tokens"


def feature_sources(view: GraphView, node: fx.Node, d_ff: int) -> list[fx.Node]:
    """Inputs that the features are made of."""
    inputs = view.data_inputs(node)
    if view.op_class(node) in _ONE_OPERAND or view.name(node) in SELECTING:
        return inputs[:1]
    if view.name(node) in ("mul", "div", "masked_fill", "where") and d_ff != 1:
        # A factor per token (norm statistic, router weight, mask) does not say what h is made of.
        wide = [i for i in inputs if view.width(i) != 1]
        return wide or inputs
    return inputs


def _common_input(view: GraphView, contractions: Contractions, nodes: tuple[fx.Node, ...]) -> list[Up] | str:
    """Describe the up-projections; all of them must read one value.

    A low-rank pair ``B(A(x))`` beside an up-projection is taken as one projection of x.
    """
    ups = []
    for node in nodes:
        up = contractions[node]
        x, routed = strip_layout(view, up.data, up.d_in)
        ups.append(Up(up, x, up.d_in, up.d_out, routed))
    while len({up.x for up in ups}) > 1:
        latest = max(ups, key=lambda up: view.order[up.x])
        lower = _linear_source(view, contractions, latest.x)
        if lower is None:
            names = list(dict.fromkeys(up.x.name for up in ups))
            return (
                f"its {len(ups)} projections read {len(names)} different inputs ({', '.join(names)}), "
                "not one value"
            )
        x, routed = strip_layout(view, lower.data, lower.d_in)
        moved = replace(latest, x=x, d_in=lower.d_in, routed=routed or latest.routed)
        ups[ups.index(latest)] = moved
    return ups


def _linear_source(view: GraphView, contractions: Contractions, node: fx.Node) -> Contraction | None:
    """Return the contraction that ``node`` is a scaled view of, if it is one."""
    while node not in contractions:
        inputs = view.data_inputs(node)
        linear = view.op_class(node) in (*_LAYOUT, OpClass.SPLIT)
        scaled = view.name(node) in ("mul", "div", "add") and len(inputs) == 1
        if not inputs or not (linear or scaled):
            return None
        node = inputs[0]
    return contractions[node]
