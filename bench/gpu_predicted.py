"""What the cost model says of the runs of ``bench.gpu`` and ``bench.gpu_parts``, to stand beside their times.

Every figure is of the device alone or of the host, whichever takes longer, as the model counts it.
"""

from __future__ import annotations

import torch

from ttt_compiler.codegen import forms, forms_spans, training_cost
from ttt_compiler.codegen.choose import predicted, predicted_gradients
from ttt_compiler.codegen.devices import Device, device_of
from ttt_compiler.codegen.forms import ScanShape
from ttt_compiler.codegen.forms_spans import Spans
from ttt_compiler.codegen.kernels.tiles import GRADIENT, SCAN, Tile
from ttt_compiler.codegen.on_chip import config_of, on_chip, why_not
from ttt_compiler.codegen.phases import Phase, cost_of


def here() -> Device | None:
    """The model of the card in use, or None."""
    return device_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def of_kernel(shape: ScanShape, device: Device, tile: Tile, groups: int) -> float | None:
    """Seconds of our kernel without the sum of its partial outputs; None for tiles that do not fit."""
    config = config_of(tile, groups)
    if why_not(config, shape, device) is not None:
        return None
    return cost_of(on_chip(shape, device, config)[:1], device).seconds


def of_spans(shape: ScanShape, device: Device, cut: Spans, *, backward: bool = False) -> float:
    """Seconds of the library form."""
    form = forms_spans.spans_backward if backward else forms_spans.spans
    return cost_of(form(shape, device, cut), device).seconds


def of_gradient_scans(shape: ScanShape, device: Device) -> float:
    """Seconds of a backward's three scans by our kernel."""
    parts = training_cost.backward_scans(shape)
    return sum(predicted(device, GRADIENT, part).cost.seconds for part in parts)


def of_layer(shape: ScanShape, device: Device) -> dict[str, dict[str, float]]:
    """Seconds of a layer's forward and training step, by competitor."""
    values = forms.values(shape, device)
    step, _ = training_cost.our_step(
        shape,
        device,
        lambda part, on: (predicted(on, SCAN, part).phases, 0),
        predicted_gradients(device, shape)[0],
    )
    official, _ = training_cost.stacked_step(shape, device)
    three = training_cost.values_step(shape, device)

    def seconds(*phases: Phase) -> float:
        return cost_of(phases, device).seconds

    return {
        "forward": {
            "static": seconds(*forms.static(shape, device)),
            "ours": seconds(*values, *predicted(device, SCAN, shape).phases),
            "official training form, compiled": seconds(*values, *forms.stacked_cumsum(shape, device)),
        },
        "train": {
            "static": seconds(*training_cost.static_step(shape, device)),
            "ours": seconds(*three, *step),
            "official training form, compiled": seconds(*three, *official),
        },
    }
