"""Caches of independent sequences as one batch, and apart again.

Shorter sequences stand to the right, behind empty positions that an attention mask hides. May be changed
here: how caches are joined; only layers that keep every key and value in plain tensors can be of different
lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ttt_compiler.runtime.cache import plain_layers


def joined(caches: Sequence[Any], make: Callable[[], Any]) -> tuple[Any, list[int]]:
    """One cache with a row per given cache, and how many empty positions stand in front of each.

    A single cache is handed through as it is. Several are emptied, layer by layer, so that no more than one
    layer exists twice; after an error they hold what they held.

    Raises:
        CacheError: a layer keeps something else than all keys and values.
    """
    if len(caches) == 1:
        return caches[0], [0]
    layers = [plain_layers(cache) for cache in caches]
    lengths = [int(cache.get_seq_length()) for cache in caches]
    width = max(lengths)
    padding = [width - n for n in lengths]
    out = make()
    if width == 0:
        return out, padding
    moved: list[tuple[int, int]] = []
    try:
        for i in range(max(map(len, layers))):
            here = {row: x[i] for row, x in enumerate(layers) if i < len(x) and x[i].is_initialized}
            _put(out, i, *(_stacked(here, name, len(caches), width) for name in ("keys", "values")))
            for row, layer in here.items():
                moved.append((row, i))
                _empty(layer)
    except BaseException:
        for row, i in moved:
            # Views: there may be no memory for more.
            both = (out.layers[i].keys, out.layers[i].values)
            _put(caches[row], i, *(x[row : row + 1, :, padding[row] :] for x in both))
        raise
    return out, padding


def split(cache: Any, real: Tensor, make: Callable[[], Any]) -> list[Any]:
    """The rows of a cache of :func:`joined` as caches of their own, without the empty positions.

    It is emptied, layer by layer; after an error it is of no use.

    Args:
        cache: of ``[B, H, n, d]``.
        real: bool ``[B, n]``, which positions are not empty.
        make: builds an empty cache.
    """
    if len(real) == 1 and bool(real.all()):
        return [cache]
    out = [make() for _ in real]
    places = [row.nonzero()[:, 0] for row in real]
    for i, layer in enumerate(plain_layers(cache)):
        for row, (own, place) in enumerate(zip(out, places, strict=True)):
            if layer.is_initialized and len(place):
                both = (layer.keys, layer.values)
                _put(own, i, *(x[row : row + 1].index_select(2, place.to(x.device)) for x in both))
        _empty(layer)
    return out


def _empty(layer: Any) -> None:
    """As new. The layer's own reset may write zeros, into tensors that forks share."""
    layer.keys = layer.values = None
    layer.is_initialized = False


def _put(cache: Any, i: int, keys: Tensor, values: Tensor) -> None:
    """Make them layer i's own; ``update`` would copy them once more."""
    while len(cache.layers) <= i:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[i]
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


def _stacked(layers: Mapping[int, Any], name: str, rows: int, width: int) -> Tensor:
    """Keys or values ``[B, H, width, d]`` of layers ``[1, H, n, d]`` by row, with zeros in front."""
    like = getattr(next(iter(layers.values())), name)
    out: Tensor = like.new_zeros(rows, like.shape[1], width, like.shape[3])
    for row, layer in layers.items():
        part = getattr(layer, name)
        out[row, :, width - part.shape[2] :] = part[0]
    return out
