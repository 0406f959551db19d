"""Pass: the rewritten graph is well formed and nothing was forgotten.

May be changed here: further checks. It changes nothing.
"""

from __future__ import annotations

from ttt_compiler.errors import GraphRewriteError
from ttt_compiler.passes.base import GraphPass, PassState, graph_modules, markers


class Verify(GraphPass):
    """Lints every graph; no marker may be left, every site must have become exactly one node."""

    name = "verify"

    def run(self, state: PassState) -> int:
        """Returns the number of fast-weight nodes found alive.

        Raises:
            GraphRewriteError: a site was lost or left behind.
        """
        alive = set()
        for gm in graph_modules(state.gm):
            gm.graph.lint()
            left = markers(gm)
            if left:
                raise GraphRewriteError(
                    f"{left[0].args[1]}: a marker was not rewritten; please report the model"
                )
            alive |= set(gm.graph.nodes)
        lost = [n.name for n in state.fast_nodes if n not in alive or not n.users]
        if lost or len(state.fast_nodes) != len(state.sites):
            raise GraphRewriteError(f"fast-weight nodes without effect: {lost}; please report the model")
        return len(state.fast_nodes)
