"""networkx as an oracle: x is the nearest dominator of h with an up-projection between.

A dominator of h is a value that every path from the model's inputs to h passes. That is another definition
of an MLP's input than the detector's walk (strip layouts, compare what the projections read), computed by
another library on another graph; the two must agree. Up-projections are taken here to be the contractions
with a weight between the candidate and h, so this checks x, not what is an MLP.
"""

from __future__ import annotations

import networkx as nx
import pytest
from torch import fx

from tests.passes.capture import capture_lm
from tests.passes.families import FAMILIES, SHARED
from ttt_compiler.passes.contractions import weighted_contractions
from ttt_compiler.passes.find_mlps import MLPSite, find_mlps
from ttt_compiler.passes.graph import GraphView
from ttt_compiler.passes.mlp_cone import strip_layout

ROOT = "inputs"
ALL = {**FAMILIES, **SHARED}


def data_flow(view: GraphView) -> nx.DiGraph:
    """Data values only, in their versions after in-place writes, under one common root."""
    graph = nx.DiGraph()
    for node in view.nodes:
        if view.is_data(node):
            graph.add_edges_from((source, node) for source in view.data_inputs(node))
            if node.op == "placeholder":
                graph.add_edge(ROOT, node)
    return graph


def dominator_x(view: GraphView, dominators: dict[object, object], site: MLPSite) -> fx.Node:
    """The nearest dominator of h that a weighted contraction lies behind, layouts stripped."""
    contractions = weighted_contractions(view)
    ups = [n for n in contractions if n is not site.contraction and view.depends_on(site.h, n)]
    node = dominators[site.h]
    while isinstance(node, fx.Node):
        # A fused gate-and-up projection dominates h itself: x is what lies before it.
        if node not in contractions and any(view.depends_on(u, node) for u in ups):
            return strip_layout(view, node, site.d_model)[0]
        node = dominators[node]
    raise AssertionError("h is not computed from one value")


@pytest.mark.parametrize("name", ALL)
def test_x_is_the_dominator(name: str) -> None:
    options = {} if name == "bert" else {"use_cache": False}
    gm = capture_lm(ALL[name].build(), **options)
    view = GraphView(gm)
    dominators = nx.immediate_dominators(data_flow(view), ROOT)
    sites = find_mlps(gm).sites
    assert len(sites) == ALL[name].count
    for site in sites:
        assert dominator_x(view, dominators, site) is site.x


def test_the_oracle_can_disagree() -> None:
    """Were x one step further up, or the down-projection's own operand, it would be noticed."""
    gm = capture_lm(FAMILIES["llama"].build(), use_cache=False)
    view = GraphView(gm)
    dominators = nx.immediate_dominators(data_flow(view), ROOT)
    site = find_mlps(gm).sites[0]
    assert dominator_x(view, dominators, site) not in (site.h, *view.data_inputs(site.x))
