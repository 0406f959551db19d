"""Pass: find the MLPs of a graph by dataflow and pair them with the markers that conversion placed.

The marker says *that* a weight was chosen, dataflow says *which* contractions apply it and what feeds them.
The weight pairs the two: it is the same node for both. May be changed here: how they are paired.
"""

from __future__ import annotations

from torch import fx

from ttt_compiler.compat import module_stack, wrapper_of
from ttt_compiler.errors import GraphRewriteError
from ttt_compiler.passes.base import (
    BoundSite,
    GraphPass,
    PassState,
    graph_modules,
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
            GraphRewriteError: a marker has no MLP down-projection of its weight, or not its own.
        """
        state.report = find_mlps(state.gm)
        # Keyed by contraction: a body that is called several times holds one contraction, one marker.
        found = {s.contraction: s for s in reversed(state.report.sites)}
        sites = sorted(found.values(), key=state.report.sites.index)
        for gm in graph_modules(state.gm):
            by_weight: dict[fx.Node, list[fx.Node]] = {}
            for marker in markers(gm):
                by_weight.setdefault(_weight(marker), []).append(marker)
            for weight, group in by_weight.items():
                # In its own graph, or (marked at the start of the model) in the body of an operator.
                places = [s for s in sites if s.weight is weight and s.graph_module is gm]
                places = places or [s for s in sites if s.top_weight is weight]
                self._pair(state, group, places)
        return len(state.sites)

    def _pair(self, state: PassState, group: list[fx.Node], places: list[MLPSite]) -> None:
        """A marker stands for the first place, in order, inside of the module call that emitted it."""
        specs = [SiteSpec.decode(str(m.args[2])) for m in group]
        if not places:
            raise GraphRewriteError(_explain(state, group[0], specs[0]))
        if len(places) != len(group):
            raise GraphRewriteError(
                f"{specs[0].weight}: {len(group)} places of the model apply it, but this graph has "
                f"{len(places)} MLPs with it. Type ttt.revert(model) and convert it with example_inputs that "
                "run all of its places"
            )
        running = [s.key for m, s in zip(group, specs, strict=True) if m.args[7] is not None]
        if len(set(running)) < len(running):
            raise GraphRewriteError(
                f"{specs[0].key}: this call applies it in more places than were seen at conversion, and they "
                "would share one state. Type ttt.revert(model) and convert it with example_inputs that run "
                "all of its places"
            )
        left = list(places)
        # Innermost modules first: a call that holds another one must leave it its place.
        order = sorted(zip(group, specs, strict=True), key=lambda pair: -len(module_stack(pair[0])))
        for marker, spec in order:
            own = module_stack(marker)[:1]
            site = next((s for s in left if not own or own[0] in module_stack(s.contraction)), None)
            if site is None:
                raise GraphRewriteError(_explain(state, marker, spec))
            left.remove(site)
            state.sites.append(BoundSite(marker, site, spec))


def _weight(marker: fx.Node) -> fx.Node:
    weight = marker.args[1]
    assert isinstance(weight, fx.Node)
    # A quantised weight was marked by a plain tensor inside of it.
    return wrapper_of(weight) or weight


def _explain(state: PassState, marker: fx.Node, spec: SiteSpec) -> str:
    weight = _weight(marker)
    reasons = [r.reason for r in state.report.rejections if r.weight is weight]
    why = f": {reasons[0]}" if reasons else ": no contraction applies it in this graph"
    return (
        f"{spec.key}: here it is not recognised as the down-projection of an MLP{why}. A graph break inside "
        "of the MLP cuts it in two: compile with fullgraph=True to see where. To leave this block out, pass "
        "layers=[...] without it"
    )
