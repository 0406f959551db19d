"""Pass: attention whose mask is proven to be exactly causal says ``is_causal`` and reads no mask.

In a call without a cache, transformers looks for packed documents in the positions. While it is captured it
cannot look, so the graph builds a ``[B, 1, T, T]`` mask that its eager code leaves out, and the kernel
computes both triangles and reads it. Here what makes a mask is evaluated as expressions of the index, for
all sizes at once: a mask goes when it is ``k <= q`` for every row, head, query and key, with as many queries
as keys. What is not understood is left alone; padding, positions and documents that a caller gives are never
known.

Only graphs of Dynamo are changed, whose guards keep the sizes true, and only on CPU, whose kernel gives the
same bits either way (measured; ``tests/passes/test_causal_mask.py`` looks), so that the base model stays the
base model. May be changed here: which operations of a graph are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ttt_compiler.compat import meta_tensor
from ttt_compiler.passes.base import GraphPass, PassState, graph_modules
from ttt_compiler.passes.bodies import ONCE, bodies
from ttt_compiler.passes.index_expressions import (
    Linear,
    Shape,
    Value,
    binary,
    broadcast,
    constant,
    gathered,
    is_causal,
    normalized,
    same,
    sliced,
    steps,
    sums,
    unsqueezed,
)
from ttt_compiler.passes.op_classes import (
    OpClass,
    class_of,
    higher_order_name,
    is_foreign,
    is_in_place,
    op_name,
)

_DEVICES = ("cpu",)
_NAMED = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
# Keywords that change no value, or that a rule reads.
_KEYWORDS = {"device", "dtype", "layout", "pin_memory", "requires_grad", "memory_format", "dim", "prepend"}
# What may return its operand's memory, and what of no class does not.
_SHARING = (OpClass.VIEW, OpClass.SPLIT, OpClass.CAST, OpClass.DROPOUT)
_SHARING_NAMES = ("unfold", "positive", "real", "conj")
_FRESH_NAMES = ("output", "size", "shape", "dim", "device", "dtype", "new_ones", "new_zeros", "new_full")


class CausalMask(GraphPass):
    """Replaces proven masks; what only made them is erased."""

    name = "causal_mask"

    def run(self, state: PassState) -> int:
        """Returns the number of attentions whose mask was replaced."""
        if not any(hasattr(n, "_dynamo_source") for n in state.gm.graph.find_nodes(op="placeholder")):
            return 0
        prover, count = _Prover(graph_modules(state.gm)), 0
        for gm in graph_modules(state.gm):
            for node in list(gm.graph.nodes):
                if op_name(node) != "scaled_dot_product_attention" or not _is_torchs(node):
                    continue
                given = {**dict(zip(_NAMED, node.args, strict=False)), **node.kwargs}
                mask = given.get("attn_mask")
                if isinstance(mask, fx.Node) and _may_replace(mask, given) and prover.is_causal(mask):
                    node.args = tuple(given.pop(name) for name in _NAMED[:3])
                    node.kwargs = {**given, "attn_mask": None, "is_causal": True}
                    prover.erase(mask)
                    count += 1
        if count:
            for gm in graph_modules(state.gm):
                gm.recompile()
        return count


def _may_replace(mask: fx.Node, given: Mapping[str, Any]) -> bool:
    """Whether there is one key per query, a place of the mask for each pair, and nothing else in the way.

    Not with dropout: kernels draw its random numbers in an order of their own.
    """
    query, key, pairs = _tensor(given["query"]), _tensor(given["key"]), _tensor(mask)
    plain = given.get("dropout_p", 0.0) == 0.0 and given.get("is_causal", False) is False
    if not plain or query is None or key is None or pairs is None or pairs.dim() < 2:
        return False
    sizes = (key.shape[-2], *pairs.shape[-2:])
    return query.device.type in _DEVICES and all(same(query.shape[-2], s) for s in sizes)


class _Prover:
    """The integers and booleans of a graph and of its bodies; None where they are not known."""

    def __init__(self, gms: Sequence[fx.GraphModule]) -> None:
        self._values: dict[fx.Node, Value] = {}
        # What a body's inputs stand for, per call; a body that does not run exactly once is not followed.
        self._outer: dict[fx.Node, list[fx.Node | None]] = {}
        self._inner: dict[fx.Node, list[tuple[fx.Node | None, fx.Node]]] = {}
        for gm in gms:
            for node in gm.graph.nodes:
                for body in bodies(gm, node):
                    for inner in body.graph_module.graph.find_nodes(op="placeholder"):
                        outer = body.caller.get(inner) if body.runs == ONCE else None
                        self._outer.setdefault(inner, []).append(outer)
                        self._inner.setdefault(node, []).append((outer, inner))

    def is_causal(self, mask: fx.Node) -> bool:
        tensor = _tensor(mask)
        return tensor is not None and is_causal(self.value(mask), tensor.shape)

    def erase(self, node: fx.Node) -> None:
        """Erase ``node`` and what only made it. All of it was evaluated, so none of it has effects."""
        if not node.users and node.op != "placeholder" and self._values.get(node) is not None:
            sources = node.all_input_nodes
            node.graph.erase_node(node)
            for source in sources:
                self.erase(source)

    def value(self, node: object) -> Value:
        """What a node of ``int64`` or ``bool`` is, unless something may write into it."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._values:
            self._values[node] = None
            self._values[node] = self._evaluated(node)
        return self._values[node]

    def _evaluated(self, node: fx.Node) -> Value:
        tensor, value = _tensor(node), None
        if tensor is None or tensor.dtype not in (torch.int64, torch.bool) or self._is_written(node):
            return None
        if node.op == "placeholder":
            found = {self.value(outer) for outer in self._outer.get(node, [None])}
            value = found.pop() if len(found) == 1 else None
        elif node.op in ("call_function", "call_method") and _is_torchs(node) and not _writes(node):
            value = None if node.kwargs.keys() - _KEYWORDS else self._rule(node, tensor)
        if isinstance(value, Linear) != (tensor.dtype == torch.int64):
            return None
        return normalized(value, tensor.shape)

    def _rule(self, node: fx.Node, tensor: Tensor) -> Value:
        args, shape = node.args, tensor.shape
        first = self.value(args[0]) if args else None
        match op_name(node):
            case "arange" if len(args) == 1 or (args[0] == 0 and args[2:] in ((), (1,))):
                return Linear((1,), 0)
            case "ones" | "new_ones":
                return frozenset() if tensor.dtype == torch.bool else constant(shape, 1)
            case "to" | "contiguous" | "clone" | "detach" | "expand":
                return self._operand(args[0], shape)
            case "unsqueeze" if len(args) == 2 and isinstance(args[1], int):
                return unsqueezed(first, args[1] % len(shape))
            case "getitem":
                index = args[1] if isinstance(args[1], tuple) else (args[1],)
                if all(isinstance(i, fx.Node) for i in index):
                    return gathered(first, [self._operand(i, shape) for i in index], shape)
                return sliced(first, index)
            case "diff" if len(args) == 1 and node.kwargs.get("dim") == -1:
                before = _tensor(node.kwargs.get("prepend"))
                narrow = before is not None and before.dim() == len(shape) and same(before.shape[-1], 1)
                return steps(first, self.value(node.kwargs["prepend"])) if narrow else None
            case "cumsum" if len(args) == 2:
                return sums(first)
            case name if len(args) == 2:
                return binary(name, self._operand(args[0], shape), self._operand(args[1], shape))
        return None

    def _operand(self, x: object, shape: Shape) -> Value:
        """A number or a tensor, broadcast to ``shape``."""
        if type(x) is int:
            return constant(shape, x)
        tensor = _tensor(x)
        return None if tensor is None else broadcast(self.value(x), tensor.shape, shape)

    def _is_written(self, node: fx.Node) -> bool:
        """Whether something may write into the memory of ``node``."""
        pending, seen = [node], set[fx.Node]()
        while pending:
            here = pending.pop()
            seen.add(here)
            for user in here.users:
                name, shared = op_name(user), list[fx.Node]()
                kind = class_of(name)
                if higher_order_name(user) is not None:
                    shared = [inner for outer, inner in self._inner.get(user, ()) if outer is here]
                    if not shared:
                        return True
                elif _writes(user) or (kind is OpClass.OTHER and not _is_fresh(user)):
                    return True
                elif kind in _SHARING or name in _SHARING_NAMES:
                    shared = [user]
                pending += [x for x in shared if x not in seen]
        return False


def _tensor(x: object) -> Tensor | None:
    return meta_tensor(x) if isinstance(x, fx.Node) else None


def _is_torchs(node: fx.Node) -> bool:
    """Whether an operation is torch's, and not another one of the same name."""
    module = str(getattr(node.target, "__module__", None) or "torch")
    return not is_foreign(node) and module.partition(".")[0] in ("torch", "_operator")


def _writes(node: fx.Node) -> bool:
    """Whether the node may write into one of its operands."""
    schema = getattr(node.target, "_schema", None)
    # F.relu(x, True), F.dropout(x, p, training, True)
    flagged = class_of(op_name(node)) in (OpClass.POINTWISE, OpClass.DROPOUT)
    flagged = flagged and any(a is True for a in node.args)
    named = "out" in node.kwargs or node.kwargs.get("inplace") is True
    return is_in_place(node) or named or flagged or (schema is not None and bool(schema.is_mutable))


def _is_fresh(node: fx.Node) -> bool:
    """Whether an operation of no class returns no memory of its operands, as far as it says so."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return all(r.alias_info is None for r in schema.returns)
    return op_name(node) in _FRESH_NAMES
