"""Tiny random models of every causal language model type that transformers knows.

The types come from the installed transformers, so a new release adds its own. A configuration is shrunk by
the usual names of its fields (``sizes.py``) plus a small table (``families.py``). May be changed here: the
generic rule. transformers is imported inside of functions because it is optional.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ttt_compiler.architectures.families import FAMILIES, MODEL_PART, UNBUILDABLE
from ttt_compiler.architectures.sizes import (
    EXPERT_COUNTS,
    EXPERT_HIDDEN,
    EXPERT_WIDTHS,
    FIRST_TEXT_ID,
    LAST_TEXT_ID,
    LAYERS,
    MARKER_SUFFIXES,
    SIZES,
    VOCAB,
)
from ttt_compiler.errors import TTTError

MAX_PARAMETERS = 5_000_000
_NOISE = 0.02


class UnbuildableError(TTTError):
    """No tiny model of this type can be built; the message is the reason in one line."""


def causal_lm_types() -> tuple[str, ...]:
    """The model types of ``AutoModelForCausalLM`` in the installed transformers, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def unbuildable_types() -> dict[str, str]:
    """The installed model types that cannot be built tiny, each with its reason."""
    return {t: UNBUILDABLE[t] for t in causal_lm_types() if t in UNBUILDABLE}


def build(model_type: str) -> nn.Module:
    """A tiny model of one type: random but fixed weights, fp32, evaluation mode.

    It has two layers, or as many as show every kind of block that the type's default configuration has.

    Raises:
        UnbuildableError: it cannot be built, or not tiny.
    """
    if model_type in UNBUILDABLE:
        raise UnbuildableError(UNBUILDABLE[model_type])
    with torch.random.fork_rng(devices=[]):
        try:
            # Counted without memory first: a field that is not shrunk can make billions of them.
            with torch.device("meta"):
                parameters = sum(p.numel() for p in _from_config(model_type).parameters())
            if parameters > MAX_PARAMETERS:
                raise UnbuildableError(f"{parameters:,} parameters, more than {MAX_PARAMETERS:,}")
            torch.manual_seed(0)
            model = _from_config(model_type)
        except UnbuildableError:
            raise
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[-1].strip()
            raise UnbuildableError(f"{type(error).__name__}: {reason}") from error
        _fill_zero_matrices(model)
    return model.eval()


def _from_config(model_type: str) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = tiny_config(model_type)
    if model_type not in MODEL_PART:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return model
    whole = AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[model_type]]
    part: nn.Module = whole._from_config(config, dtype=torch.float32)
    return part


def tiny_config(model_type: str) -> Any:
    """The shrunk configuration of one model type.

    Raises:
        ValueError: transformers refuses the values.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = _shrunk(CONFIG_MAPPING[model_type])
    return getattr(config, MODEL_PART[model_type]) if model_type in MODEL_PART else config


def token_inputs(model: nn.Module, batch: int, tokens: int, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of one call on random text.

    Args:
        model: a model of ``build``.
        batch: number of sequences.
        tokens: tokens of each.
        seed: of the random ids; none of them means padding, begin, end, image or sound.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_TEXT_ID, LAST_TEXT_ID + 1, (batch, tokens), generator=generator)
    return {"input_ids": ids, "use_cache": False}


def _shrunk(cls: type[Any], wish: dict[str, Any] | None = None) -> Any:
    """A configuration of this class with every known field made tiny, and the given ones as wished."""
    special = {**FAMILIES.get(cls.model_type, {}), **(wish or {})}
    names = {f.name for f in dataclasses.fields(cls)}
    options = {name: SIZES[name] for name in names if name in SIZES}
    markers = sorted(n for n in names if n.endswith(MARKER_SUFFIXES) and n not in SIZES)
    options |= {name: VOCAB - 1 - i for i, name in enumerate(markers)}
    if "kv_lora_rank" in names:
        # Latent attention: what rotates is a head of its own, and every head has its keys.
        options |= {"num_key_value_heads": SIZES["num_attention_heads"]}
    if "head_dim" in names and "qk_rope_head_dim" in names:
        options["head_dim"] = SIZES["qk_rope_head_dim"]
    if names & set(EXPERT_COUNTS) and not names & set(EXPERT_WIDTHS):
        options["intermediate_size"] = EXPERT_HIDDEN
    default = _default(cls)
    if default is not None:
        options |= _one_layer_of_each_kind(default, names)
        options |= dict(_sub_configs(default, special))
        special = {name: value for name, value in special.items() if name not in default.sub_configs}
    # Configurations keep and change what they are given.
    return cls(**copy.deepcopy({**options, **special}))


def _default(cls: type[Any]) -> Any | None:
    """The family's own default configuration, None where it has none."""
    try:
        return cls()
    except Exception:
        return None


def _one_layer_of_each_kind(default: Any, names: set[str]) -> dict[str, Any]:
    """Lists of layer kinds that keep each kind once, in the default's order, and their length."""
    count = getattr(default, "num_hidden_layers", None)
    lists = {
        name: list(value)
        for name, value in vars(default).items()
        if name in names
        and isinstance(value, (list, tuple))
        and len(value) == count
        and all(isinstance(kind, str) for kind in value)
    }
    if not lists:
        return {}
    picked: list[int] = []
    seen: set[tuple[str, str]] = set()
    for layer in range(len(next(iter(lists.values())))):
        kinds = {(name, value[layer]) for name, value in lists.items()}
        if kinds - seen:
            picked.append(layer)
            seen |= kinds
    while len(picked) < LAYERS:
        picked.append(picked[-1])
    options: dict[str, Any] = {name: [value[i] for i in picked] for name, value in lists.items()}
    return {**options, "num_hidden_layers": len(picked)}


def _sub_configs(default: Any, special: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The towers that the default configuration has, shrunk."""
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if dataclasses.is_dataclass(part):
            yield name, _shrunk(type(part), special.get(name))


@torch.no_grad()
def _fill_zero_matrices(model: nn.Module) -> None:
    """Give weights that start at zero small noise: a zero gate or projection would hide what follows it."""
    for parameter in model.parameters():
        if parameter.dim() >= 2 and not parameter.any():
            parameter.normal_(0.0, _NOISE)
