"""Attach fast weights to a model, and take them off again.

``convert`` adds conv and P as ordinary parameters of the modules that own the chosen weights, before any
optimiser is built, and puts the call boundary on the model. It computes nothing: compiling with
``backend="inplace_ttt"`` does. May be changed here: initialisation, checks before conversion.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttt_compiler.codegen.ops import require_kernels
from ttt_compiler.compat import forget_compiled_call, inner_tensor, known_parameters
from ttt_compiler.compat.cache_names import OLD, own_name, takes_cache, unusual_cache
from ttt_compiler.compat.looped_layers import complete
from ttt_compiler.config import TTTConfig
from ttt_compiler.discover import Discovery, FoundMLP, Inputs, discover
from ttt_compiler.eligibility import check_sites, named_layers
from ttt_compiler.errors import (
    AlreadyConvertedError,
    NonCausalModelError,
    UnsupportedModelError,
)
from ttt_compiler.runtime import generation
from ttt_compiler.runtime.calls import call_mode
from ttt_compiler.runtime.root import (
    DOCUMENTS_ARGUMENT,
    NAME,
    REWRITTEN,
    STATE_ARGUMENT,
    Root,
    find_root,
    forward_slots,
    require_root,
    unwrap,
)
from ttt_compiler.runtime.site import (
    CallContext,
    FastWeightSite,
    SiteGroup,
    add_parameters,
    attach,
    detach,
    remove_parameters,
)
from ttt_compiler.spec import SiteSpec, site_key

# Weights of MLPs that some conversion has seen, with the context of those that it chose: a compiled
# region that holds only unchosen ones is right without markers, one with a chosen one is not.
_seen_weights = known_parameters()

# Marks the callable that ``torch.compile`` returned for a model's forward.
ENTRY = "_ttt_entry"
OWN_FORWARD = "_ttt_forward"


def convert(
    model: nn.Module,
    config: TTTConfig | None = None,
    *,
    example_inputs: Inputs | None = None,
    found: Discovery | None = None,
) -> nn.Module:
    """Make the chosen MLP down-projections of ``model`` fast weights; in place.

    Adds ``ttt_conv [Dt, 1, K]`` (zeros) and ``ttt_proj [Dt, D]`` (diagonal, N(0, initializer_range^2)) to
    each owning module, so the model still computes what it did. Compile it afterwards:
    ``model.compile(backend="inplace_ttt")``.

    Args:
        model: a transformers causal language model, or any module with ``example_inputs``.
        config: defaults to ``TTTConfig()``.
        example_inputs: ``(args, kwargs)`` of one call; transformers models need none.
        found: what ``discover(model)`` returned, to look at the model once only.

    Returns:
        ``model``.

    Raises:
        NoMLPFoundError: nothing convertible was found; lists what was refused and why.
        LayerSelectionError: ``config.layers`` matches nothing.
        NonCausalModelError: a chosen MLP sees later tokens.
        UnsupportedModelError: the structure cannot carry fast weights yet.
        AlreadyConvertedError: converted before with another config.
    """
    config = TTTConfig() if config is None else config
    model = unwrap(model)
    root = root_of(model)
    if root is not None:
        if config in (root.requested, root.config):
            return model
        raise AlreadyConvertedError(
            f"{type(model).__name__} is already converted with {root.config}. Type ttt.revert(model) first"
        )
    check_model(model)
    found = discover(model, example_inputs) if found is None else found
    chosen = check_sites(model, config, found)
    requested, config = config, named_layers(config, chosen)
    specs_of = {mlp.weight: site_specs(config, mlp, found, model) for mlp in chosen}
    specs = tuple(spec for mlp in chosen for spec in specs_of[mlp.weight])
    dtypes = {spec.key: mlp.dtype for mlp in chosen for spec in specs_of[mlp.weight]}
    modules = {spec.key: model.get_submodule(spec.module) for spec in specs}
    context = CallContext()
    std = getattr(getattr(model, "config", None), "initializer_range", None)
    _check_names(modules, specs)
    for spec in specs:
        if spec.conv_name not in modules[spec.key]._parameters:
            device = tensor_of(model, spec.weight).device
            added = initial_parameters(spec, dtypes[spec.key], device, std)
            add_parameters(modules[spec.key], spec, *added)
    for name in dict.fromkeys(spec.module for spec in specs if spec.module):
        group = SiteGroup(name, (s for s in specs if s.module == name))
        attach(model.get_submodule(name), group, context)
    for mlp in found.mlps:
        _seen_weights[tensor_of(model, mlp.weight)] = context if mlp in chosen else None
    make_cache = cache_factory(model)
    _install(
        model,
        Root(
            config=config,
            requested=requested,
            specs=specs,
            modules=modules,
            transposed=frozenset(s.weight for m in chosen if m.transposed for s in specs_of[m.weight]),
            context=context,
            slots=forward_slots(_plain_forward(model)),
            keeps=found.keeps,
            make_cache=make_cache,
            cache_name=OLD if make_cache is None else own_name(_plain_forward(model)),
            takes_cache=make_cache is None or takes_cache(_plain_forward(model)),
            unusual_cache=unusual_cache(model, _plain_forward(model)),
        ),
    )
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert` exactly: classes, parameters and forward are the original ones again.

    Raises:
        NotConvertedError: the model carries no fast weights.
    """
    model, root = require_root(model)
    for spec in root.specs:
        remove_parameters(root.modules[spec.key], spec)
        if isinstance(root.modules[spec.key], FastWeightSite):
            detach(root.modules[spec.key])
    if model.__dict__.get("forward") is root.forward:
        del model.forward
    if OWN_FORWARD in model.__dict__:
        model.forward = model.__dict__.pop(OWN_FORWARD)
    generation.remove(model)
    delattr(model, NAME)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        _seen_weights.pop(tensor, None)
    # What was compiled with the markers must not run again.
    forget_compiled_call(model)
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside this context the converted model is the base model, compiled or not.

    Raises:
        NotConvertedError: the model carries no fast weights.
    """
    context = require_root(model)[1].context
    before, context.enabled = context.enabled, False
    try:
        yield model
    finally:
        context.enabled = before


def root_of(model: nn.Module) -> Root | None:
    """What conversion recorded on ``model``, None when it is not converted."""
    return find_root(model)[1]


def is_region(module: nn.Module) -> bool:
    """Whether ``module`` is a part of a converted model, chosen or not (regional compilation)."""
    return root_of(module) is None and (
        any(isinstance(m, FastWeightSite) for m in module.modules())
        or any(is_known_weight(p) for p in module.parameters())
    )


def region_context(module: nn.Module) -> CallContext | None:
    """The context of the first site inside of ``module``."""
    return next((m._ttt_context for m in module.modules() if isinstance(m, FastWeightSite)), None)


def is_known_weight(weight: Tensor) -> bool:
    """Whether some conversion has seen this MLP weight."""
    return weight in _seen_weights


def must_be_fast(weight: Tensor) -> bool:
    """Whether this weight was chosen, and its model is not disabled at the moment."""
    context = _seen_weights.get(weight)
    return context is not None and context.enabled


def _inner(model: nn.Module, name: str) -> str:
    """Where custom ops find a plain tensor in a weight; weights that are inputs of a graph have no owner."""
    owner, _, leaf = name.rpartition(".")
    try:
        return inner_tensor(getattr(model.get_submodule(owner), leaf))
    except AttributeError:
        return ""


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name."""
    owner, _, leaf = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), leaf)
    return found


def check_model(model: nn.Module) -> None:
    """Raise unless ``model`` as a whole can be converted.

    Raises:
        NonCausalModelError, AlreadyConvertedError, UnsupportedDeviceError, UnsupportedModelError.
    """
    check_kind(model)
    for parameter in model.parameters():
        require_kernels(parameter.device, type(model).__name__)
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"{type(model).__name__} has parameters on the meta device: conversion initialises P "
                "and looks at the weights. Load them first (from_pretrained, or "
                "model.to_empty(device='cpu') and load_state_dict), then convert"
            )


def check_kind(model: nn.Module) -> None:
    """The part of :func:`check_model` that does not ask where the weights are.

    Raises:
        NonCausalModelError, AlreadyConvertedError.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise NonCausalModelError(
            f"{type(model).__name__} is an encoder-decoder: its encoder layers see both directions, and "
            "its decoder layers depend on them. In-Place TTT needs a causal decoder"
        )
    if REWRITTEN in model.__dict__:
        raise AlreadyConvertedError("this graph was rewritten by ttt.rewrite: it has its fast weights")
    if is_region(model):
        raise AlreadyConvertedError(
            f"{type(model).__name__} is part of, or holds, a model that is converted already"
        )


def site_specs(config: TTTConfig, mlp: FoundMLP, found: Discovery, model: nn.Module) -> tuple[SiteSpec, ...]:
    """The constants of every place that applies the weight of ``mlp``."""
    width = mlp.d_model if config.target == "hidden_states" else found.embed_width
    assert width is not None, "check_sites refuses input_embed without embeddings"
    first = SiteSpec(
        key=mlp.weight,
        d_model=mlp.d_model,
        d_ff=mlp.d_ff,
        d_target=width,
        chunk=config.chunk_size,
        lr=config.lr,
        target=config.target,
        proj=config.proj,
        conv_kernel=config.conv_kernel,
        module="",
        time_major=mlp.time_major,
        derived=mlp.derived,
        inner=_inner(model, mlp.weight),
        rule=config.rule,
    )
    seen: Counter[str] = Counter()
    specs = []
    for place in mlp.places:
        key = site_key(place.weight, seen[place.weight])
        specs.append(dataclasses.replace(first, key=key, module=place.module, call=place.call))
        seen[place.weight] += 1
    return tuple(specs)


def initial_parameters(
    spec: SiteSpec, dtype: torch.dtype, device: torch.device, initializer_range: float | None
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """conv = 0 and a diagonal P (paper appendix C.3): nothing is written until conv is trained.

    Both are trainable on a frozen model too: training them alone is the ordinary adapter recipe.
    """
    conv = nn.Parameter(torch.zeros(spec.d_target, 1, spec.conv_kernel, dtype=dtype, device=device))
    if not spec.proj:
        return conv, None
    std = float(initializer_range or 0.02)
    proj = torch.zeros(spec.d_target, spec.d_model, dtype=dtype, device=device)
    proj.diagonal().normal_(0.0, std)
    return conv, nn.Parameter(proj)


def _check_names(modules: Mapping[str, nn.Module], specs: Sequence[SiteSpec]) -> None:
    """Nothing may be in the way of the added parameters, before any is added."""
    taken: dict[tuple[str, str], str] = {}
    for spec in specs:
        other = taken.setdefault((spec.module, spec.conv_name), spec.weight)
        if other != spec.weight:
            raise UnsupportedModelError(
                f"{spec.weight} and {other} would both get a parameter {spec.qualified(spec.conv_name)}. "
                "Rename one of them, or choose one with layers=[...]"
            )
        for name in (spec.conv_name, spec.proj_name):
            if hasattr(modules[spec.key], name):
                raise UnsupportedModelError(
                    f"{spec.qualified(name)} exists already, and conversion adds a parameter of that name. "
                    "Rename it, or leave the block out with layers=[...]"
                )


def _install(model: nn.Module, root: Root) -> None:
    """Put the call boundary on this instance; signature and class stay what they were."""
    own = model.__dict__.get("forward")
    # ``model.forward = torch.compile(model.forward, ...)`` already stands at the door and calls root.forward.
    entry = own is not None and getattr(own, ENTRY, False)
    inner: Callable[..., Any] = type(model).forward if own is None or entry else _ignore_self(own)

    @functools.wraps(inner)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        here: Root = self.__dict__[NAME]
        kwargs = here.named(kwargs)
        # Not ``is_compiling()``: that is true in every thread while any of them compiles.
        if not (torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()):
            with here.lock:
                kwargs, stateful = here.prepare(args, kwargs)
                with here.running(args, kwargs), call_mode(stateful):
                    try:
                        return run(self, here, args, kwargs)
                    finally:
                        here.leave()
        return run(self, here, args, kwargs)

    def run(self: nn.Module, here: Root, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not here.context.enabled:
            kwargs.pop(STATE_ARGUMENT, None)
            kwargs.pop(DOCUMENTS_ARGUMENT, None)
            return inner(self, *args, **kwargs)
        here.enter(self, args, kwargs)
        out = inner(self, *args, **kwargs)
        here.finish()
        return out

    model.__dict__[NAME] = root
    generation.install(model)
    root.forward = types.MethodType(forward, model)
    if not entry:
        if own is not None:
            model.__dict__[OWN_FORWARD] = own
        model.forward = root.forward


def _plain_forward(model: nn.Module) -> Callable[..., Any]:
    """The model's forward with its real signature, whatever was assigned over it."""
    forward = model.forward
    return types.MethodType(type(model).forward, model) if getattr(forward, ENTRY, False) else forward


def _ignore_self(bound: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(bound)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return bound(*args, **kwargs)

    return forward


def cache_factory(model: nn.Module) -> Callable[[], Any] | None:
    """Empty caches of the kind ``generate`` makes, for models of transformers that use one."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config") or not hasattr(model, "generate"):
        return None

    def make() -> Any:
        from transformers import DynamicCache

        text = config.get_text_config(decoder=True)
        return complete(DynamicCache(config=text), text)

    return make
