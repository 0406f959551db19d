"""The call boundary of a converted model: which state a call runs on, and where its documents start.

Two halves. :meth:`Root.prepare` runs outside of any capture: it gives a fresh cache its fast-weight state
and refuses caches that cannot be right. :meth:`Root.enter` is captured: it hands state and positions to
the sites. May be changed here: what a call may pass, the checks; where documents
start is :mod:`.documents`.
"""

from __future__ import annotations

import contextlib
import inspect
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ttt_compiler.compat.cache_names import NEW, OLD, cache_in, under
from ttt_compiler.config import TTTConfig
from ttt_compiler.errors import (
    CacheError,
    ConversionLostError,
    NotConvertedError,
    PositionError,
    UnsupportedModelError,
)
from ttt_compiler.runtime.cache import attach_state, cached_tokens, expect, is_carrier, note_arrival
from ttt_compiler.runtime.calls import CallLock
from ttt_compiler.runtime.changes import identity, progress
from ttt_compiler.runtime.documents import (
    positions_of,
    require_boundaries,
    require_padding_mask,
    without_padding,
)
from ttt_compiler.runtime.generation import require_carriable, require_new_tokens
from ttt_compiler.runtime.site import CallContext, FastWeightSite, mark, weight_of
from ttt_compiler.runtime.state import FastWeightState, check_fits
from ttt_compiler.runtime.tables import has_room_to_spread
from ttt_compiler.spec import SiteSpec

NAME = "_ttt_root"
# Marks a graph module of ``ttt.rewrite``: its sites are in the graph already.
REWRITTEN = "_ttt_rewritten"
STATE_ARGUMENT = "ttt_state"
# Where packed documents start: ours for any model, and the names under which models take them.
DOCUMENTS_ARGUMENT = "ttt_cu_seqlens"
_CU_SEQLENS = (DOCUMENTS_ARGUMENT, "cu_seqlens", "cu_seq_lens_q")


@dataclass(eq=False)
class Root:
    """What conversion recorded on a model.

    Attributes:
        config: how it was converted.
        requested: the configuration that was asked for; differs from ``config`` when its ``layers`` was a
            function, which ``config`` holds as the names it chose.
        specs: the sites, in block order.
        modules: per site key, the module that applies the weight, wherever it stands now.
        token: identity of this conversion.
        transposed: weights stored ``[F, D]``.
        context: the channel to the sites.
        slots: names of forward's positional arguments, to their positions.
        forward: the model's forward behind the boundary, bound.
        lock: held by a call; the context above serves one call at a time.
        keeps: an attribute in which the model itself keeps what it has read, outside of any cache.
        make_cache: builds an empty key/value cache, or None for models without one.
        cache_name: under which the forward of a model of transformers takes its cache.
        takes_cache: whether the forward of a model of transformers takes a cache at all.
        unusual_cache: the argument in which the model keeps what it has read, if that is of another kind.
    """

    config: TTTConfig
    requested: TTTConfig
    specs: tuple[SiteSpec, ...]
    modules: dict[str, nn.Module] = field(repr=False)
    transposed: frozenset[str]
    context: CallContext
    slots: Mapping[str, int]
    keeps: str | None = None
    make_cache: Callable[[], Any] | None = field(default=None, repr=False)
    cache_name: str = OLD
    takes_cache: bool = True
    unusual_cache: str | None = None
    forward: Callable[..., Any] | None = field(default=None, repr=False)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    lock: CallLock = field(default_factory=CallLock, repr=False)

    def __post_init__(self) -> None:
        # Sites that no module but the model itself stands for are marked at the start of its forward.
        calls: dict[str, set[int]] = {}
        for spec in self.specs:
            calls.setdefault(spec.module, set()).add(spec.call)
        self.shared_calls = {name: len(c) for name, c in calls.items() if name and len(c) > 1}
        self.own_sites = tuple((s, s.encode()) for s in self.specs if not s.module)

    def parameters(self, spec: SiteSpec) -> tuple[nn.Parameter, nn.Parameter | None]:
        """conv and P of a site."""
        module = self.modules[spec.key]
        return getattr(module, spec.conv_name), getattr(module, spec.proj_name)

    def new_state(self, batch: int, revocable: int = 0) -> FastWeightState:
        """State of ``batch`` sequences that have not begun, on the model's device."""
        like = self.like(self.specs[0])
        return FastWeightState.zeros(
            self.specs,
            batch,
            like.dtype,
            like.device,
            self.owner(),
            revocable,
            spread=has_room_to_spread(like.device, revocable),
        )

    def like(self, spec: SiteSpec) -> Tensor:
        """A tensor with the dtype and device of a site's activations; its weight may be quantised."""
        return self.parameters(spec)[0]

    def weight(self, spec: SiteSpec) -> Tensor:
        """W0 of a site as ``[D, F]``.

        Raises:
            UnsupportedModelError: W0 exists inside of the forward pass only.
        """
        if spec.derived:
            raise UnsupportedModelError(
                f"{spec.key}: its matrix is computed from {spec.weight} inside of the model's forward "
                "(quantised or parametrised), so it cannot be read from outside"
            )
        weight = weight_of(self.modules[spec.key], spec)
        return weight.t() if spec.weight in self.transposed else weight

    def weights(self) -> list[Tensor]:
        """The chosen weights as they stand in the model now, one per site."""
        return [weight_of(self.modules[s.key], s) for s in self.specs]

    def owner(self) -> tuple[object, ...]:
        """Identity of the slow weights that a state is written on; training or loading changes it."""
        weights = self.weights()
        for spec in self.specs:
            if spec.derived and spec.module:
                weights += self.modules[spec.key].parameters()
        return (self.token, *map(identity, weights))

    def adapter(self) -> tuple[object, ...]:
        """Identity of conv and P of every site."""
        return tuple(identity(p) for s in self.specs for p in self.parameters(s) if p is not None)

    def check_modules(self, model: nn.Module) -> None:
        """Raise when a module that applies a chosen weight has left the model since conversion.

        Raises:
            ConversionLostError: naming the site.
        """
        present = {id(m) for m in model.modules()}
        for spec in self.specs:
            module = self.modules[spec.key]
            if id(module) not in present or (spec.module and not isinstance(module, FastWeightSite)):
                raise ConversionLostError(
                    f"{spec.key}: the module {spec.module} was replaced after conversion, so its fast "
                    "weights are gone. Replace modules before ttt.convert(model, ...), or type "
                    "ttt.revert(model) and convert again"
                )

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Before a call, outside of any capture: settle the cache.

        A fresh cache gets its state here, with as many rows as the call has, whoever made it
        (``generate`` included). ``use_cache=True`` without a cache makes one.

        Returns:
            The keyword arguments to call with, and whether the call runs on a state (and so is inference).

        Raises:
            CacheError: the cache holds tokens whose fast weights are unknown, or of another batch.
            PositionError: positions of another shape than ``[batch, tokens]``.
        """
        kwargs = self.named(kwargs)
        cache = self.cache(args, kwargs)
        if not self.context.enabled:
            if is_carrier(cache):
                raise CacheError(
                    "this cache carries fast weights, which would miss the tokens of a disabled "
                    "call. Inside of "
                    "ttt.disabled(model) use a cache of its own: transformers.DynamicCache()"
                )
            return kwargs, False
        require_carriable(self, args, kwargs)
        pos = self.argument("position_ids", args, kwargs)
        if pos is not None and pos.dim() not in (1, 2):
            raise PositionError(
                f"position_ids of {pos.dim()} dimensions do not say where documents start. Pass them "
                "as [batch, tokens]"
            )
        self._check_mask(args, kwargs)
        self._check_boundaries(args, kwargs)
        state = kwargs.get(STATE_ARGUMENT)
        if state is not None:
            first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            self._check(state, first.shape[0])
            return kwargs, True
        if cache is None:
            if self.make_cache is None or self.argument("use_cache", args, kwargs) is not True:
                return kwargs, False
            cache = self.make_cache()
            kwargs = {**kwargs, self.cache_name: cache}
        tokens = self._tokens(args, kwargs)
        if tokens is None:
            raise CacheError(
                "pass input_ids or inputs_embeds by name: the batch size of a cached call is unknown"
            )
        if is_carrier(cache):
            self._check(cache.ttt, tokens.shape[0])
            require_new_tokens(cache, pos)
            cache.ttt.admit(cached_tokens(cache), tokens.shape[1])
        elif cached_tokens(cache) > 0:
            raise CacheError(
                f"this cache holds {cached_tokens(cache)} tokens but no fast weights: it was made before "
                "the model was converted, or by a call without use_cache=True. Start over with an "
                "empty cache: "
                "model(..., use_cache=True), model.generate(...), or ttt.Session(model)"
            )
        else:
            attach_state(cache, self.new_state(tokens.shape[0]))
        expect(cache, tokens.shape[1], self.argument("logits_to_keep", args, kwargs))
        return kwargs, True

    def _check_mask(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A 2-D mask says which tokens are padding; others leave documents alone.

        Raises:
            PositionError: a 2-D mask of another meaning.
        """
        mask, rows = self.argument("attention_mask", args, kwargs), self._rows(args, kwargs)
        if isinstance(mask, Tensor) and mask.dim() == 2 and rows is not None:
            require_padding_mask(mask, rows)

    def _check_boundaries(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        bounds, rows = self._boundaries(args, kwargs), self._rows(args, kwargs)
        if bounds is not None and rows is not None:
            require_boundaries(bounds, rows)

    def _check(self, state: FastWeightState, batch: int) -> None:
        check_fits(state, self.specs, batch, self.like(self.specs[0]), self.owner())
        state.own()
        if state.holds_values:
            state.follow(self.adapter())
        state.settle()

    @contextlib.contextmanager
    def running(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Around a prepared call: an error that leaves its sequences half advanced marks them lost."""
        cache = self.cache(args, kwargs)
        state = kwargs.get(STATE_ARGUMENT)
        if state is None and self.context.enabled and is_carrier(cache):
            state = cache.ttt
        before = progress(state, cache)
        try:
            yield
            if is_carrier(cache) and state is not None and kwargs.get(STATE_ARGUMENT) is None:
                tokens = self._tokens(args, kwargs)
                assert tokens is not None, "prepare has asked for them"
                note_arrival(cache, tokens.shape[1], self._positions(args, kwargs, state))
        except BaseException as e:
            if state is not None and progress(state, cache) != before:
                state.lost = (
                    f"a call failed half-way ({type(e).__name__}: {str(e).partition(chr(10))[0]}). Type "
                    "session.reset(), or load what was saved before"
                )
            raise

    def kind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[object, ...]:
        """What a call looks like apart from its sizes; calls of one kind share compiled code."""
        cache, tokens = self.cache(args, kwargs), self._tokens(args, kwargs)
        given = frozenset(name for name, value in kwargs.items() if value is not None)
        fresh = cache is not None and cached_tokens(cache) == 0
        one = tokens is not None and tokens.shape[1] == 1
        return (
            self.context.enabled,
            torch.is_grad_enabled(),
            given,
            len(args),
            type(cache),
            fresh,
            one,
        )

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Captured with the model: set the call's state and positions for its sites."""
        state = kwargs.pop(STATE_ARGUMENT, None)
        cache = self.cache(args, kwargs)
        if state is None and cache is not None:
            if not is_carrier(cache):
                raise CacheError("this cache carries no fast weights: pass ttt.Session(model).cache")
            state = cache.ttt
        self.context.active = True
        self.context.state = state
        self.context.tokens = self._rows(args, kwargs)
        self.context.pos = self._positions(args, kwargs, state)
        kwargs.pop(DOCUMENTS_ARGUMENT, None)
        self.context.had_positions = self.context.pos is not None
        if self.own_sites:
            assert self.context.tokens is not None
            mark(model, self.own_sites, self.context, self.context.tokens)

    def finish(self) -> None:
        """Captured with the model, at the end of its forward: no place may have been skipped unnoticed."""
        uses = self.context.uses
        for name, number in self.shared_calls.items():
            if self.context.state is not None and uses.get(name, 0) != number:
                raise UnsupportedModelError(
                    f"{name} was called {uses.get(name, 0)} times in this call and {number} times when the "
                    "model was converted, so its places cannot be told apart and this sequence's state "
                    "is lost. Start a new session, and convert the model with example_inputs that run all "
                    "places"
                )
        self.leave()

    def leave(self) -> None:
        """Captured with the model: drop what :meth:`enter` set."""
        self.context.clear()

    def argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A forward argument by name, wherever it was passed; None when it was not."""
        if name in kwargs:
            return kwargs[name]
        slot = self.slots.get(name)
        return args[slot] if slot is not None and slot < len(args) else None

    def named(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """``kwargs`` with the cache under the name that forward takes, whatever it was given as."""
        return kwargs if self.make_cache is None else under(self.cache_name, kwargs, self.slots)

    def cache(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The cache of a call, wherever it was passed; None when it was not."""
        return cache_in({name: self.argument(name, args, kwargs) for name in (OLD, NEW)})

    def _tokens(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        ids: Tensor | None = self.argument("input_ids", args, kwargs)
        return ids if ids is not None else self.argument("inputs_embeds", args, kwargs)

    def _rows(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """A tensor whose first two dimensions are the batch and the tokens of the call."""
        tokens = self._tokens(args, kwargs)
        if tokens is not None:
            return tokens
        return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() >= 2), None)

    def _positions(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], state: FastWeightState | None
    ) -> Tensor | None:
        pos: Tensor | None = self.argument("position_ids", args, kwargs)
        if pos is None or DOCUMENTS_ARGUMENT in kwargs:
            bounds, rows = self._boundaries(args, kwargs), self._rows(args, kwargs)
            if bounds is not None and rows is not None:
                pos = positions_of(bounds, rows.shape[1])
        mask = self.argument("attention_mask", args, kwargs)
        return without_padding(pos, mask, self._tokens(args, kwargs), running=state is not None)

    def _boundaries(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Where the call says that its documents start; None where it does not."""
        return next((b for n in _CU_SEQLENS if (b := self.argument(n, args, kwargs)) is not None), None)


def unwrap(model: nn.Module) -> nn.Module:
    """The module behind ``torch.compile(module)``."""
    inner = model.__dict__.get("_modules", {}).get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else model


def find_root(model: nn.Module) -> tuple[nn.Module, Root | None]:
    """The module behind ``model``, and what conversion recorded on it (None when not converted)."""
    module = unwrap(model)
    root = module.__dict__.get(NAME)
    return module, root if isinstance(root, Root) else None


def require_root(model: nn.Module) -> tuple[nn.Module, Root]:
    """:func:`find_root` for a converted model.

    Raises:
        NotConvertedError: the model carries no fast weights.
    """
    module, root = find_root(model)
    if root is None:
        raise NotConvertedError(
            f"{type(module).__name__} carries no fast weights. Type ttt.convert(model, "
            "ttt.TTTConfig(...)), or "
            'call the model once after torch.compile(model, backend="inplace_ttt")'
        )
    return module, root


def forward_slots(forward: Callable[..., Any]) -> dict[str, int]:
    """Positions of the named positional arguments of a bound ``forward``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(forward).parameters.values()
    return {p.name: i for i, p in enumerate(p for p in parameters if p.kind in kinds)}
