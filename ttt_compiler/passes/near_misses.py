"""Things that look like an MLP's down-projection but are spelled in a way that is not supported.

They are reported as rejections with the reason, so that nobody has to guess why nothing was found.

May be changed here: one more unsupported spelling and its sentence. What becomes supported goes to
``contractions.py``.
"""

from __future__ import annotations

from torch import fx

from .graph import GraphView, flat_nodes
from .op_classes import OpClass, is_affine

_DEPTH = 12
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
# What may stand between the convolutions of one MLP.
_BETWEEN = (
    OpClass.POINTWISE,
    OpClass.VIEW,
    OpClass.CAST,
    OpClass.DROPOUT,
    OpClass.NORM,
    OpClass.SPLIT,
)
# nn.TransformerEncoderLayer in eval mode is one operation that contains its MLP.
_FUSED_ENCODER_LAYER = "_transformer_encoder_layer_fwd"
_FUSED_ENCODER_REASON = (
    "a fused encoder layer hides its MLP; call torch.backends.mha.set_fastpath_enabled(False)"
)


def near_miss(view: GraphView, node: fx.Node) -> tuple[fx.Node | None, str] | None:
    """Weight (None if unknown) and reason when ``node`` is an unsupported spelling, else None."""
    name = view.name(node)
    if name == _FUSED_ENCODER_LAYER:
        return None, _FUSED_ENCODER_REASON
    if name == "einsum":
        return _einsum_of_many(view, node)
    if name in _CONVOLUTIONS and _is_down_convolution(view, node):
        weight = view.root(_weight(node))
        return weight, (
            "the down-projection of an MLP of 1x1 convolutions: its features are on axis 1; only features on "
            "the last axis are supported"
        )
    return None


def _einsum_of_many(view: GraphView, node: fx.Node) -> tuple[fx.Node | None, str] | None:
    factors = [view.resolve(node, f) for f in flat_nodes(node.args[1:])]
    weights = [f for f in factors if not view.is_data(f)]
    if len(factors) < 3 or len(weights) == len(factors) or not weights:
        return None
    root = view.root(max(weights, key=lambda w: len(view.shape(w) or ())))
    return root, (
        f"an einsum of {len(factors)} operands; only a product of data and one weight is supported: split it"
    )


def _weight(node: fx.Node) -> fx.Node:
    found = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    assert isinstance(found, fx.Node)
    return found


def _is_pointwise_convolution(view: GraphView, node: fx.Node) -> bool:
    if view.name(node) not in _CONVOLUTIONS or not view.is_data(node):
        return False
    shape, before = view.shape(_weight(node)), view.shape(view.inputs(node)[0])
    if shape is None or before is None or view.is_data(_weight(node)):
        return False
    channels = before[1] if len(before) == len(shape) else before[0]
    return all(d == 1 for d in shape[2:]) and shape[1] == channels


def _is_down_convolution(view: GraphView, node: fx.Node) -> bool:
    """Whether a kernel-1 convolution reads an activation of another one that read its output's width."""
    if not _is_pointwise_convolution(view, node):
        return False
    shape = view.shape(_weight(node)) or ()
    current, active = view.data_inputs(node)[0], False
    for _ in range(_DEPTH):
        if _is_pointwise_convolution(view, current):
            up = view.shape(_weight(current)) or ()
            return active and up[1] == shape[0]
        op_class, inputs = view.op_class(current), view.data_inputs(current)
        if op_class not in _BETWEEN or not inputs:
            return False
        gated = view.name(current) in ("mul", "glu") and len(inputs) > 1
        active |= op_class is OpClass.POINTWISE and (gated or not is_affine(view.name(current)))
        current = inputs[0]
    return False
