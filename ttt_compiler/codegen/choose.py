"""Which form and which tiles a scan on a GPU gets: the cost model's order over what is shipped.

May be changed here: what is offered. The formulas are :mod:`ttt_compiler.codegen.cost_model`, the tiles
:mod:`ttt_compiler.codegen.kernels.tiles`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ttt_compiler.codegen.cost_model import Choice, rank_scan_configs
from ttt_compiler.codegen.devices import DEVICES, Device, device_of
from ttt_compiler.codegen.forms import ScanShape
from ttt_compiler.codegen.kernels.tiles import GRADIENT, INTERPRETED, RUNNING, Tile, architecture, shipped
from ttt_compiler.codegen.on_chip import config_of, shipped_configs
from ttt_compiler.codegen.training_cost import backward_scans

# Tiles that are measured against each other under max-autotune.
MOST_CHOICES = 6


@dataclass(frozen=True)
class ScanPlan:
    """How a scan is run.

    Attributes:
        form: ``"on_chip"``, our kernel, or ``"library"``, products by torch's library.
        tiles: of our kernel, best first.
        groups: S, the same for all of them: they fill one buffer.
        span: of the library form, tokens between two writes.
        seconds: predicted; 0 where there is no model of the device.
    """

    form: str
    tiles: tuple[Tile, ...]
    groups: int
    span: int
    seconds: float


def scan_plan(
    device: torch.device, use: str, shape: ScanShape, *, only_kernel: bool, decays: bool = False
) -> ScanPlan:
    """The plan for one scan.

    Args:
        device: where the operands are.
        use: ``SCAN``, ``DECAY``, ``GRADIENT`` or ``RUNNING`` of the tiles.
        shape: of the scan; ``d_model`` and ``d_ff`` are rows and columns of W.
        only_kernel: whether only our kernel can do it (documents, skipped writes, states, gradients).
        decays: whether W decays: then every chunk is written by itself.

    Raises:
        UnsupportedDeviceError: no kernel is shipped for the device.
    """
    if device.type == "cpu":
        groups = INTERPRETED.groups(shape.d_model, shape.d_ff)
        return ScanPlan("on_chip", (INTERPRETED,), groups, shape.chunk, 0.0)
    arch = architecture(device)
    name = torch.cuda.get_device_name(device)
    forms = ("on_chip",) if only_kernel else ("on_chip", "two_gemm", *([] if decays else ["dual"]))
    return _plan(_model_of(name, arch), arch, use, shape, forms)


@functools.lru_cache(maxsize=1024)
def _plan(model: Device, arch: str, use: str, shape: ScanShape, forms: tuple[str, ...]) -> ScanPlan:
    tiles = {t.schedule: t for t in shipped(arch, shape.dtype, use)}
    ranked = _ranked(model, arch, use, shape, forms)
    best = ranked[0]
    if best.config is None:
        span = shape.chunk if best.span is None else best.span
        return ScanPlan("library", (), 0, -(-span // shape.chunk) * shape.chunk, best.cost.seconds)
    groups = best.config.groups
    chosen: dict[Tile, None] = {}
    for choice in ranked:
        c = choice.config
        if c is not None and c.groups == groups:
            chosen[tiles[c.bm, c.bd, c.bf, c.warps, c.stages]] = None
    return ScanPlan("on_chip", tuple(chosen)[:MOST_CHOICES], groups, shape.chunk, best.cost.seconds)


def gradient_form(device: torch.device, shape: ScanShape) -> str:
    """``"on_chip"`` or ``"library"``: how the scans of a backward without documents are run.

    Args:
        device: where.
        shape: of the forward.
    """
    if device.type == "cpu":
        return "on_chip"
    arch = architecture(device)
    model = _model_of(torch.cuda.get_device_name(device), arch)
    return "library" if predicted_gradient_form(model, shape) == "two_gemm" else "on_chip"


@functools.lru_cache(maxsize=1024)
def predicted_gradient_form(model: Device, shape: ScanShape) -> str:
    """``"on_chip"`` or ``"two_gemm"``: the faster form of a backward's three scans, which have the same."""

    def seconds(form: str) -> float:
        return sum(predicted(model, GRADIENT, part, form).cost.seconds for part in backward_scans(shape))

    return min(("on_chip", "two_gemm"), key=seconds)


def predicted(model: Device, use: str, shape: ScanShape, form: str = "on_chip") -> Choice:
    """What a scan on a device becomes here, with its predicted time; for plans without the device.

    Args:
        model: of a GPU.
        use: ``SCAN`` for a forward without a state, ``GRADIENT``, or ``RUNNING`` for a running sequence.
        shape: of the scan.
        form: of gradients, whose three scans have the same: ``"on_chip"`` or ``"two_gemm"``.
    """
    if use == RUNNING:
        tile = shipped(model.arch, shape.dtype, use)[0]
        groups = tile.groups(shape.d_model, shape.d_ff, -(-model.sms // shape.batch))
        return next(c for c in rank_scan_configs(shape, model, [config_of(tile, groups)]) if c.config)
    forms = (form,) if use == GRADIENT else ("on_chip", "two_gemm", "dual")
    return _ranked(model, model.arch, use, shape, forms)[0]


def _ranked(model: Device, arch: str, use: str, shape: ScanShape, forms: tuple[str, ...]) -> list[Choice]:
    configs = shipped_configs(arch, shape.dtype, use, shape.d_ff)
    return [c for c in rank_scan_configs(shape, model, configs) if c.form in forms]


def _model_of(name: str, arch: str) -> Device:
    """The device of that name, else the first one of its architecture."""
    found = device_of(name)
    return found if found is not None else next(d for d in DEVICES if d.arch == arch)
