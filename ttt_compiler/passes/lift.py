"""Bring a value of the outermost graph into the body of a higher-order operator, as one more operand.

May be changed here: which operators are understood. Only those whose body runs exactly once per call, with
the caller's operands in order, can be: activation checkpointing.
"""

from __future__ import annotations

from torch import fx

from ttt_compiler.errors import GraphRewriteError
from ttt_compiler.passes.bodies import bodies
from ttt_compiler.passes.op_classes import higher_order_name

_LIFTABLE = ("tag_activation_checkpoint",)


class Lifter:
    """Lifts values into bodies, each at most once."""

    def __init__(self, top: fx.GraphModule) -> None:
        self._top = top
        self._lifted: dict[tuple[fx.GraphModule, fx.Node], fx.Node] = {}

    def into(self, body: fx.GraphModule, value: fx.Node, key: str) -> fx.Node:
        """The node that holds ``value``, of the outermost graph, in ``body``.

        Args:
            body: the graph of a site; may be the outermost one.
            value: a node of the outermost graph, in front of the operator that runs ``body``.
            key: the site, for the message.

        Raises:
            GraphRewriteError: the body belongs to an operator that takes no further operands.
        """
        if body is self._top:
            return value
        if (body, value) not in self._lifted:
            self._lifted[body, value] = self._lift(body, value, key)
        return self._lifted[body, value]

    def _lift(self, body: fx.GraphModule, value: fx.Node, key: str) -> fx.Node:
        callers = [n for n in self._top.graph.nodes if body in _called_by(self._top, n)]
        names = [str(higher_order_name(n)) for n in callers]
        if len(names) != 1 or names[0] not in _LIFTABLE:
            raise GraphRewriteError(
                f"{key}: it lies in a nested region ({', '.join(names) or 'of another region'}) that cannot "
                'be given what the site needs from outside. Use target="hidden_states", keep the weight in a '
                "module that is called inside of the region, or turn off the feature that nests the layers"
            )
        caller = callers[0]
        caller.args = (*caller.args, value)
        last = [n for n in body.graph.nodes if n.op == "placeholder"][-1]
        with body.graph.inserting_after(last):
            operand = body.graph.placeholder(f"ttt_{value.name}")
        operand.meta = {k: v for k, v in value.meta.items() if k in ("example_value", "val")}
        return operand


def _called_by(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    return [body.graph_module for body in bodies(gm, node)]
