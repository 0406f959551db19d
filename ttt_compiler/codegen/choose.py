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
from ttt_compiler.codegen.forms_spans import NEAR, Spans, best_spans, spans_backward
from ttt_compiler.codegen.kernels.tiles import GRADIENT, INTERPRETED, RUNNING, Tile, architecture, shipped
from ttt_compiler.codegen.on_chip import config_of, shipped_configs
from ttt_compiler.codegen.phases import cost_of
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
        held: of the library form, spans whose states are in memory at a time.
        seconds: predicted; 0 where there is no model of the device.
    """

    form: str
    tiles: tuple[Tile, ...]
    groups: int
    span: int
    held: int
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
        return ScanPlan("on_chip", (INTERPRETED,), groups, 0, 0, 0.0)
    arch = architecture(device)
    name = torch.cuda.get_device_name(device)
    forms = ("on_chip",) if only_kernel else ("on_chip", "spans")
    return _plan(_model_of(name, arch), arch, use, shape, forms, decays)


@functools.lru_cache(maxsize=1024)
def _plan(
    model: Device, arch: str, use: str, shape: ScanShape, forms: tuple[str, ...], decays: bool
) -> ScanPlan:
    tiles = {t.schedule: t for t in shipped(arch, shape.dtype, use)}
    ranked = _ranked(model, arch, use, shape, forms, decays)
    best = ranked[0]
    if best.config is None:
        assert best.span is not None
        return ScanPlan("library", (), 0, best.span, best.held, best.cost.seconds)
    groups = best.config.groups
    chosen: dict[Tile, None] = {}
    for choice in ranked:
        c = choice.config
        if c is not None and c.groups == groups:
            chosen[tiles[c.bm, c.bd, c.bf, c.warps, c.stages]] = None
    return ScanPlan("on_chip", tuple(chosen)[:MOST_CHOICES], groups, 0, 0, best.cost.seconds)


def gradient_plan(device: torch.device, shape: ScanShape, *, decays: bool = False) -> Spans | None:
    """How the library form cuts the text for gradients without documents; None: our kernel's scans.

    Args:
        device: where.
        shape: of the forward.
        decays: whether W decays.
    """
    if device.type == "cpu":
        return None
    model = _model_of(torch.cuda.get_device_name(device), architecture(device))
    return predicted_gradients(model, shape, decays=decays)[0]


@functools.lru_cache(maxsize=1024)
def predicted_gradients(
    model: Device, shape: ScanShape, *, decays: bool = False
) -> tuple[Spans | None, float]:
    """The faster form of a backward, as in :func:`gradient_plan`, and its predicted seconds."""
    cut = best_spans(shape, model, decays=decays, backward=True)
    library = cost_of(spans_backward(shape, model, cut), model).seconds
    scans = sum(predicted(model, GRADIENT, part).cost.seconds for part in backward_scans(shape))
    return (cut, library) if library < scans else (None, scans)


def predicted(model: Device, use: str, shape: ScanShape) -> Choice:
    """What a scan on a device becomes here, with its predicted time; for plans without the device.

    Args:
        model: of a GPU.
        use: ``SCAN`` for a forward without a state, ``GRADIENT`` for one of a backward's three scans by our
            kernel, or ``RUNNING`` for a running sequence.
        shape: of the scan.
    """
    if use == RUNNING:
        tile = shipped(model.arch, shape.dtype, use)[0]
        groups = tile.groups(shape.d_model, shape.d_ff, -(-model.sms // shape.batch))
        return next(c for c in rank_scan_configs(shape, model, [config_of(tile, groups)]) if c.config)
    forms = ("on_chip",) if use == GRADIENT else ("on_chip", "spans")
    return _ranked(model, model.arch, use, shape, forms)[0]


def _ranked(
    model: Device, arch: str, use: str, shape: ScanShape, forms: tuple[str, ...], decays: bool = False
) -> list[Choice]:
    configs = shipped_configs(arch, shape.dtype, use, shape.d_ff)
    ranked = [c for c in rank_scan_configs(shape, model, configs, decays=decays) if c.form in forms]
    near = [c for c in ranked if c.form == ranked[0].form and c.cost.seconds <= NEAR * ranked[0].cost.seconds]
    first = min(near, key=lambda c: c.workspace)
    return [first, *(c for c in ranked if c is not first)]


def _model_of(name: str, arch: str) -> Device:
    """The device of that name, else the first one of its architecture."""
    found = device_of(name)
    return found if found is not None else next(d for d in DEVICES if d.arch == arch)
