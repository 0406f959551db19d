"""Caches that carry fast weights beside keys and values.

A transformers cache becomes a carrier by a change of class: every operation on its rows and tokens is
applied to the fast weights too, and one that cannot be applied to both changes neither. May be changed
here: which cache operations are mirrored, when transformers adds one. transformers is not imported: any
object with these methods will do.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ttt_compiler.errors import CacheError, CropError
from ttt_compiler.runtime.state import FastWeightState

# Set on a cache, carrier or not yet, whose last tokens may be taken back (assisted decoding).
RECORDS = "_ttt_records"
# Calls whose positions a cache remembers.
_REMEMBERED = 64
# Fewest tokens that are kept revocable: drafts are up to 20 tokens by default, and growing has a price.
_FEWEST = 32


class FastWeightCache:
    """Mixed into the class of a cache; ``self.ttt`` is its :class:`FastWeightState`.

    Attributes:
        ttt: the fast weights of the cache's rows.
        unconfirmed: tokens that came since :meth:`crop` ran last; counted while the cache records.
        arrivals: tokens and positions of the last calls, newest last; what :meth:`crop` must look at.
    """

    ttt: FastWeightState
    unconfirmed: int = 0
    arrivals: tuple[tuple[int, Tensor | None], ...] = ()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute rows (beam search)."""
        # First what may refuse: then keys and values stay as they are too.
        with _undone_on_error(self.ttt):
            self.ttt.select(beam_idx)
            super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        with _undone_on_error(self.ttt):
            self.ttt.repeat_interleave(repeats)
            super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        with _undone_on_error(self.ttt):
            self.ttt.select(indices)
            super().batch_select_indices(indices)  # type: ignore[misc]

    def activate_past_recording(self) -> None:
        """From now on keep what :meth:`crop` needs to take back tokens; assisted decoding calls this."""
        super().activate_past_recording()  # type: ignore[misc]
        record_past(self, True)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens.

        Raises:
            CropError: the cache's layers cannot, or the fast weights cannot. Nothing changed.
        """
        if tokens_to_remove < 0:
            _require_croppable(self)
            _require_one_piece(self, -tokens_to_remove)
            self.ttt.crop(-tokens_to_remove)
            self.arrivals = _without(self.arrivals, -tokens_to_remove)
        super().crop(tokens_to_remove)  # type: ignore[misc]
        self.unconfirmed = 0

    def reset(self) -> None:
        """Forget everything: no keys and values, slow weights."""
        super().reset()  # type: ignore[misc]
        self.ttt.reset()
        self.unconfirmed, self.arrivals = 0, ()


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


def record_past(cache: Any, records: bool) -> None:
    """Say whether the last tokens of ``cache``, carrier or not yet, may be taken back."""
    setattr(cache, RECORDS, records)
    cache.unconfirmed = 0


def expect(cache: FastWeightCache, tokens: int, logits_to_keep: object) -> None:
    """Before a call of ``tokens`` tokens: a recording cache can take back all that came since its last crop.

    Drafts grow while they are right and may come one token a call, so what must stay revocable is not known
    when recording starts; it is known here, before the tokens arrive. Of a prompt only those tokens count
    whose logits are asked for: what was not compared with logits is not taken back.
    """
    if not getattr(cache, RECORDS, False):
        return
    if isinstance(logits_to_keep, int) and logits_to_keep > 0:
        tokens = min(tokens, logits_to_keep)
    unconfirmed = cache.unconfirmed + tokens
    if unconfirmed > cache.ttt.revocable:
        # By doubling: the tail's size is a shape that graphs are compiled for.
        cache.ttt.keep_revocable(max(_FEWEST, 1 << (unconfirmed - 1).bit_length()))
    cache.unconfirmed = unconfirmed


def note_arrival(cache: FastWeightCache, tokens: int, pos: Tensor | None) -> None:
    """After a call of ``tokens`` tokens at ``pos`` (``[B or 1, T]`` or None)."""
    cache.arrivals = (*cache.arrivals, (tokens, pos))[-_REMEMBERED:]
    cache.ttt.arrived(cache, tokens, pos)


def cached_tokens(cache: Any) -> int:
    """Tokens that a cache holds, as a number: static caches count in a tensor."""
    return int(cache.get_seq_length())


def _require_croppable(cache: Any) -> None:
    """Raise unless all layers of a cache can take back tokens.

    Raises:
        CropError: naming a layer that cannot. transformers would raise half-way, or leave recurrent states.
    """
    stay = "Fork or save the session before tokens that may be rejected"
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    stuck = next((x for x in layers if not _crops(x)), None)
    if stuck is not None:
        raise CropError(
            f"cannot take back tokens: cache layers of type {type(stuck).__name__} cannot be cropped. "
            f"{stay}, or use a DynamicCache of a model without recurrent layers"
        )
    for layer in layers:
        if hasattr(layer, "conv_states") and not layer.record_past:
            raise CropError(
                "cannot take back tokens: a convolution keeps its last tokens alone. Call "
                f"cache.activate_past_recording() before the tokens that may be rejected. {stay}"
            )
        window = getattr(layer, "sliding_window", None)
        if window is not None and not layer.record_past and layer.get_seq_length() >= window:
            raise CropError(
                f"cannot take back tokens: a sliding window of {window} tokens is full, and what left it is "
                f"gone. Call cache.activate_past_recording() before the tokens that may be rejected. {stay}"
            )


def _crops(layer: Any) -> bool:
    """Whether ``crop`` takes back tokens of all that a layer holds."""
    if not getattr(layer, "is_croppable", True) or not hasattr(layer, "crop"):
        return False
    # transformers (5.23, 5.24): static keys beside convolution states inherit a crop of those alone.
    mixed = hasattr(layer, "conv_states") and hasattr(layer, "max_cache_len")
    return not mixed or "crop" in vars(type(layer))


def _require_one_piece(cache: FastWeightCache, tokens: int) -> None:
    """Raise unless the last ``tokens`` columns are a token of the running document in every row.

    Keys and values count columns, fast weights count tokens: padding is in the one and not in the other. And
    a document that began inside of them has replaced the fast weights of the one before.

    Raises:
        CropError: with what lies there.
    """
    stay = "Fork or save the session before tokens that may be rejected"
    held = cached_tokens(cache)
    real = cache.ttt.holding(held)
    if real is not None and not bool(real[:, max(0, held - tokens) :].all()):
        raise CropError(f"cannot take back {tokens} tokens: some of them are padding in a row. {stay}")
    left = tokens
    for index, (count, pos) in reversed(list(enumerate(cache.arrivals))):
        columns = None if pos is None else pos[:, max(0, count - left) :]
        if columns is not None:
            if bool((columns < 0).any()):
                raise CropError(
                    f"cannot take back {tokens} tokens: some of them are padding in a row. {stay}"
                )
            # The first token of everything may go: the document before it is none. Caches that were loaded
            # or put together may have held tokens before the first call that is remembered.
            first = index == 0 and columns.shape[1] == count and tokens == held
            inner = columns[:, 1:] if first else columns
            if bool((inner == 0).any()):
                raise CropError(f"cannot take back {tokens} tokens: a document begins among them. {stay}")
        left -= count
        if left <= 0:
            return
    own = [held] * cache.ttt.batch_size if real is None else real.sum(1).tolist()
    if cache.ttt.tokens_seen != own:
        raise CropError(
            f"cannot take back {tokens} tokens: padding, another document or evicted tokens may lie among "
            f"them. {stay}"
        )


def _without(
    arrivals: tuple[tuple[int, Tensor | None], ...], tokens: int
) -> tuple[tuple[int, Tensor | None], ...]:
    """``arrivals`` without the last ``tokens`` tokens."""
    kept = list(arrivals)
    while kept and tokens > 0:
        count, pos = kept.pop()
        if count > tokens:
            kept.append((count - tokens, None if pos is None else pos[:, : count - tokens]))
        tokens -= count
    return tuple(kept)


def only_last(
    arrivals: tuple[tuple[int, Tensor | None], ...], tokens: int
) -> tuple[tuple[int, Tensor | None], ...]:
    """``arrivals`` of the last ``tokens`` tokens."""
    kept: list[tuple[int, Tensor | None]] = []
    for count, pos in reversed(arrivals):
        take = min(count, tokens)
        if take == 0:
            break
        kept.append((take, None if pos is None else pos[:, count - take :]))
        tokens -= take
    # No longer the first call of all: what it began with may be gone.
    return ((0, None), *reversed(kept))


@contextlib.contextmanager
def _undone_on_error(state: FastWeightState) -> Iterator[None]:
    """Around a selection of rows, of ``state`` and then of keys and values: refused, it changes neither."""
    sites, batch = dict(state.sites), state.batch
    try:
        yield
    except BaseException:
        state.sites, state.batch = sites, batch
        raise


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


def require_empty(cache: Any) -> None:
    """Raise unless ``cache`` is a cache that nothing was read into.

    Raises:
        CacheError: it is something else, carries fast weights already, or holds tokens.
    """
    if not hasattr(cache, "layers") or not hasattr(cache, "get_seq_length"):
        raise CacheError(f"cache is a {type(cache).__name__}; pass an empty cache of transformers")
    if is_carrier(cache) or cached_tokens(cache) > 0:
        raise CacheError(
            f"this cache is in use ({cached_tokens(cache)} tokens): what it holds would be replaced. Pass an "
            "empty one"
        )


def is_carrier(cache: Any) -> bool:
    """Whether ``cache`` carries fast weights."""
    return isinstance(cache, FastWeightCache)
