"""A read-only view of one FX graph: which values are data, which are weights, who reads whom.

Dynamo's graph is not functional (``out.add_(bias)`` stays, and later nodes name the old value), so
inputs and users are given here *after* in-place writes have been taken into account.

Why no graph library: taint, write versions and operation classes are where the work is, and ``torch.fx``
already keeps users in order, so a plain traversal is shorter and faster (2.6 ms per graph against 37 ms for
``networkx.immediate_dominators`` alone). Dominators do define an MLP's input x well (the nearest dominator
of h with an up-projection between), so networkx checks x in ``tests/passes/test_dominators.py``. They do
not find the residual (the first post-dominating add is another one in parallel and MoE blocks), and
sub-graph isomorphism would need one pattern per spelling of an MLP.

May be changed here: what counts as a weight (:func:`is_weight_source`), and how writes are
versioned. Deciding what is an MLP belongs to ``find_mlps.py``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import fx

from .op_classes import COPYING, OpClass, class_of, is_in_place, op_name

StaticTest = Callable[[fx.Node], bool]
Dim = int | torch.SymInt

_ROOT_DEPTH = 16


def value_of(node: fx.Node) -> object:
    """Return the example value Dynamo (or export) left on the node, None when there is none."""
    found: object = node.meta.get("example_value")
    return node.meta.get("val") if found is None else found


def _source_name(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def source_fqn(node: fx.Node) -> str | None:
    """Fully qualified name of the module attribute a placeholder stands for.

    ``L['self']._modules['model']._parameters['weight']`` becomes ``model.weight``; None when the
    node has no Dynamo source or is not reached through a module.
    """
    name = _source_name(node)
    start = re.search(r"\._(?:modules|parameters|buffers)\[", name)
    if start is None:
        return None
    parts = re.findall(r"\['([^']+)'\]|\.([A-Za-z_]\w*)|\[(\d+)\]", name[start.start() :])
    hidden = ("_modules", "_parameters", "_buffers")
    return ".".join(a or b or c for a, b, c in parts if b not in hidden)


def source_key(node: fx.Node) -> str | None:
    """Last key of the source: the name of the forward argument a user input was passed as."""
    keys = re.findall(r"\['([^']+)'\]|\.([A-Za-z_]\w*)", _source_name(node))
    return (keys[-1][0] or keys[-1][1]) if keys else None


# Operand places that hold a weight, by canonical operation name.
_WEIGHT_SLOTS: dict[str, tuple[int, ...]] = {
    "linear": (1, 2),
    "addmm": (0, 2),
    "matmul": (1,),
    "mm": (1,),
    "embedding": (1,),
    "layer_norm": (2, 3),
    "rms_norm": (2,),
    "einsum": (2,),
    "grouped_mm": (1,),
    "site": (1,),
}
# A stack of matrices that something is multiplied by may as well be activations (keys, memories).
_STACK_SLOTS = ("grouped_mm",)


def _only_in_weight_slots(node: fx.Node) -> bool:
    """Whether a float input is used as a weight only (weights passed as a dict of tensors)."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return False
    if not 1 <= value.dim() <= 3 or not all(isinstance(d, int) for d in value.shape):
        return False
    pending = [(node, user) for user in node.users]
    used = False
    while pending:
        operand, user = pending.pop()
        name = op_name(user)
        if name in ("t", "T", "mT", "transpose", "permute", "to"):
            pending += [(user, u) for u in user.users]
            continue
        slots = _WEIGHT_SLOTS.get(name, ())
        places = [i for i, a in enumerate(user.args) if a is operand]
        keys = [k for k, a in user.kwargs.items() if a is operand]
        if value.dim() == 3 and name not in _STACK_SLOTS:
            return False
        if not all(p in slots for p in places) or not all(k in ("weight", "bias") for k in keys):
            return False
        used = True
    return used and value.dim() > 1


def is_weight_source(node: fx.Node) -> bool:
    """Default static test: parameters, buffers, module attributes, globals, weight-only inputs."""
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    if isinstance(value_of(node), torch.nn.Parameter):
        return True
    name = _source_name(node)
    if "_parameters" in name or "_buffers" in name or name.startswith("G["):
        return True
    source = getattr(node, "_dynamo_source", None)
    return "NNModuleSource" in repr(source) or _only_in_weight_slots(node)


def flat_nodes(arg: object) -> Iterator[fx.Node]:
    """All nodes inside an argument, in order."""
    if isinstance(arg, fx.Node):
        yield arg
    elif isinstance(arg, (list, tuple)):
        for item in arg:
            yield from flat_nodes(item)
    elif isinstance(arg, dict):
        for item in arg.values():
            yield from flat_nodes(item)
    elif isinstance(arg, slice):
        yield from flat_nodes((arg.start, arg.stop, arg.step))


def _may_hold_tensor(value: object) -> bool:
    """Sizes and scalars carry no data; an unknown value might."""
    if value is None or isinstance(value, torch.Tensor):
        return True
    if isinstance(value, (list, tuple)):
        return any(_may_hold_tensor(v) and v is not None for v in value)
    return not isinstance(value, (int, float, str, torch.SymInt, torch.SymFloat, torch.SymBool, torch.dtype))


def _written_operands(node: fx.Node, operands: list[fx.Node]) -> list[fx.Node]:
    """Operands the node writes into."""
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return [out]
    if not operands or node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        named = zip((a.name for a in arguments), node.args, strict=False)
        given: dict[str, object] = {**dict(named), **node.kwargs}
        return [
            n
            for a in arguments
            if a.alias_info is not None and a.alias_info.is_write
            for n in flat_nodes(given.get(a.name))
        ]
    if is_in_place(node) or node.kwargs.get("inplace") is True:
        return operands[:1]
    # F.dropout(x, p, training, True), F.relu(x, True)
    flag = {"dropout": 3, "relu": 1, "silu": 1, "relu6": 1, "mish": 1, "hardswish": 1}
    place = flag.get(op_name(node))
    if place is not None and len(node.args) > place and node.args[place] is True:
        return operands[:1]
    return []


def _plain(dim: Dim) -> Dim:
    """A symbolic size that a weight has pinned to one number, as that number."""
    if isinstance(dim, torch.SymInt):
        pinned = dim.node.maybe_as_int()
        return dim if pinned is None else int(pinned)
    return dim


class GraphView:
    """Taint, versions, users and shapes of one graph; nothing in the graph is changed.

    A value is *data* when it depends on a user input, otherwise *static*. ``is_static`` says which
    placeholders are weights; it is asked about placeholders only.
    """

    def __init__(self, gm: fx.GraphModule, is_static: StaticTest | None = None) -> None:
        self.graph_module = gm
        self.nodes: tuple[fx.Node, ...] = tuple(gm.graph.nodes)
        self.order: dict[fx.Node, int] = {n: i for i, n in enumerate(self.nodes)}
        self._static_test = is_static or is_weight_source
        self._names: dict[fx.Node, str] = {}
        self._classes: dict[fx.Node, OpClass] = {}
        self._inputs: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._users: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
        self._versions: dict[fx.Node, dict[fx.Node, fx.Node]] = {}
        self._data: set[fx.Node] = set()
        self._reach: dict[fx.Node, int] = {}
        self._part_writes: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        self._build()

    def _build(self) -> None:
        current: dict[fx.Node, fx.Node] = {}  # value -> the node that wrote it last
        base: dict[fx.Node, fx.Node] = {}  # view -> the value whose memory it shows
        parts: set[fx.Node] = set()  # views that show a part of it
        for node in self.nodes:
            name = self._names[node] = op_name(node)
            operands = list(dict.fromkeys(flat_nodes((node.args, node.kwargs))))
            self._classes[node] = self._classify(node, name)
            if name == "site":
                operands = operands[:1]  # the marker's other operands do not enter the value
            self._versions[node] = {o: current[o] for o in operands if o in current}
            inputs = tuple(dict.fromkeys(current.get(o, o) for o in operands))
            self._inputs[node] = inputs
            for source in inputs:
                self._users[source].append(node)
            self._taint(node, inputs)
            is_view = self._classes[node] in (OpClass.VIEW, OpClass.SPLIT) and name not in COPYING
            if operands and is_view:
                base[node] = base.get(operands[0], operands[0])
                if self._classes[node] is OpClass.SPLIT or operands[0] in parts:
                    parts.add(node)
            for written in _written_operands(node, operands):
                current[written] = node
                if written in parts and name in ("fill", "zero"):
                    continue  # a constant in some places does not say what the whole is made of
                if written in base:
                    current[base[written]] = node
                if written in parts:
                    self._part_writes[node] = written, base[written]

    def _classify(self, node: fx.Node, name: str) -> OpClass:
        if node.op not in ("call_function", "call_method"):
            return OpClass.OTHER
        if name == "getitem" and len(node.args) > 1:
            indices = flat_nodes(node.args[1])
            if any(isinstance(value_of(i), torch.Tensor) for i in indices):
                return OpClass.GATHER
        return class_of(name)

    def _taint(self, node: fx.Node, inputs: tuple[fx.Node, ...]) -> None:
        if not _may_hold_tensor(value_of(node)):
            return
        if node.op == "placeholder":
            if not self._static_test(node):
                self._data.add(node)
        elif node.op != "get_attr" and any(i in self._data for i in inputs):
            self._data.add(node)

    def name(self, node: fx.Node) -> str:
        """Canonical operation name."""
        return self._names[node]

    def op_class(self, node: fx.Node) -> OpClass:
        """Class of the operation; indexing by a tensor is a gather, whatever its spelling."""
        return self._classes[node]

    def is_data(self, node: fx.Node) -> bool:
        """Whether the value depends on a user input."""
        return node in self._data

    def inputs(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Values the node reads, after in-place writes."""
        return self._inputs[node]

    def data_inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that are data."""
        return [i for i in self._inputs[node] if i in self._data]

    def users(self, node: fx.Node) -> list[fx.Node]:
        """Nodes that read this version of the value, in graph order."""
        return self._users[node]

    def resolve(self, node: fx.Node, operand: fx.Node) -> fx.Node:
        """Return the version of ``operand`` that ``node`` sees."""
        return self._versions[node].get(operand, operand)

    def part_written(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The view a node writes through, and the whole value, when it writes into a part of it."""
        return self._part_writes.get(node)

    def shape(self, node: fx.Node) -> tuple[Dim, ...] | None:
        """Shape of a tensor value, None when it is no tensor or unknown."""
        value = value_of(node)
        if isinstance(value, torch.Tensor):
            return tuple(_plain(d) for d in value.shape)
        if value is None and self._names.get(node) == "setitem" and self._inputs[node]:
            return self.shape(self._inputs[node][0])
        return None

    def width(self, node: fx.Node) -> int | None:
        """Size of the last axis when it is a plain integer."""
        shape = self.shape(node)
        return shape[-1] if shape and isinstance(shape[-1], int) else None

    def dtype(self, node: fx.Node) -> torch.dtype | None:
        """Dtype of a tensor value."""
        value = value_of(node)
        return value.dtype if isinstance(value, torch.Tensor) else None

    def depends_on(self, node: fx.Node, ancestor: fx.Node) -> bool:
        """Whether ``node`` is ``ancestor`` or is computed from it (through data values)."""
        if not self._reach:
            for n in self.nodes:
                mask = 1 << self.order[n]
                for i in self.data_inputs(n):
                    mask |= self._reach[i]
                self._reach[n] = mask
        return bool(self._reach[node] >> self.order[ancestor] & 1)

    def root(self, node: fx.Node) -> fx.Node | None:
        """Placeholder or attribute that a static value is made from.

        Of several (dequantisation, weight norm, a merged low-rank update) the largest is followed.
        """
        for _ in range(_ROOT_DEPTH):
            if node.op in ("placeholder", "get_attr"):
                return node
            static = [i for i in self._inputs[node] if i not in self._data]
            if not static:
                return None
            node = max(static, key=self._root_rank)
        return None

    def is_product(self, node: fx.Node) -> bool:
        """Whether a static value is a product of weights, up to elementwise factors and layout."""
        for _ in range(_ROOT_DEPTH):
            if self._classes[node] is OpClass.CONTRACT:
                return True
            static = [i for i in self._inputs[node] if i not in self._data]
            if node.op in ("placeholder", "get_attr") or not static:
                return False
            node = max(static, key=self._root_rank)
        return False

    def _root_rank(self, node: fx.Node) -> tuple[int, bool]:
        """Larger first; of two as large (``W + B @ A``), the one that is not a product."""
        return self._numel(node), not self._names_product(node)

    def _names_product(self, node: fx.Node) -> bool:
        elementwise = (OpClass.POINTWISE, OpClass.VIEW, OpClass.CAST)
        while self._classes[node] in elementwise and self._inputs[node]:
            node = max(self._inputs[node], key=self._numel)
        return self._classes[node] is OpClass.CONTRACT

    def gathered_root(self, node: fx.Node) -> fx.Node | None:
        """Root of ``W[expert_ids]``: data only because of *which* rows of a weight are taken."""
        for _ in range(_ROOT_DEPTH):
            if node not in self._data:
                return self.root(node)
            indexing = self._classes[node] in (OpClass.VIEW, OpClass.CAST, OpClass.SPLIT)
            if not indexing and self._names[node] not in ("getitem", "index", "index_select"):
                return None
            node = self._inputs[node][0]
        return None

    def _numel(self, node: fx.Node) -> int:
        value = value_of(node)
        if not isinstance(value, torch.Tensor):
            return 0
        return value.numel() if all(isinstance(d, int) for d in value.shape) else 0
