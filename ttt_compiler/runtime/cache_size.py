"""How many bytes of keys, values and states a model's cache will hold, before any of it exists.

A twin of the model without memory (on the meta device) reads a few tokens into a real cache of transformers,
and the shapes of what it cached say what one token takes in every layer; nothing is derived from names of
configuration fields. How a layer grows is its class's: ``layers.KINDS`` names the classes, here is their
length. May be changed here: the length of a new kind of layer.

Counted are the elements that a layer holds, as ``tensor.nbytes`` does. A sliding window of a dynamic cache is
a view: until the next call the tokens of the last one stay alive behind it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ttt_compiler.compat.cache_names import own_name
from ttt_compiler.errors import UnsupportedModelError
from ttt_compiler.runtime.layer_states import Compressed
from ttt_compiler.runtime.layers import KINDS

# What the twin reads: more than a convolution's taps.
_TOKENS = 16
# What a static cache of the twin reserves, at no cost; a shorter layer is a window.
_RESERVED = 2**24
# Tensors of a layer with one row per token: name, and which dimension counts tokens.
_GROWING = (("keys", 2), ("values", 2), ("indexer_keys", 1))


@dataclass(frozen=True)
class Numbers:
    """Numbers that a layer keeps, per token or once: their shape for one sequence, and bytes of each."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return torch.Size(self.shape).numel() * self.itemsize

    def __str__(self) -> str:
        return " x ".join(map(str, (*self.shape, self.itemsize)))


@dataclass(frozen=True)
class CacheKind:
    """Layers that keep the same.

    Attributes:
        layers: how many of them.
        per_token: what each of the last ``limit`` tokens leaves in one of them.
        limit: most tokens kept; None when all are.
        constant: what one of them keeps however long the sequence is.
    """

    layers: int
    per_token: tuple[Numbers, ...]
    limit: int | None
    constant: tuple[Numbers, ...]

    @property
    def name(self) -> str:
        """In words."""
        window = "full attention" if self.limit is None else f"sliding window, {self.limit:,} kept"
        names = [window] * bool(self.per_token) + ["linear attention"] * bool(self.constant)
        return " and ".join(names)

    def tokens(self, context: int) -> int:
        """Tokens kept of ``context``."""
        return context if self.limit is None else min(context, self.limit)

    def layer_bytes(self, context: int) -> int:
        """Bytes of one layer and sequence after ``context`` tokens."""
        growing = sum(n.nbytes for n in self.per_token)
        return self.tokens(context) * growing + sum(n.nbytes for n in self.constant)

    def formula(self, context: int) -> str:
        """:meth:`layer_bytes` in numbers."""
        tokens = f"{self.tokens(context)}"
        if self.limit is not None:
            tokens = f"min({context}, {self.limit})"
        terms = [f"{tokens} x ({' + '.join(map(str, self.per_token))})"] if self.per_token else []
        return " + ".join([*terms, *map(str, self.constant)])


def meta_twin(config: Any, dtype: torch.dtype, model_class: Any = None) -> nn.Module:
    """A model of this configuration that takes no memory, in evaluation mode.

    Args:
        config: of transformers; it is not changed.
        dtype: of its weights.
        model_class: its class; default the causal language model of this configuration.

    Raises:
        UnsupportedModelError: transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    make = getattr(model_class, "_from_config", AutoModelForCausalLM.from_config)
    try:
        with torch.device("meta"):
            twin: Any = make(copy.deepcopy(config), dtype=dtype)
    except Exception as e:
        raise UnsupportedModelError(
            f"{type(config).__name__}: no causal language model can be built from it "
            f"({type(e).__name__}: {_first_line(e)})"
        ) from e
    model: nn.Module = twin.eval()
    return model


def cache_kinds(
    config: Any, dtype: torch.dtype, *, model_class: Any = None, static: bool = False
) -> tuple[CacheKind, ...]:
    """What the cache of a model keeps, by kinds of layers, in the order of the model.

    Args:
        config: of transformers.
        dtype: of the model.
        model_class: see :func:`meta_twin`.
        static: of a ``StaticCache``, where ``context`` is what it reserves, instead of a ``DynamicCache``.

    Raises:
        UnsupportedModelError: the model's forward looks at values, or keeps layers of an unknown kind.
    """
    from transformers import DynamicCache, StaticCache

    twin: Any = meta_twin(config, dtype, model_class)
    if hasattr(twin, "set_experts_implementation"):
        # The default's grouped products exist for bfloat16 alone on this device. Checked on torch 2.13.
        twin.set_experts_implementation("batched_mm")
    if hasattr(twin, "set_attn_implementation"):
        # What is cached is the same, and this one never asks a mask for its values.
        twin.set_attn_implementation("eager")
    # Some models search their input for padding, to warn.
    twin.config.pad_token_id = None
    text = twin.config.get_text_config(decoder=True)
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    try:
        cache: Any = StaticCache(text, max_cache_len=_RESERVED) if static else DynamicCache(config=text)
        with torch.no_grad():
            twin(input_ids=ids, use_cache=True, **{own_name(twin.forward): cache})
    except Exception as e:
        raise UnsupportedModelError(
            f"{type(twin).__name__}: its {'static ' * static}cache cannot be measured without weights "
            f"({type(e).__name__}: {_first_line(e)})"
        ) from e
    found: dict[CacheKind, int] = {}
    for layer in cache.layers:
        kind = _kind(layer)
        if kind.per_token or kind.constant:
            found[kind] = found.get(kind, 0) + 1
    return tuple(dataclasses.replace(kind, layers=count) for kind, count in found.items())


def cache_bytes(config: Any, context: int, dtype: torch.dtype) -> int:
    """Bytes of keys, values and states of one sequence of ``context`` tokens in a ``DynamicCache``.

    Raises:
        UnsupportedModelError: see :func:`cache_kinds`.
    """
    return total_bytes(cache_kinds(config, dtype), context)


def total_bytes(kinds: Sequence[CacheKind], context: int) -> int:
    """Bytes of one sequence in all layers."""
    return sum(kind.layers * kind.layer_bytes(context) for kind in kinds)


def _kind(layer: Any) -> CacheKind:
    """A layer that has read ``_TOKENS`` tokens of one sequence, without its count."""
    # Compressed entries grow with the length, by rules of the model's own: stored, yet not planned.
    known = [name for name, parts in KINDS.items() if not any(isinstance(p, Compressed) for p in parts)]
    if type(layer).__name__ not in known:
        raise UnsupportedModelError(
            f"it keeps layers of type {type(layer).__name__}, and how those grow is not known here. Known: "
            f"{', '.join(known)}"
        )
    reserved = getattr(layer, "max_cache_len", None)
    limit = _limit(layer, reserved)
    held = reserved if reserved is not None else _TOKENS if limit is None else min(_TOKENS, limit)
    per_token = []
    for name, dim in _GROWING:
        x = getattr(layer, name, None)
        if x is None or not x.numel():
            continue
        if x.shape[dim] != held:
            raise UnsupportedModelError(
                f"it keeps {x.shape[dim]} rows of {name} for {_TOKENS} tokens, which is not understood here"
            )
        per_token.append(Numbers((*x.shape[1:dim], *x.shape[dim + 1 :]), x.itemsize))
    constant = tuple(Numbers(tuple(x.shape[1:]), x.itemsize) for x in _states(layer))
    return CacheKind(0, tuple(per_token), limit if per_token else None, constant)


def _limit(layer: Any, reserved: int | None) -> int | None:
    """Most tokens that a layer of attention keeps."""
    if reserved is not None:
        return reserved if reserved < _RESERVED else None
    window = getattr(layer, "sliding_window", None)
    # The newest token comes with its call; a window of one slices from -0, which keeps everything.
    return window - 1 if window is not None and window > 1 else None


def _states(layer: Any) -> Iterator[Tensor]:
    for name in ("conv_states", "recurrent_states"):
        yield from (x for x in getattr(layer, name, {}).values() if x is not None)


def _first_line(e: Exception) -> str:
    return (str(e).strip() or "no message").splitlines()[0]
