"""Caches of independent sequences as one batch, and apart again.

Shorter sequences stand to the right, behind empty positions that an attention mask hides. May be changed
here: how caches are joined; only layers that keep every key and value in plain tensors can be of different
lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ttt_compiler.runtime.cache import plain_layers


def joined(caches: Sequence[Any], make: Callable[[], Any]) -> tuple[Any, list[int]]:
    """One cache with a row per given cache, and how many empty positions stand in front of each.

    A single cache is handed through as it is.

    Raises:
        CacheError: a layer keeps something else than all keys and values.
    """
    if len(caches) == 1:
        return caches[0], [0]
    layers = [plain_layers(cache) for cache in caches]
    lengths = [int(cache.get_seq_length()) for cache in caches]
    width = max(lengths)
    out = make()
    if width == 0:
        return out, [0] * len(caches)
    for i in range(max(map(len, layers))):
        parts = [(x[i].keys, x[i].values) if i < len(x) and x[i].is_initialized else None for x in layers]
        like = next(p for p in parts if p is not None)
        out.update(*(_stacked([p and p[j] for p in parts], like[j], width) for j in (0, 1)), i)
    return out, [width - n for n in lengths]


def split(cache: Any, padding: Sequence[int], make: Callable[[], Any]) -> list[Any]:
    """The rows of a cache of :func:`joined` as caches of their own, without the empty positions."""
    if len(padding) == 1:
        return [cache]
    layers = plain_layers(cache)
    out = []
    for row, empty in enumerate(padding):
        own = make()
        for i, layer in enumerate(layers):
            if layer.is_initialized and layer.keys.shape[-2] > empty:
                keys, values = (x[row : row + 1, :, empty:].clone() for x in (layer.keys, layer.values))
                own.update(keys, values, i)
        out.append(own)
    return out


def _stacked(parts: Sequence[Tensor | None], like: Tensor, width: int) -> Tensor:
    """Keys or values ``[B, H, width, d]`` of parts ``[1, H, n, d]`` with zeros in front."""
    out = like.new_zeros(len(parts), like.shape[1], width, like.shape[3])
    for row, part in enumerate(parts):
        if part is not None:
            out[row, :, width - part.shape[2] :] = part[0]
    return out
