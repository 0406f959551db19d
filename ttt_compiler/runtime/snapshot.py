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

from ttt_compiler.codegen.layout import COLUMNS
from ttt_compiler.errors import SnapshotError, TTTError
from ttt_compiler.runtime.files import expect_tensors, read_tensors, write_tensors
from ttt_compiler.runtime.fingerprint import fingerprint
from ttt_compiler.runtime.root import Root
from ttt_compiler.runtime.rows import Row, export_row, import_row, row_layout
from ttt_compiler.runtime.snapshot_v1 import from_version_1
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.spec import same_sites

FORMAT, VERSION = "ttt-session", 2
# A file may not ask for more memory than a user would.
MOST_REVOCABLE = 1 << 20


def save(
    path: str | os.PathLike[str], model: nn.Module, root: Root, state: FastWeightState, cache: Any
) -> None:
    """Write a session; see :meth:`Session.save`."""
    tensors = {
        f"fast.{spec.key}.{b}.{name}": x
        for spec in state.specs
        for b in range(state.batch_size)
        for name, x in export_row(state, spec.key, b).items()
    }
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
        "revocable": state.revocable,
    }
    write_tensors(path, tensors, header, SnapshotError, private=True)


def load(
    path: str | os.PathLike[str], model: nn.Module, root: Root
) -> tuple[FastWeightState, Callable[[Any], None]]:
    """Read a session; returns its state and a function that fills an empty cache with its tokens."""
    tensors, header = read_tensors(path, SnapshotError)
    _check_header(header, path, model, root)
    batch, revocable = header["batch_size"], header.get("revocable", 0)
    dtype = root.like(root.specs[0]).dtype
    fast = {k: v for k, v in tensors.items() if k.startswith("fast.")}
    if header["version"] == 1:
        fast = from_version_1(fast, root.specs, batch, path)
    rows = _rows(fast, root, batch, revocable, path)
    layers = _layers(tensors, path, batch, dtype, getattr(model, "config", None))
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise SnapshotError(f"{path}: {name} holds NaN or Inf; nothing was changed")
    state = root.new_state(batch, revocable)
    for (key, b), row in rows.items():
        import_row(state, next(s for s in root.specs if s.key == key), b, row)
    return state, lambda cache: _fill(cache, layers)


def _rows(
    fast: dict[str, Tensor], root: Root, batch: int, revocable: int, path: object
) -> dict[tuple[str, int], Row]:
    """The tensors of every site and sequence, checked."""
    dtype = root.like(root.specs[0]).dtype
    expected: dict[str, tuple[tuple[int, ...], Any]] = {}
    out: dict[tuple[str, int], Row] = {}
    for spec in root.specs:
        for b in range(batch):
            prefix = f"fast.{spec.key}.{b}."
            counts = fast.get(f"{prefix}rows")
            layout = None
            if counts is not None and counts.shape == (COLUMNS,) and counts.dtype == torch.int64:
                layout = row_layout(spec, dtype, counts.tolist(), revocable)
            if layout is None:
                raise SnapshotError(
                    f"{path}: counters of {spec.key} are missing or contradict each other; "
                    "nothing was changed"
                )
            expected |= {prefix + name: shape for name, shape in layout.items()}
            out[spec.key, b] = {name: fast[prefix + name] for name in layout if prefix + name in fast}
    expect_tensors(fast, expected, path, SnapshotError)
    return out


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
    if header.get("version") not in (1, VERSION):
        raise SnapshotError(
            f"{path}: has version {header.get('version')!r}, this ttt_compiler reads versions 1 "
            f"to {VERSION}; nothing was changed"
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
    revocable = header.get("revocable", 0)
    if not isinstance(revocable, int) or isinstance(revocable, bool) or not 0 <= revocable <= MOST_REVOCABLE:
        raise SnapshotError(f"{path}: revocable {revocable!r} is no count of tokens; nothing was changed")


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
