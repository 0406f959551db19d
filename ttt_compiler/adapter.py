"""Adapters on disk: the added parameters and the configuration, nothing of the base model.

A directory with ``ttt_config.json`` and ``ttt_model.safetensors``. May be changed here: the format; then
raise ``VERSION``. Loading checks everything before the model is touched.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttt_compiler.config import TTTConfig
from ttt_compiler.conversion import convert, revert, root_of
from ttt_compiler.discover import Inputs
from ttt_compiler.errors import AdapterError, ConfigError, TTTError
from ttt_compiler.runtime.files import (
    expect_tensors,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from ttt_compiler.runtime.root import Root, require_root, unwrap
from ttt_compiler.spec import SiteSpec

FORMAT, VERSION = "ttt-adapter", 1
CONFIG_FILE, TENSOR_FILE = "ttt_config.json", "ttt_model.safetensors"


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write conv and P of every site, and the configuration, to ``directory``.

    Raises:
        NotConvertedError: the model carries no fast weights.
        AdapterError: a file cannot be written; the one that stood there is untouched.
    """
    root = require_root(model)[1]
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    header = {"format": FORMAT, "version": VERSION, "sites": [s.encode() for s in root.specs]}
    write_tensors(path / TENSOR_FILE, _parameters(root), header, AdapterError)
    write_json(path / CONFIG_FILE, {"format": FORMAT, **root.config.to_dict()}, AdapterError)
    return path


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str], *, example_inputs: Inputs | None = None
) -> nn.Module:
    """Load an adapter into ``model``; converts it by the adapter's configuration when nobody did.

    Returns:
        The model.

    Raises:
        AdapterError: missing, damaged or hostile files, or an adapter of another model or configuration.
            The model is unchanged.
    """
    module, path = unwrap(model), Path(directory)
    config = _read_config(path / CONFIG_FILE)
    tensors, header = read_tensors(path / TENSOR_FILE, AdapterError)
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise AdapterError(
            f"{path / TENSOR_FILE}: is no adapter of version {VERSION}; the model is unchanged"
        )
    specs = _read_specs(header, path)
    root = root_of(module)
    if root is not None and root.config != config:
        raise AdapterError(
            f"{path}: was made with {config}, but the model is converted with {root.config}. Type "
            "ttt.revert(model) "
            "first; the model is unchanged"
        )
    _check_weights(module, root, specs, tensors, path)
    if root is None:
        try:
            convert(module, config, example_inputs=example_inputs)
        except TTTError as e:
            raise AdapterError(f"{path}: does not fit this model: {e}; the model is unchanged") from e
        root = require_root(module)[1]
        if root.specs != specs:
            revert(module)
            raise AdapterError(
                f"{path}: was made for another model: its sites differ; the model is unchanged"
            )
    current = _parameters(root)
    with torch.no_grad():
        for name, value in tensors.items():
            current[name].copy_(value)
    return model


def _parameters(root: Root) -> dict[str, Tensor]:
    """Added parameters by the name that they got at conversion, wherever their module stands now."""
    out: dict[str, Tensor] = {}
    for spec in root.specs:
        for name, value in zip((spec.conv_name, spec.proj_name), root.parameters(spec), strict=True):
            if value is not None:
                out[spec.qualified(name)] = value
    return out


def _read_config(path: Path) -> TTTConfig:
    data: dict[str, Any] = read_json(path, AdapterError)
    if data.pop("format", None) != FORMAT:
        raise AdapterError(f"{path}: is no adapter configuration; the model is unchanged")
    try:
        return TTTConfig.from_dict(data)
    except ConfigError as e:
        raise AdapterError(f"{path}: {e}; the model is unchanged") from e


def _read_specs(header: dict[str, Any], path: Path) -> tuple[SiteSpec, ...]:
    sites = header.get("sites")
    try:
        if not isinstance(sites, list) or not sites:
            raise TypeError("no list of sites")
        return tuple(SiteSpec.decode(s) for s in sites)
    except (TypeError, ValueError) as e:
        raise AdapterError(f"{path / TENSOR_FILE}: damaged header ({e}); the model is unchanged") from e


def _check_weights(
    model: nn.Module,
    root: Root | None,
    specs: tuple[SiteSpec, ...],
    tensors: dict[str, Tensor],
    path: Path,
) -> None:
    """Names, shapes and dtypes of the file against the model's own weights."""
    if root is not None and root.specs != specs:
        raise AdapterError(f"{path}: was made for another model: its sites differ; the model is unchanged")
    weights: dict[str, Tensor] = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for spec in specs:
        weight = weights.get(spec.weight)
        fits = weight is not None and (
            spec.derived or sorted(weight.shape) == sorted((spec.d_model, spec.d_ff))
        )
        if weight is None or not fits:
            raise AdapterError(
                f"{path}: needs a weight {spec.weight} of shape {(spec.d_model, spec.d_ff)}, which this "
                "model lacks: it is an adapter of another model; the model is unchanged"
            )
        # A quantised weight's dtype says nothing about the activations that conv and P work on.
        own = root.like(spec).dtype if root is not None else None
        conv = spec.qualified(spec.conv_name)
        dtype = own or (tensors[conv].dtype if spec.derived and conv in tensors else weight.dtype)
        expected[conv] = ((spec.d_target, 1, spec.conv_kernel), dtype)
        if spec.proj:
            expected[spec.qualified(spec.proj_name)] = ((spec.d_target, spec.d_model), dtype)
    expect_tensors(tensors, expected, path, AdapterError)
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise AdapterError(f"{path}: {name} holds NaN or Inf; the model is unchanged")
