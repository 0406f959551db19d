"""The dataflow of one MLP as plain data, for a reader: from x to h, the down-projection, the residual add.

What is drawn follows what was matched; nothing is decided here, and no node of the graph is kept, so that
equal blocks give equal values. May be changed here: which operations are left out or drawn as one, roles.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from .activation import branches
from .find_mlps import MLPSite
from .graph import GraphView
from .mlp_cone import Region, feature_sources
from .op_classes import OpClass, higher_order_name, is_affine, is_foreign, schema_name

_MAX_NODES = 80
_CHAINED = (OpClass.VIEW, OpClass.CAST)
_NAMES_IN_CHAIN = 3
_GATES = ("mul", "div")

ROLES = ("stream", "x", "up", "activation", "multiply", "h", "down", "after", "residual", "input")
"""What a node is to the MLP: the residual stream before it, x, a projection of x, the activation, a
gate, the operand of the down-projection, that projection, what follows, the addition that closes it, and
a value that comes from elsewhere."""


@dataclass(frozen=True)
class DataflowNode:
    """One operation, or a chain of operations that only change a layout.

    Attributes:
        op: name of the operation.
        shape: of the result, ``"?"`` for sizes known only when it runs; empty when it is no tensor.
        roles: of :data:`ROLES`; often none.
        weight: stored shape of the weight it multiplies by.
    """

    op: str
    shape: str
    roles: tuple[str, ...] = ()
    weight: str | None = None


@dataclass(frozen=True)
class Dataflow:
    """A small graph; a node's id is its place, and every edge goes to a higher id.

    Attributes:
        nodes: in an order of execution.
        edges: (from, to).
        hidden: (from, to) where a path exists whose operations are not part of the MLP.
        notes: in words, what was matched otherwise than plainly, or why nothing is here.
    """

    nodes: tuple[DataflowNode, ...]
    edges: tuple[tuple[int, int], ...] = ()
    hidden: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()


def read_dataflow(site: MLPSite) -> Dataflow:
    """The dataflow of a site. Never raises: a picture must not stop what it illustrates."""
    try:
        return _Reader(site).read()
    except Exception as e:
        return Dataflow((), notes=(*site.notes, f"not drawn: {type(e).__name__}: {e}"))


class _Reader:
    def __init__(self, site: MLPSite) -> None:
        self.site, self.view = site, site.view
        self.h = self.view.resolve(site.contraction, site.h)
        self.notes = site.notes

    def read(self) -> Dataflow:
        before = self._shortened(self._before(), self.site.x, self.h, "before")
        after = self._after()
        if self.site.merge is not None:
            after = self._shortened(after, self.site.contraction, self.site.merge, "after")
        members = before | after
        sources = {node: self._drawn_sources(node, members) for node in members}
        leaves = {s for found in sources.values() for s in found} - members
        order = sorted(members | leaves, key=self.view.order.__getitem__)
        roles = self._roles(order, before, after)
        chain = self._chains(order, sources, roles)
        heads = [n for n in order if chain[n][-1] is n]
        ids = {n: i for i, head in enumerate(heads) for n in chain[head]}
        return Dataflow(
            tuple(self._node(chain[n], roles[n]) for n in heads),
            _pairs((ids[s], ids[n]) for n, found in sources.items() for s in found),
            _pairs((ids[a], ids[b]) for a, b in self._hidden(leaves)),
            self.notes,
        )

    def _before(self) -> set[fx.Node]:
        """From h back to x along what the features are made of."""
        found: set[fx.Node] = set()
        pending = [self.h]
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                if node is not self.site.x:
                    pending += [s for s in self._followed(node) if self.view.depends_on(s, self.site.x)]
        return found

    def _followed(self, node: fx.Node) -> list[fx.Node]:
        if self.view.op_class(node) is OpClass.CONTRACT:
            data = [i for i in self.view.data_inputs(node) if self.view.gathered_root(i) is None]
            return data[:1]
        return feature_sources(self.view, node, self.site.d_ff)

    def _after(self) -> set[fx.Node]:
        """What is computed from the down-projection on the way to the residual add."""
        down, merge, view = self.site.contraction, self.site.merge, self.view
        if merge is None:
            return {down}
        between = view.nodes[view.order[down] : view.order[merge] + 1]
        return {n for n in between if view.depends_on(n, down) and view.depends_on(merge, n)}

    def _shortened(self, members: set[fx.Node], start: fx.Node, end: fx.Node, side: str) -> set[fx.Node]:
        """Only one shortest path when there is more than a reader could follow."""
        if len(members) <= _MAX_NODES:
            return members
        self.notes += (
            f"only the shortest path {side} the down-projection is drawn, of {len(members)} nodes",
        )
        previous: dict[fx.Node, fx.Node] = {end: end}
        queue = deque([end])
        while queue and start not in previous:
            node = queue.popleft()
            for source in self.view.data_inputs(node):
                if source in members and source not in previous:
                    previous[source] = node
                    queue.append(source)
        path = {start, end}
        while start is not end and start in previous:
            start = previous[start]
            path.add(start)
        return path

    def _drawn_sources(self, node: fx.Node, members: set[fx.Node]) -> list[fx.Node]:
        if node is self.site.x:
            return []
        data = self.view.data_inputs(node)
        if self.view.op_class(node) is OpClass.CAST:
            data = data[:1]  # the other operand only says which dtype
        return [i for i in data if i in members or self.view.gathered_root(i) is None]

    def _roles(
        self, order: list[fx.Node], before: set[fx.Node], after: set[fx.Node]
    ) -> dict[fx.Node, tuple[str, ...]]:
        view, site = self.view, self.site
        inner = tuple(n for n in order if n in before and n is not site.x)
        ups = tuple(n for n in inner if view.op_class(n) is OpClass.CONTRACT)
        region = Region(tuple(n for n in inner if n not in ups), ups, frozenset())
        origins = branches(view, region)
        activations = set(site.activation.split("+"))
        roles: dict[fx.Node, tuple[str, ...]] = {}
        for node in order:
            found = []
            if node not in before and node not in after:
                found.append("stream" if self._is_stream(node) else "input")
            if node is site.x:
                found.append("x")
            if node in ups:
                found.append("up")
            if node in region.nodes:
                name = view.name(node)
                wide = [i for i in view.data_inputs(node) if i in before and view.width(i) != 1]
                parts = [origins.get(i, frozenset()) for i in wide]
                if self._activates(node, activations):
                    found.append("activation")
                joins = len(parts) == 2 and not parts[0] & parts[1]
                # A fused kernel that reads two branches is both: activation and gate.
                may_gate = name in _GATES or view.op_class(node) is OpClass.OTHER
                if name == "glu" or (site.gated and joins and may_gate):
                    found.append("multiply")
            if node is self.h:
                found.append("h")
            if node is site.contraction:
                found.append("down")
            elif node is site.merge:
                found.append("residual")
            elif node in after:
                found.append("after")
            roles[node] = tuple(found)
        return roles

    def _activates(self, node: fx.Node, names: set[str]) -> bool:
        name = self.view.name(node)
        if self.view.op_class(node) is OpClass.OTHER:
            return True  # a fused kernel or an inlined function: nothing else of the kind is matched
        bound = name in ("clamp", "clamp_min", "clamp_max") and "relu" in names
        pointwise = self.view.op_class(node) is OpClass.POINTWISE and not is_affine(name)
        return pointwise and (name in names or bound)

    def _is_stream(self, node: fx.Node) -> bool:
        merge = self.site.merge
        read = merge is not None and node in self.view.data_inputs(merge)
        return read and self.view.depends_on(self.site.x, node)

    def _hidden(self, leaves: set[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
        """How values from elsewhere hang together with x; the shortest way to say it."""
        x, view = self.site.x, self.view
        found = [(leaf, x) for leaf in leaves if self._is_stream(leaf)]
        return found + [(x, leaf) for leaf in leaves if view.depends_on(leaf, x)]

    def _chains(
        self,
        order: list[fx.Node],
        sources: Mapping[fx.Node, list[fx.Node]],
        roles: Mapping[fx.Node, tuple[str, ...]],
    ) -> dict[fx.Node, list[fx.Node]]:
        """Every node with the layout changes it is drawn with, in order; the last one stands for them."""
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node, found in sources.items():
            for source in found:
                readers.setdefault(source, []).append(node)
        chain: dict[fx.Node, list[fx.Node]] = {}
        for node in order:
            given = sources.get(node, [])
            before = given[0] if len(given) == 1 else None
            joined = (
                before is not None
                and roles[before] == roles[node]
                and len(readers[before]) == 1
                and all(self.view.op_class(n) in _CHAINED and n in sources for n in (before, node))
            )
            chain[node] = [*chain[before], node] if joined and before is not None else [node]
            for member in chain[node]:
                chain[member] = chain[node]
        return chain

    def _node(self, chain: list[fx.Node], roles: tuple[str, ...]) -> DataflowNode:
        names = list(dict.fromkeys(_label(self.view, n) for n in chain))
        more = [f"{len(names) - _NAMES_IN_CHAIN} more"] if len(names) > _NAMES_IN_CHAIN else []
        node = chain[-1]
        return DataflowNode(
            op=", ".join(names[:_NAMES_IN_CHAIN] + more),
            shape=_shape_text(self.view, node),
            roles=roles,
            weight=self._weight(node) if {"up", "down"} & set(roles) else None,
        )

    def _weight(self, node: fx.Node) -> str | None:
        if node is self.site.contraction:
            return _shape_text(self.view, self.site.weight)
        for operand in self.view.inputs(node):
            root = self.view.gathered_root(operand)
            if root is not None and len(self.view.shape(root) or ()) >= 2:
                return _shape_text(self.view, root)
        return None


def _pairs(found: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted({(a, b) for a, b in found if a != b}))


def _label(view: GraphView, node: fx.Node) -> str:
    if node.op == "placeholder":
        return "graph input"
    if is_foreign(node):
        return schema_name(node.target) or view.name(node)
    return higher_order_name(node) or view.name(node)


def _shape_text(view: GraphView, node: fx.Node) -> str:
    shape = view.shape(node)
    if shape is None:
        return ""
    return "[" + ", ".join(str(d) if isinstance(d, int) else "?" for d in shape) + "]"
