"""Rows and tokens: how a site's tensors become ``[B, T, width]``, and its result what it was.

Models flatten tokens before their MLPs (``[B*T, F]``) or put them first (``[T, B, F]``). May be changed
here: the layouts; which of them a site has was seen at conversion (``discovery/token_path.py``).
"""

from __future__ import annotations

from torch import Tensor, fx

from ttt_compiler.compat import meta_tensor, size_hint
from ttt_compiler.errors import GraphRewriteError
from ttt_compiler.passes.base import BoundSite


class SequenceLayout:
    """Inserts the views of one site at the graph's insertion point."""

    def __init__(self, site: BoundSite, graph: fx.Graph) -> None:
        self._site = site
        self._graph = graph

    def sequence(self, node: fx.Node) -> fx.Node:
        """``node`` as ``[B, T, width]``.

        Raises:
            GraphRewriteError: it is not one row of features per token.
        """
        value = meta_tensor(node)
        dims = None if value is None else value.dim()
        time_major = self._site.spec.time_major
        if dims == 3:
            self._check(value)
            return self._graph.call_method("transpose", (node, 0, 1)) if time_major else node
        if dims != 2 or value is None:
            raise GraphRewriteError(
                f"{self._site.spec.key}: its tokens arrive with {'unknown' if dims is None else dims} "
                "dimensions; fast weights need [batch, tokens, width] or [batch * tokens, width]. Leave the "
                "block out with layers=[...]"
            )
        rows, tokens = self._sizes()
        width = value.shape[-1]
        if not time_major:
            return self._graph.call_method("reshape", (node, rows, tokens, width))
        return self._graph.call_method(
            "transpose", (self._graph.call_method("reshape", (node, tokens, rows, width)), 0, 1)
        )

    def _check(self, value: Tensor | None) -> None:
        """The call's own rows and tokens must stand where they were seen at conversion."""
        tokens = None if self._site.tokens is None else meta_tensor(self._site.tokens)
        if tokens is None or value is None or tokens.dim() < 2:
            return
        given = tuple(size_hint(d) for d in tokens.shape[:2])
        seen = tuple(size_hint(d) for d in value.shape[:2])
        if seen != (given[::-1] if self._site.spec.time_major else given):
            raise GraphRewriteError(
                f"{self._site.spec.key}: its tokens arrive as {list(seen)} in a call of {given[0]} rows of "
                f"{given[1]} tokens, in another layout than when the model was converted. Type "
                "ttt.revert(model) and convert it with example_inputs of two rows or more and of the "
                "length you use, or leave the block out with layers=[...]"
            )

    def restored(self, y: fx.Node, dims: int, width: int) -> fx.Node:
        """``y [B, T, width]`` in the layout of the contraction's own result."""
        if self._site.spec.time_major:
            y = self._graph.call_method("transpose", (y, 0, 1))
        return y if dims == 3 else self._graph.call_method("reshape", (y, -1, width))

    def _sizes(self) -> tuple[fx.Node, fx.Node]:
        """Batch size and number of tokens of the call, as nodes."""
        site = self._site
        marked = site.marker.args[0]
        value = meta_tensor(marked) if isinstance(marked, fx.Node) else None
        own = site.marker.graph is self._graph and value is not None and value.dim() == 3
        source, swap = (marked, site.spec.time_major) if own else (site.tokens, False)
        if not isinstance(source, fx.Node):
            raise GraphRewriteError(
                f"{site.spec.key}: its tokens are flattened, and this part of the model does not know how "
                "many rows they came from. Compile and call the whole model instead of its parts"
            )
        first, second = (self._graph.call_method("size", (source, d)) for d in (0, 1))
        return (second, first) if swap else (first, second)
