"""The roofline plan: what fast weights are predicted to cost, per model, length and device.

Everything is computed from shapes and from :mod:`ttt_compiler.codegen.devices`; nothing is run, and no GPU
was used to fit it. The one measurement in it, the paper's, is compared and not fitted. May be changed here:
what is tabulated. The text is made by :mod:`ttt_compiler.roofline_text`, counts by
:mod:`ttt_compiler.model_cost`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ttt_compiler.architectures.presets import PRESETS, preset
from ttt_compiler.codegen import forms
from ttt_compiler.codegen.cost_model import rank_scan_configs
from ttt_compiler.codegen.devices import DEVICES, H100, H800, Device
from ttt_compiler.codegen.forms import ScanShape
from ttt_compiler.codegen.on_chip import default_configs
from ttt_compiler.codegen.phases import cost_of
from ttt_compiler.config import TTTConfig
from ttt_compiler.discovery.choose_layers import choose_layers
from ttt_compiler.discovery.found import FoundMLP
from ttt_compiler.errors import ConfigError
from ttt_compiler.model_cost import Added, ModelShape, Sites, decode, prefill, training
from ttt_compiler.runtime.cache_size import meta_twin
from ttt_compiler.runtime.state import bytes_per_sequence
from ttt_compiler.spec import SiteSpec

CONTEXTS = (8192, 32768, 131072, 262144)
# Rows of the second decode column: one sequence reads either matrix once, a batch shares only W0.
DECODE_BATCH = 16
CHUNKS = (256, 512, 1024, 2048, 4096, 8192)
# The paper states no chunk for its measurement: the released recipe's, its ablation's best, a short one.
PAPER_CHUNKS = (4096, 1024, 256)


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


@dataclass(frozen=True)
class Row:
    """One model at one length on one device.

    Attributes:
        model: name.
        tokens: length of the prompt, of the context, of the training sequence.
        device: name.
        prefill: of a prompt.
        decode: of one token of one sequence.
        decode_batch: of one token each of ``DECODE_BATCH`` sequences.
        training: of a forward and backward.
        kv_bytes: keys and values of one sequence.
        state_bytes: fast weights of one sequence.
    """

    model: str
    tokens: int
    device: str
    prefill: Added
    decode: Added
    decode_batch: Added
    training: Added
    kv_bytes: int
    state_bytes: int


@dataclass(frozen=True)
class Sweep:
    """One site's scan by every form, in units of the static projection's time.

    Attributes:
        model: whose site.
        chunk: C.
        ratios: (form, time over the static projection's, binding limit), fastest first.
    """

    model: str
    chunk: int
    ratios: tuple[tuple[str, float, str], ...]


@dataclass(frozen=True)
class Measured:
    """A published measurement of prefill: Qwen3-4B, one H800, batch 1 (arXiv 2604.06169, figure 4).

    Attributes:
        tokens: length.
        window: what attention sees; None for all.
        base: thousand tokens per second of the static model.
        fast: the same with In-Place TTT.
    """

    tokens: int
    window: int | None
    base: float
    fast: float

    @property
    def change(self) -> float:
        """Change of throughput in percent."""
        return 100 * (self.fast / self.base - 1)

    @property
    def added(self) -> float:
        """Seconds that fast weights add per token."""
        return (1 / self.fast - 1 / self.base) / 1000


PAPER = (
    Measured(8192, 1024, 20.05, 18.31),
    Measured(32768, 1024, 20.55, 18.81),
    Measured(131072, 1024, 20.65, 18.90),
    Measured(8192, None, 17.29, 16.14),
    Measured(32768, None, 11.30, 10.82),
    Measured(131072, None, 4.40, 4.35),
)


@dataclass(frozen=True)
class PaperRow:
    """The measurement beside the prediction for the same model, length and device.

    Attributes:
        measured: the paper's.
        base: predicted seconds per token of the static model.
        added: (C, predicted seconds per token that the official inference loop adds), as C is not stated.
        added_flops: FLOPs that fast weights add, in percent of the static model's.
    """

    measured: Measured
    base: float
    added: tuple[tuple[int, float], ...]
    added_flops: float

    @property
    def predicted_changes(self) -> tuple[tuple[int, float], ...]:
        """(C, predicted change of throughput in percent)."""
        return tuple((c, 100 * (self.base / (self.base + added) - 1)) for c, added in self.added)

    @property
    def base_reached(self) -> float:
        """Measured over predicted speed of the static model."""
        return self.measured.base * 1000 * self.base

    @property
    def added_reached(self) -> float:
        """Predicted over measured time of what is added, at the recipe's chunk."""
        return self.added[0][1] / self.measured.added


@dataclass(frozen=True)
class Roofline:
    """The plan.

    Attributes:
        config: layers and chunk of all rows.
        rows: by device, model, length.
        sweeps: forms against chunk length, on an H100 at 32k tokens.
        paper: the paper's measurements.
        devices: what was assumed of each device.
        decode_batch: sequences of the second decode column.
    """

    config: TTTConfig
    rows: tuple[Row, ...]
    sweeps: tuple[Sweep, ...]
    paper: tuple[PaperRow, ...]
    devices: tuple[Device, ...]
    decode_batch: int = DECODE_BATCH

    def __str__(self) -> str:
        from ttt_compiler.roofline_text import render

        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; seconds, bytes, percent."""
        plain = ("model", "tokens", "device", "kv_bytes", "state_bytes")
        costs = ("prefill", "decode", "decode_batch", "training")
        rows = [
            {
                **{name: getattr(row, name) for name in plain},
                **{name: _flat(getattr(row, name)) for name in costs},
            }
            for row in self.rows
        ]
        paper = [
            {
                **dataclasses.asdict(row),
                "measured_change_percent": row.measured.change,
                "predicted_change_percent": dict(row.predicted_changes),
                "base_reached": row.base_reached,
                "added_reached": row.added_reached,
            }
            for row in self.paper
        ]
        return {
            "config": self.config.to_dict(),
            "decode_batch": self.decode_batch,
            "rows": rows,
            "sweeps": [dataclasses.asdict(sweep) for sweep in self.sweeps],
            "paper": paper,
        }


def roofline(
    models: Sequence[str] = tuple(PRESETS),
    devices: Sequence[Device] = DEVICES,
    config: TTTConfig | None = None,
    *,
    contexts: Sequence[int] = CONTEXTS,
) -> Roofline:
    """Predict every model at every length on every device.

    Args:
        models: names that :func:`ttt_compiler.pretrained.load_config` knows; published ones need no network.
        devices: see :func:`ttt_compiler.codegen.devices.device_named`.
        config: which layers, which chunk length; default ``TTTConfig()``.
        contexts: lengths in tokens.

    Raises:
        ConfigError: a length is below 1, or a model's name is unknown.
    """
    if any(tokens < 1 for tokens in contexts):
        raise ConfigError(f"contexts={list(contexts)} must all be at least 1")
    config = TTTConfig() if config is None else config
    planned = [planned_model(name, config) for name in models]
    rows = tuple(_row(one, tokens, device) for device in devices for one in planned for tokens in contexts)
    sweeps = tuple(s for one in planned for s in sweep(one, H100))
    return Roofline(config, rows, sweeps, paper_rows(), tuple(devices))


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
    plan = memory_plan(found, 1, 1, config)
    dtype = getattr(torch, plan.dtype)
    sites = tuple(
        Sites(kind.sites, kind.d_model, kind.d_ff, kind.d_target, kind.chunk, config.proj)
        for kind in plan.sites
    )
    shape = ModelShape.of(meta_twin(found, dtype), name=name, mlp=(sites[0].d_model, sites[0].d_ff))
    return Planned(shape, sites, plan.fast_weight_bytes)


def sweep(planned: Planned, device: Device, *, tokens: int = 32768) -> tuple[Sweep, ...]:
    """Every form of the first site's scan against the chunk length, the best of each form."""
    site, found = planned.sites[0], []
    for chunk in CHUNKS:
        shape = ScanShape(tokens, site.d_model, site.d_ff, chunk, 1, planned.shape.dtype, final=True)
        base = cost_of(forms.static(shape, device), device).seconds
        best: dict[str, tuple[float, str]] = {}
        for choice in rank_scan_configs(shape, device, default_configs(device)):
            best.setdefault(choice.form, (choice.cost.seconds / base, choice.cost.limit))
        stacked = cost_of(forms.stacked_cumsum(shape, device), device)
        best["stacked_cumsum"] = (stacked.seconds / base, stacked.limit)
        ordered = sorted((form, ratio, limit) for form, (ratio, limit) in best.items())
        found.append(Sweep(planned.shape.name, chunk, tuple(sorted(ordered, key=lambda x: x[1]))))
    return tuple(found)


def paper_rows(device: Device = H800) -> tuple[PaperRow, ...]:
    """The paper's prefill beside the prediction for the official inference loop: state in bf16, two GEMMs."""
    planned = {chunk: planned_model("Qwen3-4B", TTTConfig(chunk_size=chunk)) for chunk in PAPER_CHUNKS}
    found = []
    for measured in PAPER:
        tokens = measured.tokens
        shape = dataclasses.replace(planned[PAPER_CHUNKS[0]].shape, window=measured.window)
        base = prefill(shape, (), tokens, device).base
        added, flops = [], 0.0
        for chunk, one in planned.items():
            (site,) = one.sites
            seconds, more = _official_loop(site, tokens, shape.dtype, device)
            added.append((chunk, seconds / tokens))
            flops = max(flops, more)
        found.append(PaperRow(measured, base.seconds / tokens, tuple(added), 100 * flops / base.flops))
    return tuple(found)


def _official_loop(site: Sites, tokens: int, dtype: torch.dtype, device: Device) -> tuple[float, float]:
    """Seconds and FLOPs that the official inference loop adds to a prompt, over all sites."""
    scan = site.scan(tokens, 1, dtype, final=True)
    static, loop, values = (
        cost_of(phases, device)
        for phases in (
            forms.static(scan, device),
            forms.two_gemm(scan, device, state_itemsize=dtype.itemsize),
            forms.values(scan, device, d_target=site.d_target, proj=site.proj),
        )
    )
    seconds = loop.seconds + values.seconds - static.seconds
    return site.count * seconds, site.count * (loop.flops + values.flops - static.flops)


def _row(planned: Planned, tokens: int, device: Device) -> Row:
    shape, sites = planned.shape, planned.sites
    return Row(
        model=shape.name,
        tokens=tokens,
        device=device.name,
        prefill=prefill(shape, sites, tokens, device),
        decode=decode(shape, sites, tokens, device),
        decode_batch=decode(shape, sites, tokens, device, batch=DECODE_BATCH),
        training=training(shape, sites, tokens, device),
        kv_bytes=shape.cached(tokens),
        state_bytes=planned.state_bytes,
    )


def _flat(added: Added) -> dict[str, Any]:
    return {
        "base_seconds": added.base.seconds,
        "base_limit": added.base.limit,
        "added_seconds": added.seconds,
        "overhead_percent": added.percent,
        "stacked_overhead_percent": added.stacked_percent,
        "form": added.form,
        "workspace_bytes": added.workspace,
        "stacked_bytes": added.stacks,
    }
