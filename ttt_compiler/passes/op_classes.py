"""What every operation of a captured graph does to a tensor, as one of eleven classes.

The detector never reads names of modules or parameters, but it must know that ``silu`` is pointwise
and ``softmax`` is not. This file is the only place that knows operation names.

May be changed here: a name in a table, when a model uses an operation that is filed wrongly. An
unknown ATen name is looked up in torch's own ``Tag.pointwise``, so pointwise operations need no
entry unless they are composite (``logsigmoid``) or carry no tag.
"""

from __future__ import annotations

import enum
import functools
import operator

import torch
from torch import fx

SITE_SCHEMA = "ttt::site"
"""The marker our conversion puts in front of a contraction; an identity on its first argument."""


class OpClass(enum.StrEnum):
    """What an operation does, as far as tracing a hidden activation is concerned."""

    CONTRACT = "contract"  # sums over a feature axis of two operands
    POINTWISE = "pointwise"  # each output element from the same element of its inputs
    VIEW = "view"  # same elements, other shape
    SPLIT = "split"  # a part of the elements, at fixed places
    CAST = "cast"  # same elements, other dtype or device
    DROPOUT = "dropout"
    NORM = "norm"  # normalisation over the feature axis
    REDUCE = "reduce"  # sum, mean, ... over some axis
    GATHER = "gather"  # elements chosen or placed by an index tensor
    MIX = "mix"  # combines tokens, or features in a way that ends an MLP
    OTHER = "other"  # unknown; also placeholders and constants


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Spellings that mean the same operation.
_ALIASES = {
    "iadd": "add",
    "radd": "add",
    "isub": "sub",
    "subtract": "sub",
    "imul": "mul",
    "rmul": "mul",
    "multiply": "mul",
    "itruediv": "div",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "ipow": "pow",
    "rpow": "pow",
    "imatmul": "matmul",
    "and": "bitwise_and",
    "iand": "bitwise_and",
    "or": "bitwise_or",
    "ior": "bitwise_or",
    "xor": "bitwise_xor",
    "not": "logical_not",
    "invert": "bitwise_not",
    "inv": "bitwise_not",
    "concat": "cat",
    "concatenate": "cat",
    "_unsafe_view": "view",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "numpy_T": "T",
    "_grouped_mm": "grouped_mm",
    "grouped_mm_fallback": "grouped_mm",
    "_scaled_grouped_mm": "grouped_mm",
    "scaled_grouped_mm": "grouped_mm",
    "_scaled_mm": "mm",
    "scaled_mm": "mm",
    "_int_mm": "mm",
    "log_sigmoid": "logsigmoid",
    "clip": "clamp",
}

_TABLE: dict[OpClass, frozenset[str]] = {
    OpClass.CONTRACT: _names(
        "linear addmm mm matmul bmm baddbmm addbmm einsum grouped_mm tensordot mv inner dot"
    ),
    OpClass.MIX: _names(
        """cumsum cumprod logcumsumexp cummax cummin roll flip rot90 fft rfft irfft fft_fft
        fft_rfft fft_irfft stft istft pad constant_pad_nd unfold fold lstm gru rnn_tanh rnn_relu
        embedding embedding_bag tril triu scatter topk sort argsort while_loop cond bilinear
        outer cdist max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool1d
        adaptive_avg_pool2d kron trapezoid diff multinomial one_hot
        _transformer_encoder_layer_fwd"""
    ),
    OpClass.VIEW: _names(
        """site view reshape transpose permute t T mT H adjoint expand expand_as unsqueeze squeeze
        alias detach flatten unflatten ravel movedim contiguous clone view_as reshape_as repeat
        as_strided requires_grad lift_fresh broadcast_to"""
    ),
    OpClass.SPLIT: _names(
        """split chunk unbind select slice narrow split_with_sizes tensor_split hsplit vsplit
        getitem unsafe_split unsafe_chunk unsafe_split_with_sizes"""
    ),
    OpClass.CAST: _names(
        """to float half bfloat16 double int long bool type type_as _to_copy cpu cuda
        convert_element_type _to_dtype"""
    ),
    OpClass.DROPOUT: _names("dropout native_dropout alpha_dropout feature_dropout feature_alpha_dropout"),
    OpClass.NORM: _names(
        """layer_norm rms_norm native_layer_norm group_norm native_group_norm normalize batch_norm
        _fused_rms_norm instance_norm"""
    ),
    OpClass.REDUCE: _names(
        """mean sum var std norm amax amin max min var_mean std_mean linalg_vector_norm vector_norm
        linalg_norm logsumexp prod any all argmax argmin count_nonzero nansum"""
    ),
    OpClass.GATHER: _names(
        """index index_select gather take take_along_dim repeat_interleave index_add index_copy
        index_put index_fill scatter_add scatter_reduce masked_select masked_scatter setitem cat
        stack hstack vstack"""
    ),
    # Composite functions that torch does not tag.
    OpClass.POINTWISE: _names(
        """hardswish glu logsigmoid prelu softsign gelu silu relu relu6 mish swish tanhshrink
        softshrink hardshrink hardsigmoid hardtanh leaky_relu celu selu elu softplus threshold
        rsub positive fill zero copy nan_to_num square"""
    ),
}

_CLASS_OF = {name: op_class for op_class, names in _TABLE.items() for name in names}

# Pointwise, yet an affine function of each operand taken alone: no evidence of an activation.
_AFFINE = _names(
    """add sub rsub neg positive mul div where masked_fill lerp addcmul addcdiv copy fill zero
    nan_to_num real conj"""
)

# Move axes. Only these can bring the token axis to the place of the features.
PERMUTING = _names("transpose permute t T mT H adjoint movedim")

# Gathers that choose elements of their first operand (the others place elements into it, or join).
SELECTING = _names(
    """getitem index index_select gather take take_along_dim repeat_interleave masked_select"""
)

# The result never shares memory with the argument, or need not.
COPYING = _names("clone contiguous repeat lift_fresh")

_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name) for name in _names("iadd isub imul itruediv ifloordiv ipow imatmul iand ior ixor")
)


def schema_name(target: object) -> str | None:
    """Return ``namespace::name`` of a registered operator, None for a plain Python function."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name
    return None


def _raw_name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    qualified = schema_name(node.target)
    if qualified == SITE_SCHEMA:
        return "site"
    if qualified is not None:
        # A foreign operator that happens to be called "site" is not our marker.
        short = qualified.rpartition("::")[2]
        return qualified if short == "site" else short
    if node.target is getattr and len(node.args) > 1:
        return str(node.args[1])  # Dynamo writes W.T as getattr(W, 'T')
    return str(getattr(node.target, "__name__", node.target))


def op_name(node: fx.Node) -> str:
    """Canonical name: without in-place and dunder underscores, one spelling per operation."""
    if node.op not in ("call_function", "call_method"):
        return node.op
    name = _raw_name(node)
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    elif len(name) > 1:
        name = name.rstrip("_")
    if name in ("min", "max") and _argument_is_node(node, 1, "other"):
        return "minimum" if name == "min" else "maximum"  # of two tensors, not over an axis
    return _ALIASES.get(name, name)


def _argument_is_node(node: fx.Node, place: int, key: str) -> bool:
    given = node.args[place] if len(node.args) > place else node.kwargs.get(key)
    return isinstance(given, fx.Node)


def is_in_place(node: fx.Node) -> bool:
    """Whether the operation, by its spelling, writes into its first operand."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op != "call_function":
        return False
    elif node.target in _IN_PLACE_OPERATORS or node.target is operator.setitem:
        return True
    elif getattr(node.target, "__module__", "") in ("_operator", "operator"):
        return False  # operator.and_ is not in-place
    else:
        name = _raw_name(node)
    return name.endswith("_") and not name.endswith("__") and not name.startswith("_set")


@functools.cache
def _tagged_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    return any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


@functools.cache
def class_of(name: str) -> OpClass:
    """Class of a canonical name; ``OTHER`` when neither the tables nor torch's tags know it."""
    known = _CLASS_OF.get(name)
    if known is not None:
        return known
    lowered = name.lower()
    if any(part in lowered for part in ("attention", "softmax", "sdpa", "scan", "delta_rule")):
        return OpClass.MIX
    if "conv" in lowered and "convert" not in lowered:
        return OpClass.MIX
    if "grouped_mm" in lowered:
        return OpClass.CONTRACT
    return OpClass.POINTWISE if _tagged_pointwise(name) else OpClass.OTHER


def is_affine(name: str) -> bool:
    """Whether a pointwise operation is affine in each of its operands (add, mul, where, ...)."""
    return name in _AFFINE


def higher_order_name(node: fx.Node) -> str | None:
    """Name of the higher-order operator a node calls (checkpoint, scan, ...), None for others."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    return str(node.target._name)


def is_foreign(node: fx.Node) -> bool:
    """Whether the node calls an operator registered outside torch (a custom kernel)."""
    qualified = schema_name(node.target) if node.op == "call_function" else None
    return qualified is not None and qualified.partition("::")[0] not in ("aten", "prims", "prim")
