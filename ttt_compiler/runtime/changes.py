"""What tells that a tensor or a sequence has changed, without reading a number back from a device.

May be changed here: what is looked at.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ttt_compiler.runtime.state import FastWeightState


def progress(state: FastWeightState | None, cache: Any) -> tuple[object, ...]:
    """What changes when a call advances a sequence."""
    if state is None:
        return ()
    versions = tuple(written(x) for site in state.sites.values() for x in site)
    layers = getattr(cache, "layers", ()) or ()
    keys = [getattr(layer, "keys", None) for layer in layers]
    return versions, tuple((k.shape, written(k)) if isinstance(k, Tensor) else None for k in keys)


def identity(x: Tensor) -> tuple[int, int]:
    """What changes when a weight is replaced or written. Inference tensors do not count that."""
    return id(x), 0 if x.is_inference() else x._version


def written(x: Tensor) -> object:
    """How often a tensor was written. Inference tensors do not count: they may have been."""
    return object() if x.is_inference() else x._version
