"""What ``generate`` of transformers must know of a converted model, and what cannot carry fast weights.

Assisted decoding takes tokens back, from caches that no call has seen yet, so the place where ``generate``
prepares its cache says so. Continuous batching runs in a thread that logs errors and returns prompts, so it
is refused at its door as well as in the call. May be changed here: which methods of a model are wrapped,
and which caches are refused. Checked on transformers 5.23 and 5.24;
``tests/runtime/test_generation_modes.py`` and ``test_assisted.py`` fail when one of them moves.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ttt_compiler.compat.cache_names import NEW, OLD, cache_in, installed_name, returned_cache, under
from ttt_compiler.errors import CacheError
from ttt_compiler.runtime.cache import RECORDS, cached_tokens, record_past

if TYPE_CHECKING:
    from ttt_compiler.runtime.root import Root

# Arguments that only continuous batching passes.
_PAGED = ("read_index", "write_index")
_NO_PAGES = (
    "continuous batching keeps keys and values in pages that requests share, which cannot carry fast "
    "weights. Call model.generate(input_ids, attention_mask=..., ...) on a left-padded batch instead of "
    'generate_batch or cache_implementation="paged". To serve the base model: with ttt.disabled(model): ...'
)


def install(model: nn.Module) -> None:
    """Wrap the doors of ``generate`` on this instance; a model that does not generate is left alone."""
    for name, wrap in _WRAPPERS.items():
        inner = getattr(type(model), name, None)
        if inner is not None:
            model.__dict__[name] = types.MethodType(wrap(inner), model)


def remove(model: nn.Module) -> None:
    """Undo :func:`install` exactly."""
    for name in _WRAPPERS:
        model.__dict__.pop(name, None)


def require_carriable(root: Root, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise when what a call reads from, or leaves, cannot carry fast weights: it would run on base weights.

    Raises:
        CacheError: with what to type instead.
    """
    if all(kwargs.get(name) is not None for name in _PAGED):
        raise CacheError(_NO_PAGES)
    if root.make_cache is None:
        return
    cache, given = root.cache(args, kwargs), root.argument(root.cache_name, args, kwargs)
    if given is not None and root.cache_name != root.unusual_cache and not hasattr(given, "get_seq_length"):
        raise CacheError(
            f"{root.cache_name}= is a {type(given).__name__}, which cannot carry fast weights. Pass a "
            "transformers DynamicCache, or ttt.Session(model).cache"
        )
    if cache is not None and not root.takes_cache:
        raise CacheError(
            "this model takes no cache: it would forget what earlier calls have read, and its fast weights "
            "would not. Leave the cache out (generate does): every call then reads the whole sequence"
        )
    if getattr(cache, "offloading", False):
        raise CacheError(
            "an offloaded cache moves keys and values to the CPU, and this model runs there. Leave "
            'cache_implementation="offloaded" (or offloading=True) out'
        )
    if root.keeps is not None and (cache is not None or root.argument("use_cache", args, kwargs) is True):
        raise CacheError(
            f"this model keeps what it has read in {root.keeps}, inside of its modules, where the tokens "
            "of two sequences would mix. Pass use_cache=False (generate takes it too): every step then reads "
            "the whole sequence"
        )
    name = root.unusual_cache
    used = name is not None and (cache is not None or root.argument(name, args, kwargs) is not None)
    if used or (name is not None and root.argument("use_cache", args, kwargs) is True):
        raise CacheError(
            f"this model keeps what it has read in {name!r}, which cannot carry fast weights. Pass "
            "use_cache=False (generate takes it too): every step then reads the whole sequence"
        )


def require_new_tokens(cache: Any, pos: Tensor | None) -> None:
    """Raise when assisted decoding reads again what its cache already holds.

    transformers (5.23, 5.24) slices what is new off a sequence before every other prefill, not before this
    one: keys and values would stand in the cache twice, and the fast weights would begin anew.

    Raises:
        CacheError: with what to type instead.
    """
    if pos is not None and getattr(cache, RECORDS, False) and bool((pos[..., 0] == 0).any()):
        held = cached_tokens(cache)
        if held > 0:
            raise CacheError(
                f"assisted decoding gives the model its whole sequence, and the cache holds {held} tokens "
                "of it. Continue this session with plain generate, or begin assisted decoding with an "
                "empty one"
            )


def _refusing_pages(inner: Callable[..., Any]) -> Callable[..., Any]:
    """``init_continuous_batching``, through which all of continuous batching goes."""

    @functools.wraps(inner)
    def init_continuous_batching(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        from ttt_compiler.runtime.root import require_root

        if require_root(self)[1].context.enabled:
            raise CacheError(_NO_PAGES)
        return inner(self, *args, **kwargs)

    return init_continuous_batching


def _saying_what_is_assisted(inner: Callable[..., Any]) -> Callable[..., Any]:
    """``_prepare_cache_for_generation``, which runs before anything is recorded or read.

    Needed because a plain cache does not keep that ``activate_past_recording`` was called on it, and that
    is called before the first call of the model makes it a carrier: of the model itself in assisted
    decoding, and of a draft model in each of its rounds.
    """

    @functools.wraps(inner)
    def prepare_cache(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        from ttt_compiler.runtime.root import require_root

        given = inspect.signature(inner).bind(self, *args, **kwargs).arguments
        _refuse_early_exit(self, given.get("generation_config"))
        user = cache_in(given["model_kwargs"])
        out = inner(self, *args, **kwargs)
        if user is None and not require_root(self)[1].takes_cache:
            # One is made for every model, and passed with the whole sequence to those that take none.
            for name in (OLD, NEW):
                given["model_kwargs"].pop(name, None)
        cache = cache_in(given["model_kwargs"])
        if cache is not None:
            config, mode = given.get("generation_config"), given.get("generation_mode")
            draft = bool(getattr(config, "is_assistant", False))
            records = draft or getattr(mode, "value", mode) == "assisted_generation"
            if records != getattr(cache, RECORDS, False):
                record_past(cache, records)
        return out

    return prepare_cache


def _ending_what_is_assisted(inner: Callable[..., Any]) -> Callable[..., Any]:
    """``generate``: takes a cache under either name; what it records for taking tokens back ends with it."""

    @functools.wraps(inner)
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        from ttt_compiler.runtime.root import require_root

        if require_root(self)[1].make_cache is not None:
            kwargs = under(installed_name(), kwargs)
        caches = [cache_in(kwargs)]
        try:
            out = inner(self, *args, **kwargs)
            caches.append(returned_cache(out))
            return out
        finally:
            for cache in caches:
                if getattr(cache, RECORDS, False):
                    record_past(cache, False)

    return generate


def _refuse_early_exit(model: nn.Module, config: Any) -> None:
    """A draft by the first layers alone leaves the fast weights of the others behind, in the same cache."""
    from ttt_compiler.runtime.root import require_root

    if getattr(config, "assistant_early_exit", None) is not None and require_root(model)[1].context.enabled:
        raise CacheError(
            "assistant_early_exit runs the first layers alone, and the fast weights of the others would miss "
            "those tokens. Use prompt_lookup_num_tokens= or assistant_model="
        )


_WRAPPERS = {
    "init_continuous_batching": _refusing_pages,
    "_prepare_cache_for_generation": _saying_what_is_assisted,
    "generate": _ending_what_is_assisted,
}
