"""Bodies of higher-order operators: how they run, and what their placeholders stand for outside.

May be changed here: an operator's entry in :data:`_RUNS`, and how its operands are laid out. An operator
that is not listed (``autograd.Function``, flex attention) has bodies that are not ours to rewrite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from .activation import subgraph
from .op_classes import higher_order_name

ONCE = "once"

_RUNS = {
    "tag_activation_checkpoint": ONCE,
    "wrap_activation_checkpoint": ONCE,
    "invoke_subgraph": ONCE,
    "wrap": ONCE,
    "wrap_with_set_grad_enabled": ONCE,
    "wrap_with_autocast": ONCE,
    "dynamo_bypassing_wrapper": ONCE,
    "cond": "cond",
    "scan": "scan",
    "associative_scan": "associative_scan",
    "map": "map",
    "map_impl": "map",
    "while_loop": "while_loop",
    "while_loop_stack_output": "while_loop",
}
# Operators whose first operand after the bodies is carried from step to step: its placeholders hold data
# even if the first step starts from a constant.
_CARRIES = ("scan", "while_loop", "while_loop_stack_output")


@dataclass(frozen=True, eq=False)
class Body:
    """One body of one call.

    ``runs`` is :data:`ONCE` when it stands in place of the call, else the kind of loop or branch,
    None when it is opaque. ``caller`` gives the outer operand of every placeholder: for the sliced
    operands of a scan that is the whole stack.
    """

    operator: str
    graph_module: fx.GraphModule
    runs: str | None
    caller: dict[fx.Node, fx.Node]
    carried: frozenset[fx.Node]


def bodies(gm: fx.GraphModule, node: fx.Node) -> list[Body]:
    """The bodies that ``node`` calls, in order; none for an ordinary node."""
    name = higher_order_name(node)
    if name is None:
        return []
    places = {i: body for i, a in enumerate(node.args) if (body := subgraph(gm, a)) is not None}
    found = []
    for body in places.values():
        # After the last body: flags and names first, then one operand per placeholder.
        rest = node.args[max(places) + 1 :]
        given = [g for g in _leaves(rest) if not isinstance(g, str)]
        placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
        aligned = list(zip(reversed(placeholders), reversed(given), strict=False))
        caller = {p: g for p, g in aligned if isinstance(g, fx.Node)}
        count = len(list(_leaves(rest[0]))) if rest and name in _CARRIES else 0
        carried = frozenset(placeholders[:count])
        found.append(Body(name, body, _RUNS.get(name), caller, carried))
    return found


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
