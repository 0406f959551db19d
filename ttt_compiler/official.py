"""Checkpoints of the method's official implementation, to and from stock transformers models.

The official code keeps conv and P beside the down-projection, in the MLP module, and its settings in the
model's config. May be changed here: the mapping, when the official format changes.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttt_compiler.config import TTTConfig
from ttt_compiler.conversion import convert
from ttt_compiler.errors import LayerSelectionError, OfficialCheckpointError
from ttt_compiler.runtime.files import read_json, read_tensors, write_json, write_tensors
from ttt_compiler.runtime.root import Root, require_root
from ttt_compiler.spec import CONV, PROJ

# Architectures that the official code has model files for.
MODEL_TYPES = ("llama", "qwen3")
CONFIG_FIELDS = ("ttt_layers", "ttt_mode", "ttt_proj", "ttt_lr", "ttt_chunk", "ttt_target")
_DOWN = ".down_proj"


def from_official(directory: str | os.PathLike[str]) -> nn.Module:
    """A converted stock transformers model from a checkpoint of the official implementation.

    Args:
        directory: holds ``config.json`` with ``ttt_*`` fields and safetensors weights (sharded or not) with
            ``...mlp.ttt_conv.weight [D, 1, 5]`` and ``...mlp.ttt_proj.weight [D, D]``.

    Returns:
        The model in evaluation mode; compile it with ``backend="inplace_ttt"``.

    Raises:
        OfficialCheckpointError: not such a checkpoint, or its tensors do not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(directory)
    raw = read_json(path / "config.json", OfficialCheckpointError)
    config = _read_config(raw, path)
    tensors = _read_weights(path)
    plain = {k: v for k, v in raw.items() if k not in CONFIG_FIELDS and k != "architectures"}
    hf_config = AutoConfig.for_model(**plain)
    added = {k: tensors.pop(k) for k in list(tensors) if ".mlp.ttt_" in k}
    dtypes = {x.dtype for x in tensors.values() if x.is_floating_point()}
    if len(dtypes) != 1:
        raise OfficialCheckpointError(f"{path}: weights have dtypes {sorted(map(str, dtypes))}, expected one")
    model: nn.Module = AutoModelForCausalLM.from_config(hf_config, dtype=dtypes.pop()).eval()
    _load_base(model, tensors, path)
    try:
        convert(model, config)
    except LayerSelectionError as e:
        raise OfficialCheckpointError(f"{path}: {e}") from e
    _load_added(require_root(model)[1], added, path)
    return model


def to_official(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write a converted model as a checkpoint that the official implementation reads.

    Raises:
        OfficialCheckpointError: the official code has no model file for this architecture, or cannot
            express this configuration; or a file cannot be written.
        NotConvertedError: the model carries no fast weights.
    """
    module, root = require_root(model)
    hf_config: Any = module.config
    blocks = _blocks(module, root)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    skip = {"lm_head.weight"} if hf_config.tie_word_embeddings else set()
    for name, value in module.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if leaf in (CONV, PROJ):
            name = f"{owner.removesuffix(_DOWN)}.{leaf}.weight"
        if name not in skip:
            tensors[name] = value
    config = hf_config.to_dict() | {
        "ttt_layers": blocks,
        "ttt_mode": True,
        "ttt_proj": root.config.proj,
        "ttt_lr": root.config.lr,
        "ttt_chunk": root.config.chunk_size,
        "ttt_target": root.config.target,
    }
    write_tensors(path / "model.safetensors", tensors, {}, OfficialCheckpointError)
    write_json(path / "config.json", config, OfficialCheckpointError)
    return path


def _read_config(raw: dict[str, Any], path: Path) -> TTTConfig:
    if raw.get("model_type") not in MODEL_TYPES:
        raise OfficialCheckpointError(
            f"{path}: model_type {raw.get('model_type')!r} is none of the official code's: "
            f"{', '.join(MODEL_TYPES)}"
        )
    missing = [f for f in CONFIG_FIELDS if f not in raw]
    if missing or not raw["ttt_mode"]:
        what = "ttt_mode is false" if not missing else f"{', '.join(missing)} missing"
        raise OfficialCheckpointError(
            f"{path}/config.json: {what}: no In-Place TTT checkpoint. Load a plain model with "
            "AutoModelForCausalLM.from_pretrained"
        )
    layers = [i for i in raw["ttt_layers"] if i < raw["num_hidden_layers"]]
    if layers != list(raw["ttt_layers"]):
        warnings.warn(
            f"{path}: ttt_layers {raw['ttt_layers']} names blocks beyond the model's "
            f"{raw['num_hidden_layers']}; the "
            "official code leaves those out in silence, so they never had fast weights",
            stacklevel=3,
        )
    return TTTConfig(
        layers=tuple(layers),
        chunk_size=raw["ttt_chunk"],
        lr=raw["ttt_lr"],
        target=raw["ttt_target"],
        proj=bool(raw["ttt_proj"]),
    )


def _read_weights(path: Path) -> dict[str, Tensor]:
    index = path / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        names = read_json(index, OfficialCheckpointError).get("weight_map", {})
        files = sorted(set(names.values()))
        if any(Path(f).name != f for f in files):
            raise OfficialCheckpointError(f"{index}: names a file outside of its directory")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(path / file, OfficialCheckpointError)[0]
    return tensors


def _load_base(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as e:
        raise OfficialCheckpointError(f"{path}: weights do not fit config.json: {e}") from e
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()  # type: ignore[union-attr]
    if set(missing) - tied or unexpected:
        raise OfficialCheckpointError(
            f"{path}: missing weights {sorted(set(missing) - tied)}, unexpected {sorted(unexpected)}"
        )


def _load_added(root: Root, added: dict[str, Tensor], path: Path) -> None:
    wanted = {}
    for key, module in root.modules.items():
        owner = key.rpartition(".")[0]
        for leaf in (CONV, PROJ):
            parameter = getattr(module, leaf)
            if parameter is not None:
                wanted[f"{owner.removesuffix(_DOWN)}.{leaf}.weight"] = parameter
    if wanted.keys() != added.keys():
        raise OfficialCheckpointError(
            f"{path}: fast-weight tensors {sorted(added)} are not those of ttt_layers: {sorted(wanted)}"
        )
    for name, parameter in wanted.items():
        if parameter.shape != added[name].shape:
            raise OfficialCheckpointError(
                f"{path}: {name} is {tuple(added[name].shape)}, expected {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(added[name])


def _blocks(model: nn.Module, root: Root) -> list[int]:
    """Block indices of the sites, for a model that the official code could hold."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in MODEL_TYPES:
        raise OfficialCheckpointError(
            f"{type(model).__name__}: the official code has model files for {', '.join(MODEL_TYPES)} "
            "only. Use "
            "ttt.save_adapter instead"
        )
    if root.config.conv_kernel != 5:
        raise OfficialCheckpointError(
            "the official code has conv_kernel=5 only. Use ttt.save_adapter instead"
        )
    return [int(owner.split(".layers.")[1].split(".")[0]) for owner in root.modules]
