"""Pass: turn every bound down-projection into a fast-weight node.

With state tensors in the marker: one mutating ``ttt::fast_weight_step``. Without: ``ttt::chunk_values`` (on
GPUs ``ttt::chunk_conv`` and an ordinary matmul) with eta folded into the taps, and ``ttt::chunk_scan``, all
differentiable. What stood around the contraction (bias adds, dropout, norms, residual) is untouched. May be
changed here: the replacement, together with the op schemas.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ttt_compiler.compat import is_wrapper_tensor, meta_tensor
from ttt_compiler.errors import GraphRewriteError
from ttt_compiler.passes.base import BoundSite, GraphPass, PassState
from ttt_compiler.passes.sequence_layout import SequenceLayout
from ttt_compiler.spec import WriteRule, state_dtype
from ttt_compiler.stand_in import runs_on_cpu


class RewriteFastWeights(GraphPass):
    """Replaces marker and contraction; fills ``state.fast_nodes``."""

    name = "rewrite"

    def run(self, state: PassState) -> int:
        """Returns the number of projections replaced.

        Raises:
            GraphRewriteError: the hidden activation is not one row of features per token, or an update
                control needs what this layer does not have.
        """
        for site in state.sites:
            state.fast_nodes.append(_rewrite(site))
        for gm in {s.mlp.graph_module for s in state.sites} | {state.gm}:
            gm.recompile()
        return len(state.sites)


def _rewrite(site: BoundSite) -> fx.Node:
    mlp, spec = site.mlp, site.spec
    contraction = mlp.contraction
    graph = contraction.graph
    assert site.target is not None
    out = meta_tensor(contraction)
    assert out is not None
    with graph.inserting_before(contraction):
        b = _Builder(graph, out.dtype, out.device)
        layout = SequenceLayout(site, graph)
        h, t = b.cast(layout.sequence(mlp.h)), b.cast(layout.sequence(site.target))
        keeps_base = not mlp.plain or is_wrapper_tensor(meta_tensor(mlp.weight_operand))
        bias = None
        if keeps_base and spec.rule.max_ratio is not None:
            raise GraphRewriteError(
                f"{spec.key}: max_write_ratio is a share of the norm of W0, which this layer has only in "
                "quantised or scaled form. Use max_write_norm"
            )
        if keeps_base:
            # A quantised weight keeps its own kernel, an unusual contraction what else it does; the fast
            # weight is the delta upon it.
            w0 = b.call(torch.zeros, spec.d_model, spec.d_ff, dtype=out.dtype, device=out.device)
        else:
            transposed = mlp.operand_transposed
            w0 = b.cast(b.method("t", mlp.weight_operand) if transposed else mlp.weight_operand)
            bias = None if mlp.bias is None else b.cast(mlp.bias)
        fast = _fast_node(b, site, h, t, w0, bias)
        y = layout.restored(fast, out.dim(), spec.d_model)
        if mlp.scale != 1.0:
            y = b.call(operator.mul, y, mlp.scale)
    for name in ("stack_trace", "nn_module_stack"):
        if name in contraction.meta:
            fast.meta[name] = contraction.meta[name]
    if keeps_base:
        with graph.inserting_after(contraction):
            y = graph.call_function(operator.add, (contraction, y))
    y.meta = dict(contraction.meta)
    contraction.replace_all_uses_with(y, delete_user_cb=lambda user: user is not y)
    if not keeps_base:
        graph.erase_node(contraction)
    _erase(site.marker)
    return fast


def _fast_node(
    b: _Builder, site: BoundSite, h: fx.Node, t: fx.Node, w0: fx.Node, bias: fx.Node | None
) -> fx.Node:
    spec = site.spec
    conv, proj = (None if x is None else b.cast(x) for x in (site.conv, site.proj))
    if site.state[0] is not None:
        return b.call(
            torch.ops.ttt.fast_weight_step.default,
            *(h, t, w0, bias, conv, proj, site.pos, spec.encode(), *site.state),
        )
    rule = spec.rule
    # eta belongs to the taps: there it costs K multiplications a channel.
    taps = b.call(operator.mul, conv, spec.write_scale)
    if proj is not None and runs_on_cpu(b.device):
        v = b.call(torch.ops.ttt.chunk_values.default, t, taps, proj, site.pos, spec.chunk)
    else:
        v = b.call(torch.ops.ttt.chunk_conv.default, t, taps, site.pos, spec.chunk)
        if proj is not None:
            v = b.call(torch.matmul, v, proj)
    if rule.limited or rule.keys == "unit":
        limit = _limit(b, w0, rule)
        unit = rule.keys == "unit"
        v = b.call(torch.ops.ttt.limit_writes.default, v, h, limit, site.pos, spec.chunk, unit)
    controls = () if rule == WriteRule() else (rule.decay, rule.on_nonfinite)
    return b.call(torch.ops.ttt.chunk_scan.default, h, v, w0, bias, site.pos, spec.chunk, *controls)


def _limit(b: _Builder, w0: fx.Node, rule: WriteRule) -> fx.Node | None:
    """The largest norm of a write, as a tensor: it may depend on the slow weight."""
    dtype = state_dtype(b.dtype)
    ratio = None
    if rule.max_ratio is not None:
        norm = b.call(torch.linalg.vector_norm, w0, dtype=dtype)
        ratio = b.call(operator.mul, norm, rule.max_ratio)
    if rule.max_norm is None:
        return ratio
    if ratio is not None:
        return b.call(torch.clamp, ratio, max=rule.max_norm)
    return b.call(torch.full, (), rule.max_norm, dtype=dtype, device=b.device)


def _erase(marker: fx.Node) -> None:
    source = marker.args[0]
    assert isinstance(source, fx.Node)
    marker.replace_all_uses_with(source)
    marker.graph.erase_node(marker)


class _Builder:
    """Creates nodes at the insertion point; casts operands to the contraction's dtype (autocast)."""

    def __init__(self, graph: fx.Graph, dtype: torch.dtype, device: torch.device) -> None:
        self.graph = graph
        self.dtype = dtype
        self.device = device

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def method(self, name: str, *args: Any) -> fx.Node:
        return self.graph.call_method(name, args)

    def cast(self, node: fx.Node) -> fx.Node:
        value = meta_tensor(node)
        if value is None or value.dtype == self.dtype:
            return node
        return self.method("to", node, self.dtype)
