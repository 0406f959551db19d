"""A model as a plan needs it: shapes and sites by name, without weights.

May be changed here: how a published model's sites follow from its configuration; any other model is looked at
by :mod:`ttt_compiler.memory`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ttt_compiler.architectures.presets import preset
from ttt_compiler.config import TTTConfig
from ttt_compiler.discovery.choose_layers import choose_layers
from ttt_compiler.discovery.found import FoundMLP
from ttt_compiler.model_cost import ModelShape, Sites
from ttt_compiler.runtime.cache_size import meta_twin
from ttt_compiler.runtime.tables import bytes_per_sequence
from ttt_compiler.spec import SiteSpec


@dataclass(frozen=True)
class Planned:
    """A model as the plan needs it.

    Attributes:
        shape: what decides its time.
        sites: its fast weights.
        state_bytes: of one sequence.
    """

    shape: ModelShape
    sites: tuple[Sites, ...]
    state_bytes: int


def planned_model(name: str, config: TTTConfig) -> Planned:
    """Shapes of a model by name, without its weights.

    A published model is an unbroken stack of gated MLPs of one shape, so its sites follow from its
    configuration; any other model is looked at as ``memory_plan`` does, which takes seconds.

    Raises:
        ConfigError, UnsupportedModelError: see :func:`ttt_compiler.memory.memory_plan`.
    """
    known = preset(name)
    if known is None:
        return _looked_at(name, config)
    from transformers import AutoConfig

    twin = meta_twin(AutoConfig.for_model(**known), getattr(torch, known["dtype"]))
    shape = ModelShape.of(twin, name=name)
    mlps = [
        FoundMLP(
            weight=f"model.layers.{block}.mlp.down_proj.weight",
            d_model=shape.d_model,
            d_ff=shape.d_ff,
            activation="silu",
            gated=True,
            kind="dense",
            bias=False,
            transposed=False,
            block=block,
            causal=None,
            places=(),
            derived=False,
            dtype=shape.dtype,
            time_major=False,
            problem=None,
        )
        for block in range(shape.layers)
    ]
    specs = [
        SiteSpec(
            key=mlp.weight,
            d_model=mlp.d_model,
            d_ff=mlp.d_ff,
            d_target=mlp.d_model,
            chunk=config.chunk_size,
            lr=config.lr,
            target=config.target,
            proj=config.proj,
            conv_kernel=config.conv_kernel,
            module=mlp.weight.rpartition(".")[0],
        )
        for mlp in choose_layers(config, mlps)
    ]
    return Planned(shape, Sites.group(specs), bytes_per_sequence(specs, shape.dtype))


def _looked_at(name: str, config: TTTConfig) -> Planned:
    from ttt_compiler.memory import memory_plan
    from ttt_compiler.pretrained import load_config

    found = load_config(name)
    plan = memory_plan(found, 1, 1, config, device="cuda")
    dtype = getattr(torch, plan.dtype)
    sites = tuple(
        Sites(kind.sites, kind.d_model, kind.d_ff, kind.d_target, kind.chunk, config.proj)
        for kind in plan.sites
    )
    shape = ModelShape.of(meta_twin(found, dtype), name=name, mlp=(sites[0].d_model, sites[0].d_ff))
    return Planned(shape, sites, plan.fast_weight_bytes)
