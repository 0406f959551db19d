"""Pass: turn every bound down-projection into a fast-weight node.

With state tensors in the marker: one mutating ``ttt::fast_weight_step``. Without: ``ttt::chunk_conv``, the
projection P as an ordinary matmul with eta folded in, and ``ttt::chunk_scan``, all differentiable. What
stood around the contraction (bias adds, dropout, norms, residual) is untouched. May be changed here: the
replacement, together with the op schemas.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ttt_compiler.compat import meta_tensor
from ttt_compiler.errors import GraphRewriteError
from ttt_compiler.passes.base import BoundSite, GraphPass, PassState


class RewriteFastWeights(GraphPass):
    """Replaces marker and contraction; fills ``state.fast_nodes``."""

    name = "rewrite"

    def run(self, state: PassState) -> int:
        """Returns the number of projections replaced.

        Raises:
            GraphRewriteError: the hidden activation does not arrive as ``[batch, tokens, F]``.
        """
        for site in state.sites:
            state.fast_nodes.append(_rewrite(site))
        for gm in {s.mlp.graph_module for s in state.sites} | {state.gm}:
            gm.recompile()
        return len(state.sites)


def _rewrite(site: BoundSite) -> fx.Node:
    marker, mlp, spec = site.marker, site.mlp, site.spec
    graph, contraction = marker.graph, mlp.contraction
    h, _, conv, proj, pos, *state = marker.args
    assert isinstance(h, fx.Node)
    assert site.target is not None
    value = meta_tensor(h)
    if value is None or value.dim() != 3:
        raise GraphRewriteError(
            f"{spec.key}: its input has {'no known' if value is None else value.dim()} dimensions; "
            "fast weights "
            "need [batch, tokens, width]. Leave the block out with layers=[...]"
        )
    out = meta_tensor(contraction)
    assert out is not None
    with graph.inserting_before(contraction):
        b = _Builder(graph, out.dtype)
        t = _sequence_shaped(b, site.target, h)
        w0 = b.method("t", mlp.weight) if mlp.transposed else mlp.weight
        h, t, w0 = b.cast(h), b.cast(t), b.cast(w0)
        bias, conv, proj = (None if x is None else b.cast(x) for x in (mlp.bias, conv, proj))
        if state[0] is None:
            v = b.call(torch.ops.ttt.chunk_conv.default, t, conv, pos, spec.chunk)
            if proj is None:
                v = b.call(operator.mul, v, spec.lr)
            else:
                v = b.call(torch.matmul, v, b.call(operator.mul, proj, spec.lr))
            fast = b.call(torch.ops.ttt.chunk_scan.default, h, v, w0, bias, pos, spec.chunk)
        else:
            fast = b.call(
                torch.ops.ttt.fast_weight_step.default,
                h,
                t,
                w0,
                bias,
                conv,
                proj,
                pos,
                spec.encode(),
                *state,
            )
        y = fast if out.dim() == 3 else b.method("reshape", fast, -1, spec.d_model)
    y.meta = dict(contraction.meta)
    for name in ("stack_trace", "nn_module_stack"):
        if name in contraction.meta:
            fast.meta[name] = contraction.meta[name]
    contraction.replace_all_uses_with(y)
    _erase_between(contraction, marker)
    return fast


def _sequence_shaped(b: _Builder, t: fx.Node, h: fx.Node) -> fx.Node:
    """t as ``[B, T, Dt]``; some models flatten tokens before their MLP."""
    value = meta_tensor(t)
    if value is not None and value.dim() == 3:
        return t
    return b.method("reshape", t, b.method("size", h, 0), b.method("size", h, 1), -1)


def _erase_between(contraction: fx.Node, marker: fx.Node) -> None:
    """Drop the contraction, the views that fed it, and the marker."""
    graph = marker.graph
    inputs = contraction.all_input_nodes
    graph.erase_node(contraction)
    pending = list(inputs)
    while pending:
        node = pending.pop()
        if node is not marker and node.op in ("call_function", "call_method") and not node.users:
            pending += node.all_input_nodes
            graph.erase_node(node)
    source = marker.args[0]
    assert isinstance(source, fx.Node)
    marker.replace_all_uses_with(source)
    graph.erase_node(marker)


class _Builder:
    """Creates nodes at the insertion point; casts operands to the contraction's dtype (autocast)."""

    def __init__(self, graph: fx.Graph, dtype: torch.dtype) -> None:
        self.graph = graph
        self.dtype = dtype

    def call(self, target: object, *args: object) -> fx.Node:
        return self.graph.call_function(target, args)  # type: ignore[arg-type]

    def method(self, name: str, *args: object) -> fx.Node:
        return self.graph.call_method(name, args)  # type: ignore[arg-type]

    def cast(self, node: object) -> fx.Node:
        assert isinstance(node, fx.Node)
        value = meta_tensor(node)
        if value is None or value.dtype == self.dtype:
            return node
        return self.method("to", node, self.dtype)
