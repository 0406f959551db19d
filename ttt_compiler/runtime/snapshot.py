"""Sessions on disk: one safetensors file with a JSON header.

May be changed here: the format; then raise ``VERSION``. Reading checks everything before anything is
built: a damaged or hostile file, or one of another model, raises and changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ttt_compiler.codegen.cpu.step import SEEN, WRITES
from ttt_compiler.errors import SnapshotError, TTTError
from ttt_compiler.runtime.files import expect_tensors, read_tensors, write_tensors
from ttt_compiler.runtime.fingerprint import fingerprint
from ttt_compiler.runtime.root import Root
from ttt_compiler.runtime.state import TENSORS, FastWeightState, SiteState
from ttt_compiler.spec import same_sites

FORMAT, VERSION = "ttt-session", 1


def save(
    path: str | os.PathLike[str], model: nn.Module, root: Root, state: FastWeightState, cache: Any
) -> None:
    """Write a session; see :meth:`Session.save`."""
    tensors = {f"fast.{k}.{n}": getattr(s, n) for k, s in state.sites.items() for n in TENSORS}
    layers = [] if cache is None else plain_layers(cache, SnapshotError)
    for i, layer in enumerate(layers):
        if layer.is_initialized:
            tensors[f"cache.{i}.keys"], tensors[f"cache.{i}.values"] = layer.keys, layer.values
    header = {
        "format": FORMAT,
        "version": VERSION,
        "model": fingerprint(model),
        "sites": list(state.signature),
        "batch_size": state.batch_size,
    }
    write_tensors(path, tensors, header)


def load(
    path: str | os.PathLike[str], model: nn.Module, root: Root
) -> tuple[FastWeightState, Callable[[Any], None]]:
    """Read a session; returns its state and a function that fills an empty cache with its tokens."""
    tensors, header = read_tensors(path, SnapshotError)
    _check_header(header, path, model, root)
    batch = header["batch_size"]
    dtype = root.like(root.specs[0]).dtype
    fast = {k: v for k, v in tensors.items() if k.startswith("fast.")}
    expected: dict[str, tuple[tuple[int, ...], Any]] = {}
    for spec in root.specs:
        like = SiteState.zeros(spec, 1, dtype, torch.device("meta"))
        for name in TENSORS:
            x: Tensor = getattr(like, name)
            expected[f"fast.{spec.key}.{name}"] = ((batch, *x.shape[1:]), x.dtype)
    expect_tensors(fast, expected, path, SnapshotError)
    sites = {
        s.key: SiteState(*(fast[f"fast.{s.key}.{n}"].to(root.like(s).device) for n in TENSORS))
        for s in root.specs
    }
    for spec in root.specs:
        seen, writes = sites[spec.key].counts[:, SEEN], sites[spec.key].counts[:, WRITES]
        if bool(((seen < 0) | (writes < 0) | (writes > seen // spec.chunk)).any()):
            raise SnapshotError(f"{path}: counters of {spec.key} contradict each other; nothing was changed")
    layers = _layers(tensors, path, batch, dtype, getattr(model, "config", None))
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise SnapshotError(f"{path}: {name} holds NaN or Inf; nothing was changed")
    return FastWeightState(root.specs, sites, root.owner()), lambda cache: _fill(cache, layers)


def plain_layers(cache: Any, error: type[TTTError]) -> list[Any]:
    """The layers of a cache that keeps all keys and values in plain tensors.

    Raises:
        error: it keeps them in another way (sliding window, static, quantised, recurrent).
    """
    layers = [] if cache is None else list(cache.layers)
    for layer in layers:
        if type(layer).__name__ != "DynamicLayer":
            raise error(
                f"cache layers of type {type(layer).__name__} are not supported here yet; use a "
                "DynamicCache of a "
                "model with full attention"
            )
    return layers


def _check_header(header: dict[str, Any], path: object, model: nn.Module, root: Root) -> None:
    if header.get("format") != FORMAT:
        raise SnapshotError(f"{path}: is no saved session; nothing was changed")
    if header.get("version") != VERSION:
        raise SnapshotError(
            f"{path}: has version {header.get('version')!r}, this ttt_compiler reads version "
            f"{VERSION}; nothing was changed"
        )
    if not same_sites(header.get("sites"), root.specs):
        raise SnapshotError(f"{path}: was saved under another fast-weight configuration; nothing was changed")
    if header.get("model") != fingerprint(model):
        raise SnapshotError(
            f"{path}: belongs to a model with other weights (or another adapter); nothing was changed"
        )
    batch = header.get("batch_size")
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise SnapshotError(f"{path}: batch_size {batch!r} is no positive integer; nothing was changed")


def _layers(
    tensors: dict[str, Tensor], path: object, batch: int, dtype: torch.dtype, config: Any
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of all layers, or of none."""
    names = {k for k in tensors if not k.startswith("fast.")}
    count = len(names) // 2
    expected = {f"cache.{i}.{part}" for i in range(count) for part in ("keys", "values")}
    if names != expected or count not in (0, getattr(config, "num_hidden_layers", count)):
        raise SnapshotError(
            f"{path}: unexpected tensor or missing layer: {sorted(names ^ expected)[:3]} "
            f"({count} layers); nothing was changed"
        )
    layers = [(tensors[f"cache.{i}.keys"], tensors[f"cache.{i}.values"]) for i in range(count)]
    heads, width = (getattr(config, n, None) for n in ("num_key_value_heads", "head_dim"))
    for i, (keys, values) in enumerate(layers):
        length = layers[0][0].shape[-2] if layers[0][0].dim() == 4 else -1
        for x in (keys, values):
            fits = x.dim() == 4 and x.shape[0] == batch and x.shape[2] == length and x.dtype == dtype
            if not fits or heads not in (None, x.shape[1]) or width not in (None, x.shape[3]):
                raise SnapshotError(
                    f"{path}: keys and values of layer {i} do not fit this model ({tuple(x.shape)} "
                    f"{x.dtype}); "
                    "nothing was changed"
                )
    return layers


def _fill(cache: Any, layers: list[tuple[Tensor, Tensor]]) -> None:
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
