"""Keys, values and states of every kind of cache layer of transformers: stored, restored, forked, counted.

``KINDS`` says what each class of layer is made of; a file names a class only to be
looked up there. transformers is not imported, a class counts by its name. May be changed here: the table,
when transformers adds a kind (tests fail then).

Bit for bit: a restored or forked cache goes on as the original does, with the same bits in the same
places of every operation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt_compiler.errors import SnapshotError, TTTError
from ttt_compiler.runtime.layer_parts import Dynamic, Part, Sliding, Static, StaticSliding, UnfitError
from ttt_compiler.runtime.layer_states import Compressed, Indexed, Linear, StaticIndexed

# Layers without a part hold nothing: MLP layers, and those that share the keys and values of another.
KINDS: dict[str, tuple[Part, ...]] = {
    "DynamicLayer": (Dynamic(),),
    "DynamicSlidingWindowLayer": (Sliding(),),
    "DynamicIndexedLayer": (Dynamic(), Indexed()),
    "StaticLayer": (Static(),),
    "StaticSlidingWindowLayer": (StaticSliding(),),
    "StaticIndexedLayer": (Static(), StaticIndexed()),
    "LinearAttentionLayer": (Linear(),),
    "LinearAttentionAndFullAttentionLayer": (Dynamic(), Linear()),
    "LinearAttentionAndSlidingWindowAttentionLayer": (Sliding(), Linear()),
    "LinearAttentionAndStaticFullAttentionLayer": (Static(), Linear()),
    "LinearAttentionAndStaticSlidingWindowAttentionLayer": (StaticSliding(), Linear()),
    "DummyLayer": (),
    "DeepseekV4HCACache": (Sliding(), Compressed()),
    "DeepseekV4CSACache": (Sliding(), Compressed()),
}
# Caches that hold nothing but their layers; others would lose what they hold beside them.
CACHES = ("DynamicCache", "StaticCache")
MOST_LAYERS = 4096


def export_layers(
    cache: Any, error: type[TTTError] = SnapshotError
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """What a cache holds: tensors, named ``cache.<layer>.<name>``, and a JSON-ready description.

    Tensors are the cache's own, not copies: write them before it goes on. Of static layers only the used
    positions are taken.

    Raises:
        error: a cache or layer of another kind, naming it.
    """
    if cache is None:
        return {}, []
    own = _own_class(cache)
    if own not in CACHES:
        raise error(f"a {own} cannot be saved; use one of {', '.join(CACHES)}; nothing was changed")
    if getattr(cache, "offloading", False) and torch.cuda.is_available():
        # Layers go to the CPU without waiting; their bytes must have arrived.
        torch.cuda.synchronize()
    tensors: dict[str, Tensor] = {}
    description = []
    for i, layer in enumerate(cache.layers):
        said: dict[str, Any] = {"kind": type(layer).__name__}
        for part in _parts(layer, error):
            more, held = part.export(layer)
            said |= more
            tensors |= {f"cache.{i}.{name}": x for name, x in held.items()}
        description.append(said)
    return tensors, description


def check_layers(
    description: object,
    tensors: dict[str, Tensor],
    cache: Any,
    batch: int,
    where: object,
    *,
    dtype: torch.dtype | None = None,
    error: type[TTTError] = SnapshotError,
) -> None:
    """Raise unless :func:`fill_layers` can make ``cache`` what was stored. Nothing is built or changed.

    Args:
        description: of :func:`export_layers`, as it was read; it may be anything.
        tensors: those whose names start with ``cache.``.
        cache: an empty cache of this model; None for a model without one.
        batch: rows that the file says it holds.
        where: the file, for messages.
        dtype: what keys and values have to be, if that is known.
        error: what to raise.

    Raises:
        error: another kind of cache, more or fewer layers, sizes that contradict each other, tensors that
            are missing or left over.
    """
    if not isinstance(description, list) or not all(isinstance(said, dict) for said in description):
        raise error(f"{where}: does not describe its layers; nothing was changed")
    rest = dict(tensors)
    kinds = _expected(cache, len(description))
    if description and len(kinds) != len(description):
        raise error(
            f"{where}: holds {len(description)} layers, this model's cache {len(kinds)}; nothing was changed"
        )
    for i, (said, empty) in enumerate(zip(description, kinds, strict=False)):
        kind, own = said.get("kind"), type(empty).__name__
        if kind != own:
            raise error(
                f"{where}: its layer {i} is a {str(kind)[:60]!a}, this model's cache has a {own}: load it "
                "into an empty cache of the kind that it was saved with; nothing was changed"
            )
        said = {k: v for k, v in said.items() if k != "kind"}
        prefix = f"cache.{i}."
        held = {k.removeprefix(prefix): rest.pop(k) for k in list(rest) if k.startswith(prefix)}
        try:
            for part in _parts(empty, error):
                part.check(said, held, empty, batch, dtype)
            for left in (*said, *held):
                raise UnfitError(f"has an unknown {left[:60]!a}")
        except UnfitError as e:
            raise error(f"{where}: layer {i} ({own}) {e}; nothing was changed") from e
    if rest:
        raise error(f"{where}: unexpected tensor {min(rest)}, of no layer; nothing was changed")


def fill_layers(
    cache: Any,
    description: Sequence[dict[str, Any]],
    tensors: dict[str, Tensor],
    device: torch.device | Sequence[torch.device] | None = None,
) -> None:
    """Make an empty cache what :func:`export_layers` found; only after :func:`check_layers`.

    Args:
        cache: the cache that was checked against.
        description: what was checked.
        tensors: what was checked; the cache takes them over.
        device: where the layers compute, one or one per layer; where the tensors are by default.
    """
    while len(cache.layers) < len(description):
        cache.layers.append(cache.layer_class_to_replicate())
    for i, (said, layer) in enumerate(zip(description, cache.layers, strict=False)):
        prefix = f"cache.{i}."
        place = device[i] if isinstance(device, Sequence) else device
        held = {k.removeprefix(prefix): x.to(place) for k, x in tensors.items() if k.startswith(prefix)}
        for part in _parts(layer, SnapshotError):
            part.fill(layer, said, held)
        if getattr(cache, "offloading", False):
            cache.offload(i, cache.only_non_sliding)


def fork_cache(cache: Any) -> Any:
    """A cache that stands where ``cache`` stands and goes on without it, in as little new memory as is safe.

    Tensors that no layer writes in place are shared until one of the two replaces them. Caches and layers
    of unknown kinds are copied. What the cache carries beside its layers (``ttt``) is the same object
    still: the caller forks that.
    """
    if cache is None:
        return None
    if _own_class(cache) not in CACHES:
        carried = getattr(cache, "ttt", None)
        return copy.deepcopy(cache, {id(carried): carried})
    other = copy.copy(cache)
    other.layers = [_fork_layer(layer) for layer in cache.layers]
    return other


def layer_bytes(cache: Any) -> int:
    """Bytes of the tensors that a cache's layers hold, of any kind; views of one memory count once."""
    return sum(sum(_sizes(layer).values()) for layer in ([] if cache is None else cache.layers))


def _fork_layer(layer: Any) -> Any:
    known = KINDS.get(type(layer).__name__)
    if known is None:
        return copy.deepcopy(layer)
    other = copy.copy(layer)
    for part in known:
        part.fork(other)
    return other


def _parts(layer: Any, error: type[TTTError]) -> tuple[Part, ...]:
    known = KINDS.get(type(layer).__name__)
    if known is None:
        raise error(
            f"cache layers of type {type(layer).__name__} are not supported here; use a DynamicCache or "
            "StaticCache of a model whose layers are among "
            f"{', '.join(KINDS)}; nothing was changed"
        )
    return known


def _own_class(cache: Any) -> str:
    """The class that transformers gave the cache, behind the one that makes it carry fast weights."""
    package = __name__.partition(".")[0]
    return next(c.__name__ for c in type(cache).__mro__ if c.__module__.partition(".")[0] != package)


def _expected(cache: Any, count: int) -> list[Any]:
    """Empty layers like those that ``cache`` will have; one that grows as it is used will have ``count``."""
    if cache is None:
        return []
    layers, grows = list(cache.layers), cache.layer_class_to_replicate
    if grows is None or count > MOST_LAYERS:
        return layers
    return layers + [grows() for _ in range(count - len(layers))]


def _sizes(layer: Any) -> dict[int, int]:
    """Bytes by memory. Views of one memory, and counters, which have no dimension, would count too much."""
    out: dict[int, int] = {}
    for x in _tensors(vars(layer).values()):
        if x.dim():
            address = x.untyped_storage().data_ptr()
            out[address] = max(out.get(address, 0), x.nbytes)
    return out


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
