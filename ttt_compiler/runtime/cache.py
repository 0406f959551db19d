"""Caches that carry fast weights beside keys and values.

A transformers cache becomes a carrier by a change of class: every operation on its rows and tokens is
applied to the fast weights too. May be changed here: which cache operations are mirrored, when
transformers adds one. transformers is not imported: any object with these methods will do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ttt_compiler.errors import CacheError
from ttt_compiler.runtime.state import FastWeightState


class FastWeightCache:
    """Mixed into the class of a cache; ``self.ttt`` is its :class:`FastWeightState`."""

    ttt: FastWeightState

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute rows (beam search)."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.ttt.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.ttt.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.ttt.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens.

        Raises:
            CropError: they reach into a written chunk. Neither keys and values nor fast weights changed.
        """
        self.ttt.crop(-tokens_to_remove)
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def reset(self) -> None:
        """Forget everything: no keys and values, slow weights."""
        super().reset()  # type: ignore[misc]
        self.ttt.reset()


@functools.cache
def carrier_class(base: type) -> type:
    """The carrier class of a cache class. One per base, so that graphs guard on a stable type."""
    return type(f"FastWeight{base.__name__}", (FastWeightCache, base), {"__doc__": base.__doc__})


def attach_state(cache: Any, state: FastWeightState) -> Any:
    """Make ``cache`` (empty, or holding the tokens that ``state`` has seen) carry ``state``; returns it."""
    if not is_carrier(cache):
        try:
            cache.__class__ = carrier_class(type(cache))  # type: ignore[arg-type]
        except TypeError as e:
            raise CacheError(
                f"a cache of type {type(cache).__name__} cannot carry fast weights ({e}). Use a transformers "
                "DynamicCache, or ttt.Session(model)"
            ) from e
    cache.ttt = state
    return cache


def evict(layers: Iterable[Any], keep: int, sink: int) -> None:
    """Drop keys and values ``[B, H, T, d]`` of every layer but for the first ``sink`` and last ``keep``."""
    for layer in layers:
        length = layer.get_seq_length()
        for name in ("keys", "values") if length else ():
            x = getattr(layer, name)
            if length > sink + keep:
                x = torch.cat([x[..., :sink, :], x[..., length - keep :, :]], dim=-2)
            # One layout whether or not something was dropped: the next call guards on strides.
            setattr(layer, name, x.contiguous())


def plain_layers(cache: Any) -> list[Any]:
    """The layers of a cache that keeps all keys and values in plain tensors.

    Raises:
        CacheError: it keeps them in another way (sliding window, static, quantised, recurrent).
    """
    layers = [] if cache is None else list(cache.layers)
    for layer in layers:
        if type(layer).__name__ != "DynamicLayer":
            raise CacheError(
                f"cache layers of type {type(layer).__name__} cannot be cut or joined here; use a "
                "DynamicCache of a model with full attention"
            )
    return layers


def is_carrier(cache: Any) -> bool:
    """Whether ``cache`` carries fast weights."""
    return isinstance(cache, FastWeightCache)
