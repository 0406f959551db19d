"""Does every hidden feature stay with its token between an MLP's projections?

Views, reductions, norms and index operations are harmless along the feature axis and none of an MLP along
any other. :func:`follow_axes` walks the region between the projections in graph order and keeps, for every
value, which of its axes count tokens and in which order.

May be changed here: how one more operation names its axes. An axis that cannot be read is taken as harmless
when the shapes agree; ``discover`` checks causality of every match by running the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from .graph import Dim, GraphView, flat_nodes, value_of
from .op_classes import PERMUTING, SELECTING, OpClass

# Axes of a value: token axes are numbered in their order, every feature axis is _FEATURE.
_FEATURE = 1_000
_Axes = tuple[int, ...]
_LAYOUT = (OpClass.VIEW, OpClass.CAST, OpClass.DROPOUT)
_SAME_AXES = ("contiguous", "clone", "detach", "alias", "requires_grad", "lift_fresh", "site", "expand_as")


class TokensMixError(Exception):
    """Carries, in plain words, what was seen."""


def follow_axes(view: GraphView, nodes: Sequence[fx.Node], ups: Sequence[fx.Node], operand: fx.Node) -> bool:
    """Return whether an index computed from data picks tokens inside of the region (routing).

    Raises:
        TokensMixError: a token's hidden features are not made of that token's projections alone.
    """
    axes: dict[fx.Node, _Axes] = {up: _fresh(len(view.shape(up) or ())) for up in ups}
    routed = False
    for node in nodes:
        sources = [i for i in view.data_inputs(node) if i in axes]
        if not sources:
            continue
        _check_write(view, node)
        if view.op_class(node) is OpClass.GATHER:
            routed |= _check_index(view, node, axes[sources[0]])
        axes[node] = _axes_of(view, node, sources, axes)
        if view.op_class(node) is OpClass.SPLIT and not routed:
            _check_part(view, node, axes[node], ups)
    if operand in axes and not _in_order(axes[operand]):
        raise TokensMixError("mixes tokens: its axes are permuted before the contraction")
    return routed


def token_count(view: GraphView, node: fx.Node, features: int) -> int | None:
    """How many tokens a value holds, by the sizes of the traced call; None when not known."""
    shape = view.shape(node)
    sizes = [_hint(d) for d in shape or ()]
    known = [s for s in sizes if s is not None]
    if not sizes or len(known) != len(sizes):
        return None
    return math.prod(known) // features


def _hint(dim: Dim) -> int | None:
    """The size in the traced call. Reading it adds no guard."""
    if isinstance(dim, int):
        return dim
    return int(dim.node.hint) if dim.node.has_hint() else None


def _fresh(rank: int) -> _Axes:
    return (*range(rank - 1), _FEATURE) if rank else ()


def _in_order(axes: _Axes) -> bool:
    return list(axes) == sorted(axes)


def _axes_of(view: GraphView, node: fx.Node, sources: list[fx.Node], axes: Mapping[fx.Node, _Axes]) -> _Axes:
    before, op_class, name = axes[sources[0]], view.op_class(node), view.name(node)
    shape = view.shape(node)
    rank = len(before) if shape is None else len(shape)
    if name in PERMUTING:
        order = permutation(view, node)
        if order is None or len(order) != len(before):
            return _fresh(rank)
        return tuple(before[a] for a in order)
    if op_class is OpClass.VIEW and name not in _SAME_AXES:
        if not _in_order(before):
            raise TokensMixError(f"mixes tokens: {name} joins axes that were permuted before")
        return _viewed(view.shape(sources[0]), shape, before)
    if op_class is OpClass.REDUCE:
        _check_reduced(view, node, before)
    elif op_class is OpClass.NORM:
        _check_normalised(view, node, before)
    elif op_class is OpClass.POINTWISE:
        return _combined(view, node, [s for s in sources if len(axes[s]) == rank], axes) or _fresh(rank)
    if rank == len(before):
        return before
    if not _in_order(before):
        raise TokensMixError(f"mixes tokens: {name} of a value whose axes were permuted before")
    return _fresh(rank)


def _combined(
    view: GraphView, node: fx.Node, sources: list[fx.Node], axes: Mapping[fx.Node, _Axes]
) -> _Axes | None:
    """Axes of an elementwise result: tokens wherever an operand that is not broadcast says so."""
    if not sources:
        return None
    result = []
    for place in range(len(axes[sources[0]])):
        sizes = {s: (view.shape(s) or ())[place : place + 1] for s in sources}
        said = {axes[s][place] for s in sources if sizes[s] != (1,)} or {axes[sources[0]][place]}
        tokens = said - {_FEATURE}
        if len(tokens) > 1 and not all(_in_order(axes[s]) for s in sources):
            name = view.name(node)
            raise TokensMixError(f"mixes tokens: {name} combines values whose axes are in another order")
        result.append(min(said))
    return tuple(result)


def _check_part(view: GraphView, node: fx.Node, axes: _Axes, ups: Sequence[fx.Node]) -> None:
    """Refuse a slice along the tokens; what is picked could be given to other tokens by broadcasting."""
    shape = view.shape(node)
    sizes = [_hint(d) for d, a in zip(shape or (), axes, strict=False) if a != _FEATURE]
    before = token_count(view, ups[0], 1)
    width = view.width(ups[0])
    if shape is None or before is None or not width or None in sizes:
        return
    after, all_tokens = math.prod(s for s in sizes if s is not None), before // width
    if after < all_tokens:
        raise TokensMixError(f"mixes tokens: {view.name(node)} picks {after} of {all_tokens} tokens")


def _viewed(old: tuple[Dim, ...] | None, new: tuple[Dim, ...] | None, before: _Axes) -> _Axes:
    """Axes after a view of axes in order: what the feature axes are split into stays features."""
    if old is None or new is None:
        return before
    tokens = sum(a != _FEATURE for a in before)
    lead = 0
    while lead < min(tokens, len(new)) and str(old[lead]) == str(new[lead]):
        lead += 1
    if lead == tokens and len(new) > lead:
        return (*range(lead), *(_FEATURE for _ in new[lead:]))
    return _fresh(len(new))


def permutation(view: GraphView, node: fx.Node) -> tuple[int, ...] | None:
    """For every axis of a permuting view, which axis of its input it was; None when not readable."""
    rank = len(view.shape(node) or ())
    name = view.name(node)
    given = [*node.args[1:], *node.kwargs.values()]
    if len(given) == 1 and isinstance(given[0], (list, tuple)):
        given = list(given[0])
    if not all(isinstance(a, int) for a in given) or rank == 0:
        return None
    places = [a % rank for a in given if isinstance(a, int)]
    order = list(range(rank))
    if name == "permute":
        return tuple(places) if sorted(places) == order else None
    if not places:
        return (*order[:-2], rank - 1, rank - 2) if name in ("mT", "adjoint", "H") else tuple(order[::-1])
    if len(places) != 2:
        return None
    a, b = places
    if name == "movedim":
        order.remove(a)
        order.insert(b, a)
    else:
        order[a], order[b] = b, a
    return tuple(order)


def moves_last_axis(view: GraphView, node: fx.Node) -> bool:
    """Whether a permuting view brings another axis to the last place."""
    rank = len(view.shape(node) or ())
    if rank < 2:
        return False
    order = permutation(view, node)
    return order is None or order[-1] != rank - 1


def tokens_as_features(view: GraphView, node: fx.Node) -> bool:
    """Whether the last axis was another one shortly before a contraction (MLP-Mixer)."""
    while view.data_inputs(node):
        inputs, op_class = view.data_inputs(node), view.op_class(node)
        if view.name(node) in PERMUTING and moves_last_axis(view, node):
            return True
        affine = view.name(node) in ("mul", "add", "sub", "div") and len(inputs) == 1
        if op_class not in _LAYOUT and not affine:
            return False
        node = inputs[0]
    return False


def _named_axes(node: fx.Node, place: int, rank: int) -> list[int] | None:
    """Axes an operation is told to work on; None when it is told none (that is: all of them)."""
    given: object = node.args[place] if len(node.args) > place else None
    for key in ("dim", "axis"):
        given = node.kwargs.get(key, given)
    axes = list(given) if isinstance(given, (list, tuple)) else [given]
    whole = [a % rank for a in axes if isinstance(a, int) and not isinstance(a, bool) and rank]
    return whole if len(whole) == len(axes) and whole else None


def _check_reduced(view: GraphView, node: fx.Node, before: _Axes) -> None:
    name = view.name(node)
    place = 2 if name in ("norm", "linalg_vector_norm", "vector_norm", "linalg_norm") else 1
    reduced = _named_axes(node, place, len(before))
    if reduced is None or any(before[a] != _FEATURE for a in reduced):
        raise TokensMixError(f"follows {name} over an axis that is not the features: it mixes tokens")


def _check_normalised(view: GraphView, node: fx.Node, before: _Axes) -> None:
    name, rank = view.name(node), len(before)
    if name == "normalize":
        axes = _named_axes(node, 2, rank) or [1]
    elif name in ("group_norm", "native_group_norm", "instance_norm"):
        axes = list(range(1, rank))
    elif name == "batch_norm":
        axes = [1]  # the statistics of a channel; in training they are the batch's, as everywhere
    else:
        sizes = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
        count = len(sizes) if isinstance(sizes, (list, tuple)) else 1
        axes = list(range(rank - count, rank))
    if any(before[a] != _FEATURE for a in axes if a < rank):
        raise TokensMixError(f"follows {name} over an axis that is not the features: it mixes tokens")


def _check_index(view: GraphView, node: fx.Node, before: _Axes) -> bool:
    """Return whether tokens are routed by data; a constant choice of features is harmless.

    Raises:
        TokensMixError: features are reordered by data, or tokens by a constant.
    """
    name, rank = view.name(node), len(before)
    by_data = any(view.is_data(i) for i in view.inputs(node)[1:] if _is_index(i))
    touched = [before[a] for a in _indexed_axes(node, name, rank)]
    if touched and all(a == _FEATURE for a in touched):
        if by_data:
            raise TokensMixError(f"follows {name}, which reorders the hidden features by data")
        return False
    if name == "setitem" and len(node.args) > 2:
        written = node.args[2]
        if not isinstance(written, fx.Node) or not view.is_data(written):
            return by_data  # a constant, whatever token it is written into
    if not by_data and touched:
        what = "picks" if name in SELECTING else "writes"
        raise TokensMixError(f"mixes tokens: {name} {what} tokens at fixed places")
    return True


def _check_write(view: GraphView, node: fx.Node) -> None:
    """Refuse a write into single tokens through a view (``h[:, t].copy_(state)``)."""
    written = view.part_written(node)
    if written is None:
        return
    part, whole = (view.shape(w) or () for w in written)
    if [str(d) for d in part[:-1]] != [str(d) for d in whole[:-1]]:
        raise TokensMixError(f"mixes tokens: {view.name(node)} writes tokens at fixed places")


def _is_index(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and not value.dtype.is_floating_point


def _indexed_axes(node: fx.Node, name: str, rank: int) -> list[int]:
    """Axes that an index operation chooses along."""
    if name in ("getitem", "setitem", "index", "index_put"):
        index = node.args[1] if len(node.args) > 1 else ()
        items = list(index) if isinstance(index, (list, tuple)) else [index]
        if any(i is Ellipsis for i in items):
            place = next(k for k, i in enumerate(items) if i is Ellipsis)
            items[place : place + 1] = [slice(None)] * (rank - len(items) + 1)
        return [k for k, i in enumerate(items[:rank]) if not _takes_all(i)]
    if name in ("take_along_dim", "repeat_interleave"):
        return _named_axes(node, 2, rank) or list(range(rank))
    if name in ("index_select", "gather", "index_add", "index_copy", "index_fill", "scatter_add"):
        return _named_axes(node, 1, rank) or list(range(rank))
    return list(range(rank))


def _takes_all(item: object) -> bool:
    if item is None:
        return True
    return isinstance(item, slice) and item == slice(None) and not list(flat_nodes(item))
