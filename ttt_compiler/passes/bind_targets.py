"""Pass: give every site what it needs in its own graph: the target source t, and what its marker carries.

``hidden_states`` is the MLP's own input, known from its dataflow. ``input_embed`` is the output of the
token embedding. What stands outside of a site inside of a higher-order-op body is lifted into the body.
May be changed here: sources, together with ``config.TARGETS``.
"""

from __future__ import annotations

from torch import fx

from ttt_compiler.errors import GraphRewriteError
from ttt_compiler.passes.base import BoundSite, GraphPass, PassState
from ttt_compiler.passes.embeddings import token_embeddings
from ttt_compiler.passes.lift import Lifter


class BindTargets(GraphPass):
    """Fills every field of the bound sites."""

    name = "bind_targets"

    def run(self, state: PassState) -> int:
        """Returns the number of sites bound.

        Raises:
            GraphRewriteError: the graph does not hold the source, or it cannot be brought to the site.
        """
        lifter = Lifter(state.gm)
        for site in state.sites:
            body, key = site.mlp.graph_module, site.spec.key
            if site.spec.target == "hidden_states":
                # Tokens may be put in front of rows between x and the projections.
                site.target = site.mlp.x_operand if site.spec.time_major else site.mlp.x
            else:
                site.target = lifter.into(body, _embedding(state, site), key)
            _, _, _, *carried = site.marker.args
            if site.marker.graph is not body.graph:
                carried = [lifter.into(body, n, key) if isinstance(n, fx.Node) else None for n in carried]
            site.conv, site.proj, site.tokens, site.pos, *rest = (
                n if isinstance(n, fx.Node) else None for n in carried
            )
            site.state = tuple(rest)
        return len(state.sites)


def _embedding(state: PassState, site: BoundSite) -> fx.Node:
    found = token_embeddings(state.gm)
    if len(found) != 1:
        raise GraphRewriteError(
            f'{site.spec.key}: target="input_embed" needs the token embeddings in the same graph, and '
            f"this graph has {len(found)} embedding look-ups of input ids. Pass input_ids (not "
            "inputs_embeds), compile the whole model in one graph (fullgraph=True), or use "
            'target="hidden_states"'
        )
    return found[0]
