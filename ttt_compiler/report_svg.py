"""One MLP's dataflow as an inline SVG, laid out in layers from the top down.

A node lies one layer below the lowest of its inputs and, if it can, in the lane of one of them; an edge
that passes layers gets a lane of its own. All text is escaped here. May be changed here: sizes, lanes,
what a node says; colours belong to ``report_assets.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from ttt_compiler.passes.dataflow import Dataflow, DataflowNode

ROLE_NAMES = {
    "stream": "residual stream",
    "x": "x, the MLP's input",
    "up": "up-projection",
    "activation": "activation",
    "multiply": "gate",
    "h": "h",
    "down": "down-projection",
    "after": "to the residual",
    "residual": "residual add",
    "input": "from elsewhere",
}
"""What the page calls every role."""

_WIDTH, _LINE, _GAP, _WIRE, _MARGIN = 168, 16, 36, 26, 8
_FAST = "down = fast weight"
# The role that a node is coloured by, when it has several.
_PRIORITY = ("down", "h", "x", "residual", "stream", "up", "activation", "multiply", "input", "after")
_LETTERS = 20

_Edge = tuple[int, int]
_Line = tuple[str, str]  # class and text
_Wire = tuple[int, int, int]  # x, and where it runs straight: from y to y


@dataclass(frozen=True)
class _Box:
    left: int
    top: int
    bottom: int

    @property
    def middle(self) -> int:
        return self.left + _WIDTH // 2


def role_text(flow: Dataflow, index: int) -> str:
    """The roles of a node in words."""
    roles = flow.nodes[index].roles
    if "input" in roles and any(b == index for _, b in flow.hidden):
        return "from x, elsewhere"
    return " = ".join(ROLE_NAMES.get(role, role) for role in roles)


def draw(flow: Dataflow, title: str) -> str:
    """An ``<svg>`` of the dataflow; ``title`` is read aloud in its place."""
    layers = _layers(flow)
    lanes, wires = _lanes(flow, layers)
    said = [_said(node, role_text(flow, i)) for i, node in enumerate(flow.nodes)]
    columns, rows = _columns(lanes, wires), _rows(layers, said)
    boxes = [
        _Box(columns[lane][0], rows[layer][0], rows[layer][0] + len(lines) * _LINE + 10)
        for lane, layer, lines in zip(lanes, layers, said, strict=True)
    ]
    width = max((right for _, right in columns), default=0) + _MARGIN
    height = max((bottom for _, bottom in rows), default=0) + _MARGIN
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    for edge in _edges(flow):
        wire = None
        if edge in wires:
            middle = sum(columns[wires[edge]]) // 2
            wire = (middle, rows[layers[edge[0]] + 1][0], rows[layers[edge[1]] - 1][1])
        parts.append(_edge(edge, boxes, wire, edge in flow.hidden))
    parts += [_drawn(node, said[i], boxes[i]) for i, node in enumerate(flow.nodes)]
    return "\n".join([*parts, "</svg>"])


def _edges(flow: Dataflow) -> list[tuple[int, int]]:
    """The edges that are drawn: where a value comes from x by other operations, its box says so."""
    return sorted({*flow.edges, *(e for e in flow.hidden if "x" not in flow.nodes[e[0]].roles)})


def _layers(flow: Dataflow) -> list[int]:
    """The layer of every node; what has no inputs stands just above its first reader."""
    layers = [0] * len(flow.nodes)
    edges = _edges(flow)
    for a, b in edges:  # sorted by source, and sources precede: every source is final here
        layers[b] = max(layers[b], layers[a] + 1)
    has_input = {b for _, b in edges}
    for node in range(len(flow.nodes)):
        readers = [layers[b] for a, b in edges if a == node]
        if node not in has_input and readers:
            layers[node] = min(readers) - 1
    return layers


def _lanes(flow: Dataflow, layers: list[int]) -> tuple[list[int], dict[_Edge, int]]:
    """A lane for every node, and for every edge that passes layers."""
    edges = _edges(flow)
    taken: set[tuple[int, int]] = set()
    lanes: dict[int, int] = {}
    # What the MLP is made of keeps the left; values from elsewhere stand beside it.
    aside = ["input" in node.roles for node in flow.nodes]
    for node in sorted(range(len(layers)), key=lambda n: (layers[n], aside[n], n)):
        wanted = [lanes[a] for a, b in edges if b == node and a in lanes]
        lane = min(wanted, default=int(aside[node]))
        while (layers[node], lane) in taken:
            lane += 1
        lanes[node] = lane
        taken.add((layers[node], lane))
    # A wire runs through no box and over no other wire; short ones stay inside.
    wires: dict[_Edge, int] = {}
    for edge in sorted(edges, key=lambda e: layers[e[1]] - layers[e[0]]):
        passed = range(layers[edge[0]] + 1, layers[edge[1]])
        wire = lanes[edge[0]]
        while any((layer, wire) in taken for layer in passed):
            wire += 1
        if passed:
            wires[edge] = wire
            taken |= {(layer, wire) for layer in passed}
    return [lanes[n] for n in range(len(layers))], wires


def _columns(lanes: list[int], wires: dict[_Edge, int]) -> list[tuple[int, int]]:
    """Left and right end of every lane; one that only wires use is narrow."""
    columns = []
    left = _MARGIN
    for lane in range(max({*lanes, *wires.values()}, default=-1) + 1):
        right = left + (_WIDTH if lane in lanes else _WIRE)
        columns.append((left, right))
        left = right + 12
    return columns


def _rows(layers: list[int], lines: list[list[_Line]]) -> list[tuple[int, int]]:
    """Upper and lower end of every layer, as high as its fullest box."""
    rows = []
    top = _MARGIN
    for layer in range(max(layers, default=-1) + 1):
        most = max((len(said) for at, said in zip(layers, lines, strict=True) if at == layer), default=2)
        rows.append((top, top + most * _LINE + 10))
        top = rows[-1][1] + _GAP
    return rows


def _edge(edge: _Edge, boxes: list[_Box], wire: _Wire | None, hidden: bool) -> str:
    source, target = (boxes[n] for n in edge)
    x0, y0, x1, y1 = source.middle, source.bottom, target.middle, target.top - 5
    path = f"M{x0} {y0}"
    if wire is not None:
        x, top, bottom = wire
        path += _curve(x0, y0, x, top) + f"V{bottom}"
        x0, y0 = x, bottom
    path += _curve(x0, y0, x1, y1)
    kind = "wire hidden" if hidden else "wire"
    return f'<path class="{kind}" d="{path}"/><path class="tip" d="M{x1 - 4} {y1 - 2}h8l-4 7z"/>'


def _curve(x0: int, y0: int, x1: int, y1: int) -> str:
    if x0 == x1:
        return f"V{y1}"
    middle = (y0 + y1) // 2
    return f"C{x0} {middle} {x1} {middle} {x1} {y1}"


def _said(node: DataflowNode, words: str) -> list[_Line]:
    """The lines of a box, each with its class."""
    lines = [("op", node.op.rpartition("::")[2] or node.op)]
    if words:
        lines.insert(0, ("role", words))
    if node.weight:
        lines.append(("shape", f"W {node.weight}"))
    return [*lines, ("shape", node.shape or "several tensors")]


def _drawn(node: DataflowNode, lines: list[_Line], box: _Box) -> str:
    role = next((r for r in _PRIORITY if r in node.roles), "plain")
    first = (box.top + box.bottom - _LINE * len(lines)) // 2 + 12
    texts = []
    for i, (kind, line) in enumerate(lines):
        place = f'x="{box.left + 10}" y="{first + _LINE * i}"'
        if kind == "role" and role == "down":
            # One drawing serves sites that are fast weights and sites that are not.
            texts.append(f'<text class="role fastmark" {place}>{_FAST}</text>')
            kind = "role slowmark"
        texts.append(f'<text class="{kind}" {place}>{escape(_elided(line))}</text>')
    title = escape(", ".join([node.op if kind == "op" else line for kind, line in lines]))
    rect = f'x="{box.left}" y="{box.top}" width="{_WIDTH}" height="{box.bottom - box.top}" rx="7"'
    return (
        f'<g class="node r-{role}" data-roles="{escape(" ".join(node.roles))}"><title>{title}</title>'
        f"<rect {rect}/>{''.join(texts)}</g>"
    )


def _elided(text: str) -> str:
    if len(text) <= _LETTERS:
        return text
    head = (_LETTERS - 1) // 2
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - (_LETTERS - 1 - head) :]}"
