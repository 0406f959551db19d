"""What layers of a transformers cache hold beside keys and values: indexers, states, compressed entries.

The same rules as in ``layer_parts.py``. May be changed here: parts of new kinds of layers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ttt_compiler.runtime.layer_parts import Part, Said, Tensors, UnfitError, flag, same, shown, size, take


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
                raise UnfitError(f"{name} is {shown(x)}")

    def fill(self, layer: Any, said: Said, tensors: Tensors) -> None:
        """See :class:`Part`."""
        if "indexer_keys" in said["indexer"]:
            layer.lazy_initialization_indexer(tensors["indexer_keys"])
            layer.indexer_keys = tensors["indexer_keys"]
        layer.indexer_position_ids = tensors.get("indexer_position_ids")


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
        Indexed().check(said, tensors, empty, batch, dtype)
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
                # A convolution over token ids keeps integers.
                fits = x.is_floating_point() or name.startswith("conv")
                if x.dim() < 2 or x.shape[0] != batch or not fits:
                    raise UnfitError(f"{name} is {shown(x)}")
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


class Compressed(Part):
    """Compressed entries and the tokens before the next. ``DeepseekV4HCACache`` replaces all: shared.

    Its values are its keys.
    """

    BUFFERS: ClassVar = ("buffer_kv", "buffer_gate", "compressed_kv", "overlap_kv", "overlap_gate")

    def export(self, layer: Any) -> tuple[Said, Tensors]:
        """See :class:`Part`."""
        tensors = {name: x for name, x in self._all(layer).items() if x is not None}
        said = {"rate": layer.compress_rate, "entries": dict(layer.entry_count), "buffers": sorted(tensors)}
        return said, tensors

    def check(self, said: Said, tensors: Tensors, empty: Any, batch: int, dtype: torch.dtype | None) -> None:
        """See :class:`Part`."""
        same(said, "rate", empty.compress_rate)
        entries = said.pop("entries", None)
        if not isinstance(entries, dict) or entries.keys() != empty.entry_count.keys():
            raise UnfitError("does not say its entries")
        entries = dict(entries)
        for name in empty.entry_count:
            size(entries, name)
        for name in _names(said, "buffers", tuple(self._all(empty))):
            x = take(tensors, name)
            if x.dim() < 2 or x.shape[0] != batch or not x.is_floating_point():
                raise UnfitError(f"{name} is {shown(x)}")

    def fill(self, layer: Any, said: Said, tensors: Tensors) -> None:
        """See :class:`Part`."""
        layer.values = layer.keys
        for name in self._all(layer):
            if name in tensors:
                attribute, _, key = name.partition(".")
                getattr(layer, attribute)[key] = tensors[name]
        layer.entry_count = dict(said["entries"])

    def fork(self, layer: Any) -> None:
        """See :class:`Part`."""
        for attribute in (*self.BUFFERS, "entry_count"):
            if hasattr(layer, attribute):
                setattr(layer, attribute, dict(getattr(layer, attribute)))

    def _all(self, layer: Any) -> dict[str, Tensor | None]:
        """By ``attribute.key``; a heavily compressed layer has no overlap."""
        return {f"{a}.{key}": x for a in self.BUFFERS for key, x in getattr(layer, a, {}).items()}


def _names(said: Said, name: str, known: tuple[str, ...]) -> list[str]:
    """Take a list of some of the ``known`` names out of ``said``."""
    value = said.pop(name, None)
    if not isinstance(value, list) or not set(map(str, value)) <= set(known) or len(value) > len(known):
        raise UnfitError(f"does not say its {name}")
    return [n for n in known if n in value]
