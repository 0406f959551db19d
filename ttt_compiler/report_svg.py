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
    "after": "after the MLP",
    "residual": "residual add",
    "input": "from elsewhere",
}
"""What the page calls every role."""

_WIDTH, _HEIGHT, _GAP, _WIRE = 176, 58, 34, 26
_MARGIN = 14
# The role that a node is coloured by, when it has several.
_PRIORITY = ("down", "h", "x", "residual", "stream", "up", "activation", "multiply", "input", "after")
_LETTERS = 20

_Edge = tuple[int, int]


@dataclass(frozen=True)
class _Place:
    layer: int
    lane: int


def role_text(flow: Dataflow, index: int) -> str:
    """The roles of a node in words."""
    roles = flow.nodes[index].roles
    if "input" in roles and any(b == index for _, b in flow.hidden):
        return "from x, elsewhere"
    return " = ".join(ROLE_NAMES.get(role, role) for role in roles)


def draw(flow: Dataflow, title: str) -> str:
    """An ``<svg>`` of the dataflow; ``title`` is read aloud in its place."""
    layers = _layers(flow)
    places, wires = _places(flow, layers)
    columns = _columns(places, wires)
    width = max((right for _, right in columns.values()), default=0) + _MARGIN
    height = (max(layers, default=0) + 1) * (_HEIGHT + _GAP) - _GAP + 2 * _MARGIN
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    hidden = set(flow.hidden)
    for edge in _edges(flow):
        parts.append(_edge(edge, places, wires.get(edge), columns, edge in hidden))
    for i, place in enumerate(places):
        parts.append(_box(flow.nodes[i], role_text(flow, i), *_corner(place, columns)))
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


def _places(flow: Dataflow, layers: list[int]) -> tuple[list[_Place], dict[_Edge, int]]:
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
    return [_Place(layers[n], lanes[n]) for n in range(len(layers))], wires


def _columns(places: list[_Place], wires: dict[_Edge, int]) -> dict[int, tuple[int, int]]:
    """Left and right end of every lane; one that only wires use is narrow."""
    boxes = {place.lane for place in places}
    columns = {}
    left = _MARGIN
    for lane in range(max(boxes | set(wires.values()), default=-1) + 1):
        right = left + (_WIDTH if lane in boxes else _WIRE)
        columns[lane] = (left, right)
        left = right + 12
    return columns


def _corner(place: _Place, columns: dict[int, tuple[int, int]]) -> tuple[int, int]:
    return columns[place.lane][0], _MARGIN + place.layer * (_HEIGHT + _GAP)


def _edge(
    edge: _Edge,
    places: list[_Place],
    wire: int | None,
    columns: dict[int, tuple[int, int]],
    hidden: bool,
) -> str:
    (x0, y0), (x1, y1) = (_corner(places[n], columns) for n in edge)
    x0, y0, x1, y1 = x0 + _WIDTH // 2, y0 + _HEIGHT, x1 + _WIDTH // 2, y1 - 5
    path = f"M{x0} {y0}"
    if wire is not None:
        left, right = columns[wire]
        middle = (left + right) // 2
        path += _curve(x0, y0, middle, y0 + _GAP) + f"V{y1 + 5 - _GAP}"
        x0, y0 = middle, y1 + 5 - _GAP
    path += _curve(x0, y0, x1, y1)
    kind = "wire hidden" if hidden else "wire"
    return f'<path class="{kind}" d="{path}"/><path class="tip" d="M{x1 - 4} {y1 - 2}h8l-4 7z"/>'


def _curve(x0: int, y0: int, x1: int, y1: int) -> str:
    if x0 == x1:
        return f"V{y1}"
    middle = (y0 + y1) // 2
    return f"C{x0} {middle} {x1} {middle} {x1} {y1}"


def _box(node: DataflowNode, words: str, x: int, y: int) -> str:
    role = next((r for r in _PRIORITY if r in node.roles), "plain")
    weight = f"weight {node.weight}" if node.weight else ""
    title = ", ".join(part for part in (words, node.op, weight, node.shape) if part)
    lines = [("op", node.op), ("shape", f"{node.shape or '(several)'}")]
    if words:
        lines.insert(0, ("role", words))
    if weight:
        lines[-2] = ("op", f"{_elided(node.op, _LETTERS - len(node.weight or '') - 3)} W{node.weight}")
    top = y + (_HEIGHT - 16 * len(lines)) // 2 + 12
    texts = [
        f'<text class="{kind}" x="{x + 10}" y="{top + 16 * i}">{escape(_elided(text, _LETTERS))}</text>'
        for i, (kind, text) in enumerate(lines)
    ]
    mark = ""
    if role == "down":
        mark = f'<text class="fastmark" x="{x + _WIDTH - 8}" y="{y + _HEIGHT - 8}">fast weight</text>'
    return (
        f'<g class="node r-{role}" data-roles="{escape(" ".join(node.roles))}"><title>{escape(title)}</title>'
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="7"/>{"".join(texts)}{mark}</g>'
    )


def _elided(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    head = max((width - 1) // 2, 1)
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - max(width - 1 - head, 1) :]}"
