"""Pass: find the MLPs of a graph by dataflow and pair them with the markers that conversion placed.

The marker says *that* a projection was chosen, dataflow says *which* contraction it is and what feeds it.
May be changed here: how the two are paired.
"""

from __future__ import annotations

from torch import fx

from ttt_compiler.errors import GraphRewriteError
from ttt_compiler.passes.base import (
    MARKER,
    BoundSite,
    GraphPass,
    PassState,
    graph_modules,
    is_op,
    markers,
)
from ttt_compiler.passes.find_mlps import MLPSite, find_mlps
from ttt_compiler.spec import SiteSpec


class MatchMarkers(GraphPass):
    """Fills ``state.report`` and ``state.sites``; every marker must belong to exactly one MLP."""

    name = "match_markers"

    def run(self, state: PassState) -> int:
        """Returns the number of markers.

        Raises:
            GraphRewriteError: a marker does not feed a detected MLP down-projection.
        """
        state.report = find_mlps(state.gm)
        by_marker: dict[fx.Node, MLPSite] = {}
        for site in state.report.sites:
            marker = _marker_of(site.h)
            if marker is not None:
                by_marker[marker] = site
        for gm in graph_modules(state.gm):
            for marker in markers(gm):
                spec = SiteSpec.decode(str(marker.args[1]))
                if marker not in by_marker:
                    raise GraphRewriteError(_explain(state, marker, spec))
                state.sites.append(BoundSite(marker, by_marker[marker], spec))
        return len(state.sites)


def _marker_of(h: fx.Node) -> fx.Node | None:
    """The marker that ``h`` is a view of, if any."""
    node = h
    while not is_op(node, MARKER):
        if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
        if len(node.users) != 1 and not is_op(node, MARKER):
            return None
    return node


def _explain(state: PassState, marker: fx.Node, spec: SiteSpec) -> str:
    reached = {marker}
    reasons = []
    for node in marker.graph.nodes:
        if any(a in reached for a in node.all_input_nodes):
            reached.add(node)
            reasons += [r.reason for r in state.report.rejections if r.node is node]
        if reasons:
            break
    why = f" ({reasons[0]})" if reasons else ""
    return (
        f"{spec.key}: in this graph its input is not recognised as an MLP's hidden activation{why}. "
        "The graph "
        "may be cut by a graph break inside of the MLP: compile with fullgraph=True to see where. To "
        "leave this "
        "block out, pass layers=[...] without it"
    )
