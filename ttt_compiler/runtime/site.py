"""What a converted module does when it is called: emit a marker op for each projection it contains.

Everything a fast weight needs enters the captured graph through the marker's arguments, so Dynamo lifts
weight, parameters, positions and state as ordinary graph inputs and no registry is needed at run time. The
rewrite pass pairs a marker with the contraction that applies the marker's weight. May be changed here:
what the marker carries, together with its schema.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttt_compiler.codegen import ops  # noqa: F401  (registers the marker)
from ttt_compiler.codegen.layout import TENSORS
from ttt_compiler.errors import UnsupportedModelError
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.spec import SiteSpec


class CallContext:
    """What one forward call tells its sites. One object per converted model.

    Attributes:
        enabled: False runs the base model (see :func:`ttt_compiler.disabled`).
        active: whether a call of the whole model is on its way (always False between calls).
        tokens: the call's input ids or embeddings ``[B, T, ..]``: its size, for modules that flatten rows.
        pos: int64 ``[B or 1, T]`` positions (0 starts a document, negative is padding) or None.
        state: the running sequences, or None for a stateless call.
        uses: how often each module that several places share has been called so far.
        had_positions: whether the last call had positions; outlives it.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.active = False
        self.tokens: Tensor | None = None
        self.pos: Tensor | None = None
        self.state: FastWeightState | None = None
        self.uses: dict[str, int] = {}
        self.had_positions = False

    def clear(self) -> None:
        """Forget the call."""
        self.active = False
        self.tokens = None
        self.pos = None
        self.state = None
        self.uses.clear()


class SiteGroup:
    """The sites of one module.

    Attributes:
        name: the module's name.
        calls: per call of the module within one call of the model, its sites with their encoded constants.
        alike: whether all calls apply the same weights.
    """

    def __init__(self, name: str, specs: Iterable[SiteSpec]) -> None:
        by_call: dict[int, list[tuple[SiteSpec, str]]] = {}
        for spec in specs:
            by_call.setdefault(spec.call, []).append((spec, spec.encode()))
        self.name = name
        self.calls = tuple(tuple(by_call[call]) for call in sorted(by_call))
        self.alike = len({tuple(spec.weight for spec, _ in sites) for sites in self.calls}) == 1


class FastWeightSite:
    """Mixed into the class of a module that applies chosen down-projection weights."""

    _ttt_group: SiteGroup
    _ttt_context: CallContext

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with its markers in front of its first tensor argument."""
        call = self._ttt_context
        if call.enabled:
            args, kwargs = _marked(self, self._ttt_group, call, args, kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def _marked(
    module: Any, group: SiteGroup, call: CallContext, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    sites = _next_call(group, call)
    for i, x in enumerate(args):
        if isinstance(x, Tensor):
            return (*args[:i], mark(module, sites, call, x), *args[i + 1 :]), kwargs
    for name, x in kwargs.items():
        if isinstance(x, Tensor):
            return args, {**kwargs, name: mark(module, sites, call, x)}
    raise UnsupportedModelError(f"{group.name}: a fast-weight module was called without a tensor argument")


def _next_call(group: SiteGroup, call: CallContext) -> Sequence[tuple[SiteSpec, str]]:
    """The sites of this call of a module that several places of the model share."""
    if len(group.calls) == 1 or (group.alike and call.state is None):
        # Without state the places differ in nothing; not to count them lets checkpointing run them again.
        return group.calls[0]
    if not call.active:
        raise UnsupportedModelError(
            f"{group.name} is called in {len(group.calls)} places of the model; which one this is can only "
            "be told in a call of the whole model. Compile and call the model that was converted"
        )
    use = call.uses.get(group.name, 0)
    if use == len(group.calls):
        raise UnsupportedModelError(
            f"{group.name} was called {use} times when the model was converted, and now more often. Type "
            "ttt.revert(model) and convert it with example_inputs that show all of its places"
        )
    call.uses[group.name] = use + 1
    return group.calls[use]


def mark(module: Any, sites: Sequence[tuple[SiteSpec, str]], call: CallContext, x: Tensor) -> Tensor:
    """``x`` behind one marker per site."""
    for spec, constants in sites:
        x = _mark(module, spec, constants, call, x)
    return x


def _mark(module: Any, spec: SiteSpec, constants: str, call: CallContext, x: Tensor) -> Tensor:
    weight = weight_of(module, spec)
    if spec.inner:
        for name in spec.inner.split("."):
            weight = getattr(weight, name)
    conv, proj = getattr(module, spec.conv_name), getattr(module, spec.proj_name)
    state: tuple[Tensor | None, ...] = (None,) * (len(TENSORS) + 1)
    if call.state is not None:
        s = call.state.sites[spec.key]
        state = (s.w, s.tail_h, s.tail_t, s.tail_v, s.lanes, s.rows, s.norms, call.state.batch)
    marked: Tensor = torch.ops.ttt.site(x, weight, constants, conv, proj, call.tokens, call.pos, *state)
    return marked


def weight_of(module: Any, spec: SiteSpec) -> Tensor:
    """The weight of a site, seen from its module."""
    found = module
    for name in spec.weight_in_module.split("."):
        found = getattr(found, name)
    return found  # type: ignore[no-any-return]


@functools.cache
def site_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a converted ``base`` module. One per base, so that graphs guard on a stable type."""
    return type(f"FastWeight{base.__name__}", (FastWeightSite, base), {"__doc__": base.__doc__})


def attach(module: nn.Module, group: SiteGroup, context: CallContext) -> None:
    """Let ``module`` mark its sites whenever it is called."""
    module.__class__ = site_class(type(module))  # type: ignore[arg-type]
    module._ttt_group = group  # type: ignore[assignment]
    module._ttt_context = context  # type: ignore[assignment]


def detach(module: nn.Module) -> None:
    """Undo :func:`attach` exactly."""
    module.__class__ = type(module).__mro__[2]
    del module._ttt_group, module._ttt_context


def add_parameters(module: nn.Module, spec: SiteSpec, conv: nn.Parameter, proj: nn.Parameter | None) -> None:
    """Give ``module`` conv and P of a site."""
    module.register_parameter(spec.conv_name, conv)
    module.register_parameter(spec.proj_name, proj)


def remove_parameters(module: nn.Module, spec: SiteSpec) -> None:
    """Undo :func:`add_parameters`; further places of the same weight have none of their own."""
    for name in (spec.conv_name, spec.proj_name):
        module._parameters.pop(name, None)
