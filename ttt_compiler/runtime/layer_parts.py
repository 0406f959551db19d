"""Keys and values in a layer of a transformers cache: how they are stored, checked, filled, forked.

A part is a group of attributes that several kinds of layers have in common; ``layers.py`` says which kind
has which parts, and those beside keys and values are in ``layer_states.py``. What a part writes in place
is cloned by a fork; what it replaces by a new tensor (``torch.cat``) may be shared. Each class names the
method of transformers (5.23, 5.24) that decides. May be changed here: parts of new kinds of layers.

A stored part is a JSON-ready description and tensors. ``check`` reads both from a file that may lie: it
raises :class:`UnfitError` before anything is built, and ``fill`` looks up no attribute that a file names.
"""

from __future__ import annotations

from typing import Any

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
