"""Pass: bind every site's target source t.

``hidden_states`` is the MLP's own input, known from its dataflow. ``input_embed`` is the output of the
token embedding; for a site inside of a higher-order-op body it is lifted into the body as an operand.
May be changed here: sources, together with ``config.TARGETS``.
"""

from __future__ import annotations

from torch import fx

from ttt_compiler.errors import GraphRewriteError
from ttt_compiler.passes.base import BoundSite, GraphPass, PassState
from ttt_compiler.passes.embeddings import token_embeddings


class BindTargets(GraphPass):
    """Fills ``target`` of every bound site."""

    name = "bind_targets"

    def run(self, state: PassState) -> int:
        """Returns the number of sites bound.

        Raises:
            GraphRewriteError: the graph does not hold the source.
        """
        lifted: dict[tuple[fx.GraphModule, fx.Node], fx.Node] = {}
        for site in state.sites:
            if site.spec.target == "hidden_states":
                site.target = site.mlp.x
            else:
                site.target = _embedding(state, site, lifted)
        return len(state.sites)


def _embedding(
    state: PassState, site: BoundSite, lifted: dict[tuple[fx.GraphModule, fx.Node], fx.Node]
) -> fx.Node:
    found = token_embeddings(state.gm)
    if len(found) != 1:
        raise GraphRewriteError(
            f'{site.spec.key}: target="input_embed" needs the token embeddings in the same graph, and '
            "this graph "
            f"has {len(found)} embedding look-ups of input ids. Pass input_ids (not inputs_embeds), compile "
            'the whole model in one graph (fullgraph=True), or use target="hidden_states"'
        )
    embedding, body = found[0], site.mlp.graph_module
    if body is state.gm:
        return embedding
    key = (body, embedding)
    if key not in lifted:
        lifted[key] = _lift(state.gm, body, embedding, site.spec.key)
    return lifted[key]


def _lift(top: fx.GraphModule, body: fx.GraphModule, value: fx.Node, key: str) -> fx.Node:
    """Make ``value`` of the top graph an operand of the one higher-order op that runs ``body``."""
    callers = [
        n
        for n in top.graph.nodes
        if n.op == "call_function"
        and any(
            isinstance(a, fx.Node) and a.op == "get_attr" and getattr(top, str(a.target), None) is body
            for a in n.args
        )
    ]
    if len(callers) != 1 or getattr(callers[0].target, "__name__", "") != "tag_activation_checkpoint":
        raise GraphRewriteError(
            f'{key}: target="input_embed" cannot reach into this nested region. Use '
            'target="hidden_states", or '
            "turn off the feature that nests the layers"
        )
    caller = callers[0]
    caller.args = (*caller.args, value)
    last = [n for n in body.graph.nodes if n.op == "placeholder"][-1]
    with body.graph.inserting_after(last):
        operand = body.graph.placeholder("ttt_input_embed")
    operand.meta = {k: v for k, v in value.meta.items() if k in ("example_value", "val")}
    return operand
