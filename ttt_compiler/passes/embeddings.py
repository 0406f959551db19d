"""Find the token embeddings of a captured graph.

May be changed here: what may stand between the ids the user passed and the lookup, and which
forward arguments are known to be something else than token ids.
"""

from __future__ import annotations

import torch
from torch import fx

from .graph import GraphView, source_key, value_of
from .op_classes import OpClass

# Integer arguments of a forward that index other tables. These are names of *arguments*, a public
# convention; no name of a module or parameter is read.
_NOT_TOKENS = (
    "position_ids",
    "positions",
    "decoder_position_ids",
    "cache_position",
    "token_type_ids",
    "segment_ids",
    "task_type_ids",
    "seq_idx",
    "langs",
    "attention_mask",
    "decoder_attention_mask",
)
_PASSES = (OpClass.VIEW, OpClass.CAST, OpClass.SPLIT)


def token_embeddings(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the ``embedding(ids, W)`` nodes that look up the token ids a user passed.

    Rule: the ids are an integer graph input, seen through views, casts, slices and clamping only.
    Positions are excluded because they are counted (``arange``, ``cumsum`` of a mask) or offset
    (``+ 2``), which are none of these; position, type and segment ids passed by the user are
    excluded by the name of the forward argument they came in as.
    """
    view = GraphView(gm)
    return [n for n in view.nodes if view.name(n) == "embedding" and _looks_up_tokens(view, n)]


def _looks_up_tokens(view: GraphView, node: fx.Node) -> bool:
    # aten.embedding takes (weight, ids), F.embedding (ids, weight): the ids are the integer one.
    for operand in view.inputs(node)[:2]:
        value = value_of(operand)
        if isinstance(value, torch.Tensor) and not value.dtype.is_floating_point:
            return _is_user_ids(view, operand)
    return False


def _is_user_ids(view: GraphView, node: fx.Node) -> bool:
    while node.op != "placeholder":
        passes = view.op_class(node) in _PASSES or view.name(node) in ("clamp", "clamp_min")
        if not passes or not view.data_inputs(node):
            return False
        node = view.data_inputs(node)[0]
    return view.is_data(node) and source_key(node) not in _NOT_TOKENS
