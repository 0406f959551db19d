"""Published measurements of prefill, each beside the prediction for the same model, length and device.

Nothing of the cost model is fitted to them. May be changed here: measurements, with their source.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ttt_compiler.codegen import forms
from ttt_compiler.codegen.devices import H100, H800, Device
from ttt_compiler.codegen.phases import cost_of
from ttt_compiler.config import TTTConfig
from ttt_compiler.model_cost import Sites, prefill
from ttt_compiler.planned import planned_model


@dataclass(frozen=True)
class Measured:
    """A published measurement of prefill, batch 1.

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


@dataclass(frozen=True)
class Study:
    """Measurements of one publication.

    Attributes:
        source: where they are from, and what is known of them.
        model: which model.
        device: on which device.
        layers: which fast weights.
        chunks: C; several to compare where it is not stated.
        stated: whether C is stated.
        measured: the measurements.
    """

    source: str
    model: str
    device: Device
    layers: str
    chunks: tuple[int, ...]
    stated: bool
    measured: tuple[Measured, ...]


# The paper states no chunk for its measurement: the released recipe's, its ablation's best, a short one.
PAPER_CHUNKS = (4096, 1024, 256)

PAPER = Study(
    source="arXiv 2604.06169 (the method's paper), figure 4, read off the figure",
    model="Qwen3-4B",
    device=H800,
    layers="every:6",
    chunks=PAPER_CHUNKS,
    stated=False,
    measured=(
        Measured(8192, 1024, 20.05, 18.31),
        Measured(32768, 1024, 20.55, 18.81),
        Measured(131072, 1024, 20.65, 18.90),
        Measured(8192, None, 17.29, 16.14),
        Measured(32768, None, 11.30, 10.82),
        Measured(131072, None, 4.40, 4.35),
    ),
)


def _milliseconds(tokens: int, base: float, fast: float) -> Measured:
    return Measured(tokens, 8192, tokens / base, tokens / fast)


FOLLOW_UP = Study(
    source="arXiv 2608.01672 (a follow-up), profiling report of its code; last row with FlashAttention-3",
    model="Qwen3-0.6B",
    device=H100,
    layers="every:7",
    chunks=(4096,),
    stated=True,
    measured=(
        _milliseconds(4096, 36.4, 37.4),
        _milliseconds(16384, 126.6, 129.1),
        _milliseconds(65536, 547.0, 554.0),
        _milliseconds(131072, 1126.8, 1154.8),
        _milliseconds(262144, 2276.9, 2321.0),
        _milliseconds(65536, 300.5, 322.8),
    ),
)


STUDIES = (PAPER, FOLLOW_UP)


@dataclass(frozen=True)
class Compared:
    """A measurement beside the prediction for the same model, length and device.

    Attributes:
        measured: as published.
        base: predicted seconds per token of the static model.
        added: (C, predicted seconds per token that the official inference loop adds), by C of the study.
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
        """Predicted over measured time of what is added, at the study's first C."""
        return self.added[0][1] / self.measured.added


def compare(study: Study) -> tuple[Compared, ...]:
    """Measurements beside predictions for the official inference loop: state in bf16, two GEMMs a chunk."""
    device = study.device
    planned = {
        chunk: planned_model(study.model, TTTConfig(layers=study.layers, chunk_size=chunk))
        for chunk in study.chunks
    }
    found = []
    for measured in study.measured:
        tokens = measured.tokens
        shape = dataclasses.replace(planned[study.chunks[0]].shape, window=measured.window)
        base = prefill(shape, (), tokens, device).base
        added, flops = [], 0.0
        for chunk, one in planned.items():
            (site,) = one.sites
            seconds, more = _official_loop(site, tokens, shape.dtype, device)
            added.append((chunk, seconds / tokens))
            flops = max(flops, more)
        found.append(Compared(measured, base.seconds / tokens, tuple(added), 100 * flops / base.flops))
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
