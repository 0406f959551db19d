"""What a converted module does when it is called: emit the marker op in front of its projection.

Everything a fast weight needs enters the captured graph through the marker's arguments, so Dynamo lifts
parameters, positions and state as ordinary graph inputs and no registry is needed at run time. May be
changed here: what the marker carries, together with its schema.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ttt_compiler.codegen import ops  # noqa: F401  (registers the marker)
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.spec import CONV, PROJ, SiteSpec


class CallContext:
    """What one forward call tells its sites. One object per converted model.

    Attributes:
        enabled: False runs the base model (see :func:`ttt_compiler.disabled`).
        active: whether a call of the whole model is on its way (always False between calls).
        pos: int64 ``[B or 1, T]`` positions (0 starts a document, negative is padding) or None.
        state: the running sequences, or None for a stateless call.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.active = False
        self.pos: Tensor | None = None
        self.state: FastWeightState | None = None


class FastWeightSite:
    """Mixed into the class of a module that owns a chosen down-projection weight."""

    _ttt_spec: SiteSpec
    _ttt_constants: str
    _ttt_context: CallContext

    def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with the marker in front of its input ``h [B, T, F]``."""
        call = self._ttt_context
        if not call.enabled:
            return super().forward(h, *args, **kwargs)  # type: ignore[misc]
        conv, proj = getattr(self, CONV), getattr(self, PROJ)
        if call.state is None:
            h = torch.ops.ttt.site(h, self._ttt_constants, conv, proj, call.pos, None, None, None, None)
        else:
            s = call.state.sites[self._ttt_spec.key]
            h = torch.ops.ttt.site(
                h, self._ttt_constants, conv, proj, call.pos, s.w, s.tail_h, s.tail_t, s.counts
            )
        return super().forward(h, *args, **kwargs)  # type: ignore[misc]


@functools.cache
def site_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a converted ``base`` module. One per base, so that graphs guard on a stable type."""
    return type(f"FastWeight{base.__name__}", (FastWeightSite, base), {"__doc__": base.__doc__})


def attach(
    module: nn.Module,
    spec: SiteSpec,
    conv: nn.Parameter,
    proj: nn.Parameter | None,
    context: CallContext,
) -> None:
    """Turn ``module`` into a fast-weight site with parameters ``ttt_conv`` and ``ttt_proj``."""
    module.register_parameter(CONV, conv)
    module.register_parameter(PROJ, proj)
    module.__class__ = site_class(type(module))  # type: ignore[arg-type]
    module._ttt_spec = spec  # type: ignore[assignment]
    module._ttt_constants = spec.encode()  # type: ignore[assignment]
    module._ttt_context = context  # type: ignore[assignment]


def detach(module: nn.Module) -> None:
    """Undo :func:`attach` exactly."""
    module.__class__ = type(module).__mro__[2]
    for name in (CONV, PROJ):
        del module._parameters[name]
    for name in ("_ttt_spec", "_ttt_constants", "_ttt_context"):
        delattr(module, name)
