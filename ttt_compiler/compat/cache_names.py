"""What transformers calls the cache of a call, and of an output.

Checked on 5.23 and 5.24. Up to 5.23 forward and ``generate`` take ``past_key_values`` (mamba:
``cache_params``) and swallow a ``cache`` in their ``**kwargs``. Since 5.24 they take ``cache``; most rename
the older name, some swallow that. A swallowed cache is a sequence that forgets what it has read, so a call of
a converted model may use either name with either version, and its forward gets its own. May be changed here:
the names, and what is done about the renaming wrapper; ``tests/test_cache_names.py`` fails when they move.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Container, Mapping
from typing import Any

from ttt_compiler.errors import CacheError

OLD, NEW = "past_key_values", "cache"
_OTHERS = ("cache_params", "state", "mems", "past_buckets_states")


@functools.cache
def installed_name() -> str:
    """The name under which ``generate`` of the installed transformers passes a cache."""
    from transformers import GenerationMixin

    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return NEW if NEW in parameters else OLD


def own_name(forward: Callable[..., Any]) -> str:
    """The name under which ``forward``, of a model of transformers, takes its cache."""
    parameters = inspect.signature(forward).parameters
    # Code from the hub may keep the older name under a version that passes the newer one.
    names = (OLD, installed_name(), "cache_params")
    return next((name for name in names if name in parameters), installed_name())


def takes_cache(forward: Callable[..., Any]) -> bool:
    """Whether ``forward`` names a cache; openai-gpt swallows one in its ``**kwargs`` and never reads it."""
    parameters = inspect.signature(forward).parameters
    return any(name in parameters for name in (OLD, NEW, *_OTHERS))


def unusual_cache(model: Any, forward: Callable[..., Any]) -> str | None:
    """The argument in which a model keeps what it has read, where that is no cache of the usual kind.

    ``generate`` asks ``_supports_default_dynamic_cache``; xlstm has a class of its own under the usual name.
    """
    parameters = inspect.signature(forward).parameters
    usual = getattr(model, "_supports_default_dynamic_cache", None)
    names = _OTHERS if usual is None or usual() else (*_OTHERS, own_name(forward))
    return next((name for name in names if name in parameters), None)


def under(own: str, kwargs: dict[str, Any], parameters: Container[str] = ()) -> dict[str, Any]:
    """``kwargs`` with the cache under the name ``own``; what is one of ``parameters`` keeps its name.

    Raises:
        CacheError: two caches, under both names.
    """
    for other in (OLD, NEW):
        if other == own or other not in kwargs or other in parameters:
            continue
        cache = kwargs[other]
        if not _may_be_cache(other, cache):
            continue
        kwargs = {name: value for name, value in kwargs.items() if name != other}
        if cache is not None and kwargs.setdefault(own, cache) is not cache:
            if kwargs[own] is not None:
                raise CacheError(f"two caches in one call, as {own}= and as {other}=: pass one of them")
            kwargs[own] = cache
    return kwargs


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among named arguments, None without one."""
    given = (arguments.get(name) for name in (OLD, NEW) if _may_be_cache(name, arguments.get(name)))
    return next((cache for cache in given if cache is not None), None)


def returned_cache(out: Any) -> Any:
    """The cache in what a model or ``generate`` returned, None without one."""
    # Asked for the older name, an output of 5.24 prints a warning.
    return getattr(out, NEW if hasattr(out, NEW) else OLD, None)


def see_through_renames() -> None:
    """Let Dynamo begin behind the wrapper that renames arguments, where it would begin with it.

    That wrapper is one code object around all forwards, and Dynamo budgets recompiles per code object (8): a
    model with graph breaks would spend them on its layers alone, and run uncompiled. Within a capture the
    wrapper is traced as before. Checked on torch 2.13 (``eval_frame.skip_code``) and transformers 5.24
    (``deprecate_kwarg``).
    """
    deprecation: Any = sys.modules.get("transformers.utils.deprecation")
    if deprecation is None:
        return
    from torch._dynamo.eval_frame import skip_code

    skip_code(deprecation.deprecate_kwarg(OLD, "0", new_name=NEW)(lambda: None).__code__)


def _may_be_cache(name: str, value: Any) -> bool:
    """``cache`` is a common word: under that name only what counts its tokens is one."""
    return name == OLD or value is None or hasattr(value, "get_seq_length")
