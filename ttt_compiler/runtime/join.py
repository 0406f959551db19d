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

    A single cache is handed through as it is. Of several, keys and values are moved, layer by layer, so that
    no more than one layer is held twice: the given caches are empty afterwards.

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
        for own in layers:
            if i < len(own):
                own[i].keys = own[i].values = None
    return out, [width - n for n in lengths]


def split(cache: Any, padding: Sequence[int], make: Callable[[], Any]) -> list[Any]:
    """The rows of a cache of :func:`joined` as caches of their own, without the empty positions.

    Keys and values are moved, layer by layer: ``cache`` is empty afterwards.
    """
    if len(padding) == 1:
        return [cache]
    out = [make() for _ in padding]
    for i, layer in enumerate(plain_layers(cache)):
        if not layer.is_initialized:
            continue
        for row, empty in enumerate(padding):
            if layer.keys.shape[-2] > empty:
                keys, values = (x[row : row + 1, :, empty:].clone() for x in (layer.keys, layer.values))
                out[row].update(keys, values, i)
        layer.keys = layer.values = None
    return out


def _stacked(parts: Sequence[Tensor | None], like: Tensor, width: int) -> Tensor:
    """Keys or values ``[B, H, width, d]`` of parts ``[1, H, n, d]`` with zeros in front."""
    out = like.new_zeros(len(parts), like.shape[1], width, like.shape[3])
    for row, part in enumerate(parts):
        if part is not None:
            out[row, :, width - part.shape[2] :] = part[0]
    return out
