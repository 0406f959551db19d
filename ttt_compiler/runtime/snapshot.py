"""Sessions on disk: one safetensors file with a JSON header.

May be changed here: the format; then raise ``VERSION``. Reading checks everything before anything is
built: a damaged or hostile file, or one of another model, raises and changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ttt_compiler.codegen.layout import COLUMNS, WIDE_COLUMNS
from ttt_compiler.errors import SnapshotError, UnsupportedModelError
from ttt_compiler.runtime.available import available_bytes
from ttt_compiler.runtime.compress import Method, decode, encode, expected_tensors, parse_method
from ttt_compiler.runtime.files import expect_tensors, read_tensors, write_tensors
from ttt_compiler.runtime.fingerprint import fingerprint
from ttt_compiler.runtime.layers import check_layers, export_layers, fill_layers
from ttt_compiler.runtime.root import Root
from ttt_compiler.runtime.rows import Row, export_row, import_row, row_layout
from ttt_compiler.runtime.snapshot_v1 import from_version_1, layers_of_version_1
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.runtime.tables import bytes_per_sequence, has_room_to_spread
from ttt_compiler.spec import SiteSpec, same_sites

FORMAT, VERSION = "ttt-session", 3
# The version of a file without a write in progress.
_AT_REST = 2
# A file may not ask for more memory than a user would.
MOST_REVOCABLE = 1 << 20


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    root: Root,
    state: FastWeightState,
    cache: Any,
    compress: str | None = None,
) -> None:
    """Write a session; see :meth:`Session.save`."""
    if state.lost is not None:
        raise SnapshotError(
            f"{path}: these sequences can no longer be used: {state.lost}; nothing was changed"
        )
    method = None if compress is None else parse_method(compress)
    if method is not None:
        state.finish_writes(root.weight)
    tensors, errors = _fast_tensors(root, state, method)
    held, layers = export_layers(cache)
    header = {
        "format": FORMAT,
        "version": VERSION if any(name.endswith(".writing") for name in tensors) else _AT_REST,
        "model": fingerprint(model),
        "sites": list(state.signature),
        "batch_size": state.batch_size,
        "revocable": state.revocable,
        "layers": layers,
    }
    if method is not None:
        header["compress"] = {"method": str(method), "relative_errors": errors}
    write_tensors(path, {**tensors, **held}, header, SnapshotError, private=True)


@dataclass(frozen=True)
class Loaded:
    """A file that was read and checked.

    Attributes:
        state: its fast weights.
        fill: makes an empty cache hold its keys and values.
    """

    state: FastWeightState
    fill: Callable[[Any], None]


def load(path: str | os.PathLike[str], model: nn.Module, root: Root, cache: Any) -> Loaded:
    """Read a session for an empty ``cache`` of its kind; see :meth:`Session.load`."""
    tensors, header = read_tensors(path, SnapshotError)
    _check_header(header, path, model, root)
    batch, revocable = header["batch_size"], header.get("revocable", 0)
    fast = {k: v for k, v in tensors.items() if k.startswith("fast.")}
    held = {k: v for k, v in tensors.items() if not k.startswith("fast.")}
    layers = header.get("layers")
    if header["version"] == 1:
        fast = from_version_1(fast, root.specs, batch, path)
        layers = layers_of_version_1(held)
    rows = _rows(fast, root, batch, revocable, _method(header, path), path)
    check_layers(layers, held, cache, batch, path, dtype=root.like(root.specs[0]).dtype)
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise SnapshotError(f"{path}: {name} holds NaN or Inf; nothing was changed")
    _require_room(root, batch, revocable, path)
    state = root.new_state(batch, revocable)
    for (key, b), row in rows.items():
        import_row(state, next(s for s in root.specs if s.key == key), b, row, root.weight)
    return Loaded(state, lambda cache: fill_layers(cache, layers or [], held, state.device))


def _require_room(root: Root, batch: int, revocable: int, path: object) -> None:
    """A few counters in a small file may ask for any amount of memory."""
    like = root.like(root.specs[0])
    spread = has_room_to_spread(like.device, revocable)
    needed = batch * bytes_per_sequence(root.specs, like.dtype, revocable=revocable, spread=spread)
    there = available_bytes(like.device)
    if there is not None and needed > there:
        raise SnapshotError(
            f"{path}: its {batch} sequences with {revocable} revocable tokens need {needed} bytes, and "
            f"{there} are available; nothing was changed"
        )


def _fast_tensors(
    root: Root, state: FastWeightState, method: Method | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Every site of every sequence; and what the smaller form of its matrix loses, by name."""
    tensors: dict[str, Tensor] = {}
    errors = {}
    for spec in state.specs:
        for b in range(state.batch_size):
            row, prefix = export_row(state, spec.key, b), f"fast.{spec.key}.{b}."
            if method is not None and "w" in row:
                delta = row.pop("w") - _slow_weight(root, spec, row["norms"].dtype)
                small, errors[f"{spec.key}.{b}"] = encode(delta, method)
                row |= {f"w.{name}": x for name, x in small.items()}
            tensors |= {prefix + name: x for name, x in row.items()}
    return tensors, errors


def _slow_weight(root: Root, spec: SiteSpec, dtype: torch.dtype) -> Tensor:
    """W0 in the state's dtype.

    Raises:
        SnapshotError: it exists inside of the forward pass only, so nothing is known of ``W - W0``.
    """
    try:
        if spec.inner:
            raise UnsupportedModelError(f"{spec.key}: its weight is quantised")
        return root.weight(spec).detach().to(dtype)
    except UnsupportedModelError as e:
        raise SnapshotError(
            f"compress= stores W - W0, and {e}. Save without compress; nothing was changed"
        ) from e


def _rows(
    fast: dict[str, Tensor], root: Root, batch: int, revocable: int, method: Method | None, path: object
) -> dict[tuple[str, int], Row]:
    """The tensors of every site and sequence, checked; matrices decoded."""
    dtype = root.like(root.specs[0]).dtype
    expected: dict[str, tuple[tuple[int, ...], Any]] = {}
    names: dict[tuple[str, int], list[str]] = {}
    for spec in root.specs:
        for b in range(batch):
            prefix = f"fast.{spec.key}.{b}."
            counts = fast.get(f"{prefix}rows")
            layout = None
            sizes = ((COLUMNS,), (WIDE_COLUMNS,))
            if counts is not None and counts.shape in sizes and counts.dtype == torch.int64:
                layout = row_layout(spec, dtype, counts.tolist(), revocable)
            if layout is None:
                raise SnapshotError(
                    f"{path}: counters of {spec.key} are missing or contradict each other; "
                    "nothing was changed"
                )
            if method is not None and layout.pop("w", None) is not None:
                small = expected_tensors(method, (spec.d_model, spec.d_ff))
                layout |= {f"w.{name}": shape for name, shape in small.items()}
            expected |= {prefix + name: shape for name, shape in layout.items()}
            names[spec.key, b] = list(layout)
    expect_tensors(fast, expected, path, SnapshotError)
    out = {}
    for spec in root.specs:
        for b in range(batch):
            row = {name: fast[f"fast.{spec.key}.{b}.{name}"] for name in names[spec.key, b]}
            coded = {n.removeprefix("w."): row.pop(n) for n in names[spec.key, b] if n.startswith("w.")}
            if method is not None and coded:
                w0 = _slow_weight(root, spec, row["norms"].dtype)
                row["w"] = w0 + decode(coded, method, (spec.d_model, spec.d_ff), w0.dtype).to(w0.device)
            out[spec.key, b] = row
    return out


def _method(header: dict[str, Any], path: object) -> Method | None:
    said = header.get("compress")
    if said is None:
        return None
    if not isinstance(said, dict):
        raise SnapshotError(f"{path}: does not say how it was compressed; nothing was changed")
    return parse_method(said.get("method"), SnapshotError)


def _check_header(header: dict[str, Any], path: object, model: nn.Module, root: Root) -> None:
    if header.get("format") != FORMAT:
        raise SnapshotError(f"{path}: is no saved session; nothing was changed")
    version = header.get("version")
    if type(version) is not int or version not in range(1, VERSION + 1):
        raise SnapshotError(
            f"{path}: has version {repr(version)[:20]}, this ttt_compiler reads versions 1 "
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
