"""What a layer of a transformers cache is made of, and how each part is stored, checked, filled, forked.

A part is a group of attributes that several kinds of layers have in common; ``layers.py`` says which kind
has which parts. What a part writes in place is cloned by a fork; what it replaces by a new tensor
(``torch.cat``) may be shared. Each class names the method of transformers 5.23 that decides. May be
changed here: parts of new kinds of layers, when transformers adds one.

A stored part is a JSON-ready description and tensors. ``check`` reads both from a file that may lie: it
raises :class:`UnfitError` before anything is built, and ``fill`` looks up no attribute that a file names.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

Said = dict[str, Any]
Tensors = dict[str, Tensor]
# Longer than any sequence, and far from where arithmetic of 64 bits overflows.
LONGEST = 2**48


class UnfitError(Exception):
    """Why a stored layer does not fit; the caller's error names the file and the layer."""


class Part:
    """A group of a layer's attributes; see the module."""

    def export(self, layer: Any) -> tuple[Said, Tensors]:
        """Description and tensors. Tensors are not copied."""
        raise NotImplementedError

    def check(self, said: Said, tensors: Tensors, empty: Any, batch: int, dtype: torch.dtype | None) -> None:
        """Raise :class:`UnfitError` unless :meth:`export` of a layer like ``empty`` could have said this.

        Takes what it knows out of ``said`` and ``tensors``; what is left is nobody's.
        """
        raise NotImplementedError

    def fill(self, layer: Any, said: Said, tensors: Tensors) -> None:
        """Make an empty layer what was exported."""
        raise NotImplementedError

    def fork(self, layer: Any) -> None:
        """Make ``layer``, a shallow copy, independent of its original."""


class Dynamic(Part):
    """Keys and values that grow. ``DynamicLayer.update`` concatenates, all else slices or selects: shared."""

    def export(self, layer: Any) -> tuple[Said, Tensors]:
        """See :class:`Part`."""
        # Between lazy initialisation and the first update there is one empty dimension, and nothing to keep.
        if not layer.is_initialized or layer.keys.dim() != 4:
            return {"filled": False}, {}
        return {"filled": True}, {"keys": layer.keys, "values": layer.values}

    def check(self, said: Said, tensors: Tensors, empty: Any, batch: int, dtype: torch.dtype | None) -> None:
        """See :class:`Part`."""
        if flag(said, "filled"):
            keys_and_values(tensors, batch, dtype)

    def fill(self, layer: Any, said: Said, tensors: Tensors) -> None:
        """See :class:`Part`."""
        if said["filled"]:
            layer.lazy_initialization(tensors["keys"], tensors["values"])
            layer.keys, layer.values = tensors["keys"], tensors["values"]


class Sliding(Dynamic):
    """The last keys and values of a window. ``DynamicSlidingWindowLayer.update`` concatenates: shared."""

    def export(self, layer: Any) -> tuple[Said, Tensors]:
        """See :class:`Part`."""
        said, tensors = super().export(layer)
        window, seen, past = layer.sliding_window, layer.cumulative_length, layer.record_past
        return {**said, "window": window, "seen": seen, "record_past": past}, tensors

    def check(self, said: Said, tensors: Tensors, empty: Any, batch: int, dtype: torch.dtype | None) -> None:
        """See :class:`Part`."""
        past, seen = flag(said, "record_past"), size(said, "seen")
        same(said, "window", empty.sliding_window)
        filled = said.get("filled") is True
        length = (
            tensors["keys"].shape[2] if filled and "keys" in tensors and tensors["keys"].dim() == 4 else 0
        )
        super().check(said, tensors, empty, batch, dtype)
        # A window of one token slices from -0, which keeps everything.
        kept = min(seen, empty.sliding_window - 1) if empty.sliding_window > 1 else seen
        if not kept <= length <= (seen if past else kept):
            raise UnfitError(f"holds {length} tokens of {seen} in a window of {empty.sliding_window}")

    def fill(self, layer: Any, said: Said, tensors: Tensors) -> None:
        """See :class:`Part`."""
        super().fill(layer, said, tensors)
        layer.cumulative_length, layer.record_past = said["seen"], said["record_past"]


class Indexed(Part):
    """Keys of an indexer. ``DynamicIndexedLayer.update_indexer`` and its models concatenate: shared."""

    def export(self, layer: Any) -> tuple[Said, Tensors]:
        """See :class:`Part`."""
        tensors = {}
        if layer.is_indexer_initialized and layer.indexer_keys.dim() == 3:
            tensors["indexer_keys"] = layer.indexer_keys
        if layer.indexer_position_ids is not None:
            tensors["indexer_position_ids"] = layer.indexer_position_ids
        return {"indexer": sorted(tensors)}, tensors

    def check(self, said: Said, tensors: Tensors, empty: Any, batch: int, dtype: torch.dtype | None) -> None:
        """See :class:`Part`."""
        names = _names(said, "indexer", ("indexer_keys", "indexer_position_ids"))
        for name in names:
            x = take(tensors, name)
            ids = name == "indexer_position_ids"
            if x.dim() != 3 or x.shape[1 if ids else 0] != batch or x.is_floating_point() == ids:
                raise UnfitError(f"{name} is {tuple(x.shape)} {x.dtype}")

    def fill(self, layer: Any, said: Said, tensors: Tensors) -> None:
        """See :class:`Part`."""
        if "indexer_keys" in said["indexer"]:
            layer.lazy_initialization_indexer(tensors["indexer_keys"])
            layer.indexer_keys = tensors["indexer_keys"]
        layer.indexer_position_ids = tensors.get("indexer_position_ids")


class Static(Part):
    """Keys and values in place, as many as were reserved. ``StaticLayer.update`` writes in place: cloned.

    Only the used positions are stored. The rest is zero: nothing writes there but what is used after.
    """

    def export(self, layer: Any) -> tuple[Said, Tensors]:
        """See :class:`Part`."""
        used = self.used(layer)
        said = {"filled": layer.is_initialized, "reserved": layer.max_cache_len, "seen": used}
        if not layer.is_initialized:
            return said, {}
        return said, {"keys": layer.keys[:, :, :used], "values": layer.values[:, :, :used]}

    def check(self, said: Said, tensors: Tensors, empty: Any, batch: int, dtype: torch.dtype | None) -> None:
        """See :class:`Part`."""
        size(said, "reserved")
        seen = size(said, "seen")
        if seen > empty.max_cache_len:
            raise UnfitError(
                f"holds {seen} tokens, this cache has room for {empty.max_cache_len}: make one with a larger "
                "max_cache_len"
            )
        self.check_length(said, tensors, seen, batch, dtype)

    def check_length(
        self, said: Said, tensors: Tensors, length: int, batch: int, dtype: torch.dtype | None
    ) -> None:
        """Keys and values of exactly ``length`` positions, or none where nothing was ever written."""
        if flag(said, "filled"):
            held = keys_and_values(tensors, batch, dtype)
            if held != length:
                raise UnfitError(f"holds {held} tokens and says {length}")
        elif length:
            raise UnfitError(f"holds no tokens and says {length}")

    def fill(self, layer: Any, said: Said, tensors: Tensors) -> None:
        """See :class:`Part`."""
        if said["filled"]:
            keys, values = tensors["keys"], tensors["values"]
            layer.lazy_initialization(keys, values)
            layer.keys[:, :, : keys.shape[2]].copy_(keys)
            layer.values[:, :, : keys.shape[2]].copy_(values)
        layer.cumulative_length.fill_(said["seen"])

    def fork(self, layer: Any) -> None:
        """See :class:`Part`."""
        layer.cumulative_length = layer.cumulative_length.clone()
        if layer.is_initialized:
            keys, values = layer.keys, layer.values
            # Through its own allocation, which marks the addresses as static for cudagraphs.
            layer.lazy_initialization(keys, values)
            layer.keys.copy_(keys)
            layer.values.copy_(values)

    def used(self, layer: Any) -> int:
        """Positions that hold a token."""
        return int(layer.cumulative_length)


class StaticSliding(Static):
    """A window in place. ``StaticSlidingWindowLayer.update`` copies into its buffers: cloned.

    It counts twice: a tensor as long as the window is not full, and an integer for ever.
    """

    def export(self, layer: Any) -> tuple[Said, Tensors]:
        """See :class:`Part`."""
        said, tensors = super().export(layer)
        written = int(layer.cumulative_length)
        return {**said, "seen": layer.cumulative_length_int, "written": written}, tensors

    def check(self, said: Said, tensors: Tensors, empty: Any, batch: int, dtype: torch.dtype | None) -> None:
        """See :class:`Part`."""
        same(said, "reserved", empty.max_cache_len)
        seen, written = size(said, "seen"), size(said, "written")
        used = min(seen, empty.max_cache_len)
        if written > used or (seen <= empty.max_cache_len and written != seen):
            raise UnfitError(f"counts {written} tokens and {seen}")
        self.check_length(said, tensors, used, batch, dtype)

    def fill(self, layer: Any, said: Said, tensors: Tensors) -> None:
        """See :class:`Part`."""
        super().fill(layer, said, tensors)
        layer.cumulative_length.fill_(said["written"])
        layer.cumulative_length_int = said["seen"]

    def used(self, layer: Any) -> int:
        """See :class:`Static`."""
        return int(min(layer.cumulative_length_int, layer.max_cache_len))


class StaticIndexed(Part):
    """An indexer's keys in place. ``StaticIndexedLayer.update_indexer`` writes in place: cloned."""

    def export(self, layer: Any) -> tuple[Said, Tensors]:
        """See :class:`Part`."""
        tensors, seen = {}, 0
        if layer.is_indexer_initialized:
            seen = int(layer.indexer_cumulative_length)
            tensors["indexer_keys"] = layer.indexer_keys[:, :seen]
        if layer.indexer_position_ids is not None:
            tensors["indexer_position_ids"] = layer.indexer_position_ids
        return {"indexer": sorted(tensors), "indexer_seen": seen}, tensors

    def check(self, said: Said, tensors: Tensors, empty: Any, batch: int, dtype: torch.dtype | None) -> None:
        """See :class:`Part`."""
        seen, keys = size(said, "indexer_seen"), tensors.get("indexer_keys")
        INDEXED.check(said, tensors, empty, batch, dtype)
        if seen > empty.max_cache_len or seen != (0 if keys is None else keys.shape[1]):
            raise UnfitError(f"its indexer says {seen} tokens")

    def fill(self, layer: Any, said: Said, tensors: Tensors) -> None:
        """See :class:`Part`."""
        if "indexer_keys" in said["indexer"]:
            keys = tensors["indexer_keys"]
            layer.lazy_initialization_indexer(keys)
            layer.indexer_keys[:, : keys.shape[1]].copy_(keys)
            layer.indexer_cumulative_length.fill_(said["indexer_seen"])
        layer.indexer_position_ids = tensors.get("indexer_position_ids")

    def fork(self, layer: Any) -> None:
        """See :class:`Part`."""
        if layer.is_indexer_initialized:
            keys, seen = layer.indexer_keys, layer.indexer_cumulative_length
            layer.lazy_initialization_indexer(keys)
            layer.indexer_keys.copy_(keys)
            layer.indexer_cumulative_length.copy_(seen)


class Linear(Part):
    """Convolution and recurrent states. ``LinearAttentionLayer`` copies into both in place: cloned."""

    STATES: ClassVar = ("conv", "recurrent", "previous")

    def export(self, layer: Any) -> tuple[Said, Tensors]:
        """See :class:`Part`."""
        states, tensors = [], {}
        for i in range(layer.number_of_states):
            conv, recurrent = layer.is_conv_states_initialized[i], layer.is_recurrent_states_initialized[i]
            if conv:
                tensors[f"conv.{i}"] = layer.conv_states[i]
            if recurrent:
                tensors[f"recurrent.{i}"] = layer.recurrent_states[i]
            states.append(
                {
                    "conv": conv,
                    "recurrent": recurrent,
                    "previous": layer.has_previous_state[i],
                    "kernel": layer.conv_kernel_size[i] or 0,
                }
            )
        # Its name differs from a window's: a layer that has both parts says it of each.
        return {"states": states, "record_conv": layer.record_past}, tensors

    def check(self, said: Said, tensors: Tensors, empty: Any, batch: int, dtype: torch.dtype | None) -> None:
        """See :class:`Part`."""
        past, states = flag(said, "record_conv"), said.pop("states", None)
        if not isinstance(states, list) or len(states) != empty.number_of_states:
            raise UnfitError(f"does not have the {empty.number_of_states} states of this model's")
        for i, state in enumerate(states):
            if not isinstance(state, dict):
                raise UnfitError("describes a state by something else")
            state = dict(state)
            conv, recurrent, _ = (flag(state, name) for name in self.STATES)
            kernel = size(state, "kernel")
            if state:
                raise UnfitError(f"has an unknown {next(iter(state))!a}")
            for name in (f"conv.{i}",) * conv + (f"recurrent.{i}",) * recurrent:
                x = take(tensors, name)
                if x.dim() < 2 or x.shape[0] != batch or not x.is_floating_point():
                    raise UnfitError(f"{name} is {tuple(x.shape)} {x.dtype}")
                if name.startswith("conv") and not past and x.shape[-1] != kernel:
                    raise UnfitError(f"{name} has {x.shape[-1]} columns for a kernel of {kernel}")

    def fill(self, layer: Any, said: Said, tensors: Tensors) -> None:
        """See :class:`Part`."""
        layer.record_past = said["record_conv"]
        for i, state in enumerate(said["states"]):
            if state["conv"]:
                x = tensors[f"conv.{i}"]
                layer.lazy_initialization(conv_states=x, state_idx=i, conv_kernel_size=x.shape[-1])
                layer.conv_states[i].copy_(x)
                layer.conv_kernel_size[i] = state["kernel"]
            if state["recurrent"]:
                x = tensors[f"recurrent.{i}"]
                layer.lazy_initialization(recurrent_states=x, state_idx=i)
                layer.recurrent_states[i].copy_(x)
            layer.has_previous_state[i] = state["previous"]

    def fork(self, layer: Any) -> None:
        """See :class:`Part`."""
        conv, recurrent = dict(layer.conv_states), dict(layer.recurrent_states)
        for name in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state"):
            setattr(layer, name, dict(getattr(layer, name)))
        kernels = dict(layer.conv_kernel_size)
        layer.conv_states, layer.recurrent_states = dict(conv), dict(recurrent)
        layer.conv_kernel_size = dict(kernels)
        for i in range(layer.number_of_states):
            if layer.is_conv_states_initialized[i]:
                x = conv[i]
                layer.lazy_initialization(conv_states=x, state_idx=i, conv_kernel_size=x.shape[-1])
                layer.conv_states[i].copy_(x)
                layer.conv_kernel_size[i] = kernels[i]
            if layer.is_recurrent_states_initialized[i]:
                layer.lazy_initialization(recurrent_states=recurrent[i], state_idx=i)
                layer.recurrent_states[i].copy_(recurrent[i])


DYNAMIC, SLIDING, INDEXED = Dynamic(), Sliding(), Indexed()
STATIC, STATIC_SLIDING, STATIC_INDEXED = Static(), StaticSliding(), StaticIndexed()
LINEAR = Linear()


def flag(said: Said, name: str) -> bool:
    """Take a truth value out of ``said``."""
    value = said.pop(name, None)
    if not isinstance(value, bool):
        raise UnfitError(f"does not say whether it is {name}")
    return value


def size(said: Said, name: str) -> int:
    """Take a size out of ``said``."""
    value = said.pop(name, None)
    if type(value) is not int or not 0 <= value < LONGEST:
        raise UnfitError(f"does not say its {name}")
    return value


def same(said: Said, name: str, own: int) -> None:
    """Take a size out of ``said`` that this model's cache has too."""
    value = size(said, name)
    if value != own:
        raise UnfitError(f"has {name} {value}, this model's cache {own}")


def take(tensors: Tensors, name: str) -> Tensor:
    """Take a tensor out of ``tensors``."""
    if name not in tensors:
        raise UnfitError(f"lacks its {name}")
    return tensors.pop(name)


def keys_and_values(tensors: Tensors, batch: int, dtype: torch.dtype | None) -> int:
    """Take keys and values ``[batch, heads, tokens, width]`` out of ``tensors``; returns how many tokens."""
    keys, values = take(tensors, "keys"), take(tensors, "values")
    for x in (keys, values):
        fits = (
            x.dim() == 4 and x.shape[0] == batch and x.is_floating_point() and x.dtype in (dtype or x.dtype,)
        )
        if not fits or x.shape[1:3] != keys.shape[1:3]:
            raise UnfitError(f"its keys {shown(keys)} and values {shown(values)} do not fit this model")
    return keys.shape[2]


def shown(x: Tensor) -> str:
    """Shape and dtype for a message."""
    return f"{tuple(x.shape)} {x.dtype}"


def _names(said: Said, name: str, known: tuple[str, ...]) -> list[str]:
    """Take a list of some of the ``known`` names out of ``said``."""
    value = said.pop(name, None)
    if not isinstance(value, list) or not set(map(str, value)) <= set(known) or len(value) > len(known):
        raise UnfitError(f"does not say its {name}")
    return [n for n in known if n in value]
