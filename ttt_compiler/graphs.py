"""``ttt.rewrite``: the same passes on a graph that somebody else captured.

For graphs of ``torch.export``, ``torch.fx.symbolic_trace`` and ``make_fx``. The result is stateless and
differentiable: one call is one pass over whole documents. Running sequences need ``ttt.convert`` and
``torch.compile``. May be changed here: which graphs are understood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ttt_compiler.codegen import ops  # noqa: F401  (registers the ops)
from ttt_compiler.compat import (
    fork_graph_module,
    graph_inputs,
    inline_modules,
    is_exported,
    meta_tensor,
    propagate_shapes,
)
from ttt_compiler.config import TTTConfig
from ttt_compiler.conversion import initial_parameters, site_specs
from ttt_compiler.discover import probed_positions, with_other_token
from ttt_compiler.discovery.found import Discovery
from ttt_compiler.discovery.recorder import Recorder
from ttt_compiler.eligibility import check_sites
from ttt_compiler.errors import UnsupportedModelError
from ttt_compiler.passes.find_mlps import MLPSite, find_mlps
from ttt_compiler.passes.graph import GraphView
from ttt_compiler.passes.pipeline import run_pipeline
from ttt_compiler.runtime.documents import require_padding_mask
from ttt_compiler.runtime.root import REWRITTEN
from ttt_compiler.spec import SiteSpec


def rewrite(
    graph: fx.GraphModule | torch.export.ExportedProgram,
    config: TTTConfig | None = None,
    *,
    example_inputs: tuple[Sequence[Any], Mapping[str, Any]] | None = None,
) -> fx.GraphModule:
    """Turn the chosen MLP down-projections of a captured graph into fast weights.

    Args:
        graph: an exported program, its ``module()``, or a graph module of ``symbolic_trace`` or ``make_fx``.
        config: defaults to ``TTTConfig()``.
        example_inputs: ``(args, kwargs)`` of one call, batch and tokens first. An exported program has its
            own; without any, shapes must stand in the graph, and whether it is causal is not checked.

    Returns:
        A new graph module with the weights of the given one and, as parameters, ``ttt_conv_...`` (zeros)
        and ``ttt_proj_...`` per weight: until they are trained it computes what the given one does.
        Positions and padding are read from inputs called ``position_ids`` and ``attention_mask``.

    Raises:
        NoMLPFoundError, LayerSelectionError, NonCausalModelError: as :func:`ttt_compiler.convert`.
        UnsupportedModelError: the graph has no shapes and no example inputs were given.
        GraphRewriteError: a site cannot be rewritten.
        PositionError: an ``attention_mask`` of two dimensions that does not mark padding.
    """
    config = TTTConfig() if config is None else config
    if is_exported(graph):
        example_inputs = example_inputs or graph.example_inputs
        graph = graph.module()
    assert isinstance(graph, fx.GraphModule)
    gm = fork_graph_module(inline_modules(graph))
    values = None if example_inputs is None else graph_inputs(gm, *example_inputs)
    _require_shapes(gm, values)
    found = _discover(gm, values)
    chosen = check_sites(gm, config, found)
    sites = find_mlps(gm).sites
    specs = {mlp.weight: site_specs(config, mlp, found, gm) for mlp in chosen}
    for mlp in chosen:
        places = (s for s in sites if str(s.top_weight.target) == mlp.weight)
        for site, spec in zip(places, specs[mlp.weight], strict=True):
            _mark(gm, site, spec, mlp.dtype)
    result = run_pipeline(gm).gm
    result.__dict__[REWRITTEN] = tuple(s.encode() for places in specs.values() for s in places)
    return result


def _require_shapes(gm: fx.GraphModule, values: Sequence[Any] | None) -> None:
    if all(meta_tensor(n) is not None for n in gm.graph.nodes if n.op == "get_attr"):
        inner = [n for n in gm.graph.nodes if n.op == "call_function"]
        if any(meta_tensor(n) is not None for n in inner):
            return
    if values is None:
        raise UnsupportedModelError(
            "the graph carries no shapes. Type ttt.rewrite(graph, config, example_inputs=((x,), {})) with "
            "one batch x [batch, tokens, ...], or capture it with torch.export"
        )
    propagate_shapes(gm, values)


def _discover(gm: fx.GraphModule, values: Sequence[Any] | None) -> Discovery:
    """Find and, with inputs, probe; weights that are inputs of the graph go by the input's name."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    given = dict(zip(placeholders, values, strict=True)) if values is not None else {}
    recorder = Recorder(gm, {id(x): str(n.target) for n, x in given.items() if isinstance(x, Tensor)})
    run = recorder(gm, list(given.values()))
    leading = None
    with torch.no_grad():
        if values is None:
            recorder.without_running(gm)
        else:
            data = [x for n, x in given.items() if GraphView(gm).is_data(n) and isinstance(x, Tensor)]
            first = next((x for x in data if x.dim() >= 2), None)
            run(*values)
            for position in () if first is None else probed_positions([first], {}):
                assert first is not None
                leading = (int(first.shape[0]), int(first.shape[1]))
                if (changed := with_other_token([first], {}, position)) is not None:
                    recorder.start_run(position)
                    run(*(changed[0][0] if x is first else x for x in values))
    return recorder.result(leading)


def _mark(gm: fx.GraphModule, site: MLPSite, spec: SiteSpec, dtype: torch.dtype) -> None:
    """Put conv and P on the module and a marker in front of the contraction, as a converted module would."""
    weight = meta_tensor(site.weight)
    assert weight is not None
    if spec.conv_name not in gm._parameters:
        conv, proj = initial_parameters(spec, dtype, weight.device, None)
        gm.register_parameter(spec.conv_name, conv)
        gm.register_parameter(spec.proj_name, proj)
    graph = site.contraction.graph
    inputs = _Inputs(gm)
    with graph.inserting_before(site.contraction):
        added = [_attribute(gm, graph, name) for name in (spec.conv_name, spec.proj_name)]
        tokens, pos = inputs.tokens(), inputs.positions(graph)
        anchor = tokens if tokens is not None else site.h
        marker = graph.call_function(
            torch.ops.ttt.site.default,
            (anchor, site.weight, spec.encode(), *added, tokens, pos, None, None, None, None),
        )
        marker.meta = {k: v for k, v in anchor.meta.items() if k in ("val", "example_value")}


def _attribute(gm: fx.GraphModule, graph: fx.Graph, name: str) -> fx.Node | None:
    value = gm._parameters[name]
    if value is None:
        return None
    node = graph.get_attr(name)
    node.meta["val"] = value.detach()
    return node


class _Inputs:
    """The inputs of a graph by what they mean."""

    def __init__(self, gm: fx.GraphModule) -> None:
        view = GraphView(gm)
        self._given: dict[str, fx.Node] = {
            str(n.target): n for n in gm.graph.find_nodes(op="placeholder") if view.is_data(n)
        }

    def tokens(self) -> fx.Node | None:
        """The first input of at least two dimensions: ids or embeddings."""
        for node in self._given.values():
            value = meta_tensor(node)
            if value is not None and value.dim() >= 2:
                return node
        return None

    def positions(self, graph: fx.Graph) -> fx.Node | None:
        """Position ids, negative where a 2-D attention mask is 0; None when the graph has neither."""
        pos, mask = self._named("position_ids", (1, 2)), self._named("attention_mask", (1, 2))
        value = None if pos is None else meta_tensor(pos)
        if pos is not None and value is not None and value.dim() == 1:
            pos = graph.call_method("unsqueeze", (pos, 0))
        if mask is None:
            return pos
        padding_mask, tokens = meta_tensor(mask), self.tokens()
        rows = None if tokens is None else meta_tensor(tokens)
        if padding_mask is not None and padding_mask.dim() == 2 and rows is not None:
            require_padding_mask(padding_mask, rows)
        mask = graph.call_method("long", (mask,))
        if pos is None:
            counted = graph.call_method("cumsum", (mask, -1))
            pos = graph.call_method("sub", (counted, 1))
        padding = graph.call_method("eq", (mask, 0))
        masked: fx.Node = graph.call_method("masked_fill", (pos, padding, -1))
        return masked

    def _named(self, name: str, dims: tuple[int, ...]) -> fx.Node | None:
        node = self._given.get(name)
        value = None if node is None else meta_tensor(node)
        return node if value is not None and value.dim() in dims else None
