"""How cost and memory grow with one variable at a time: exponents, by least squares on log-log axes."""

from __future__ import annotations

import pytest
import torch

from bench import competitors
from bench.growth import (
    AT,
    LAYERS,
    QUICK,
    SWEEPS,
    SmallModel,
    Sweep,
    linear,
    peaks,
    power,
    prompts,
    series,
)
from bench.layer import Layer, Shape
from bench.measure import peak_bytes
from bench.results import RIVALS

# A captured model builds its attention mask, which the library's own way of calling it leaves out.
CAPTURED = "static, captured"


def sweeps() -> list:
    quick = [pytest.param(s, marks=pytest.mark.quick, id=f"quick,{s}") for s in QUICK]
    tiny = Sweep("T", (64, 128), Shape(16, 48, 64, 16))
    return [pytest.param(tiny, marks=pytest.mark.ci, id="ci"), *quick] + [
        pytest.param(s, id=str(s)) for s in SWEEPS
    ]


@pytest.mark.parametrize("sweep", sweeps())
def test_growth(compare, benchmark, sweep):
    runs, memory, errors, bases = {}, {}, {}, {}
    with torch.no_grad():
        for x, shape in sweep.points():
            layer = Layer(shape)
            here = prompts(layer)
            errors[x] = layer.gate(here)
            here = {"static": competitors.static(layer), **here}
            for name, size in peaks(layer, here).items():
                memory.setdefault(name, []).append(size)
            runs |= {f"{name}{AT}{x}": run for name, run in here.items()}
            bases |= {f"{name}{AT}{x}": f"static{AT}{x}" for name in here}
        times = compare(
            runs,
            rounds=5,
            bases=bases,
            rivals=RIVALS,
            kind="growth",
            shape={**vars(sweep.base), "variable": sweep.variable},
            errors=errors,
        )
    xs = [x for x, _ in sweep.points()]
    benchmark.extra_info |= {
        "variable": sweep.variable,
        "values": xs,
        "bytes": memory,
        "fit": {name: power(xs, ys) for name, ys in series(times).items()},
        "fit_bytes": {name: power(xs, ys) for name, ys in memory.items()},
    }


@pytest.mark.ci
@pytest.mark.parametrize("batch", [1, 4])
def test_memory_beside_the_output_does_not_grow_with_the_prompt(batch):
    """Ours; the official training form holds a matrix more for every chunk."""
    chunk, (short, long) = 16, (64, 512)
    beside = {}
    with torch.no_grad():
        for tokens in (short, long):
            layer = Layer(Shape(16, 48, tokens, chunk, batch))
            found = peaks(layer, prompts(layer))
            beside[tokens] = {
                name: size - layer.t.nbytes for name, size in found.items()
            }  # y is as large as t
    assert beside[long]["ours"] == beside[short]["ours"]
    grown = beside[long]["official training form"] - beside[short]["official training form"]
    assert grown >= batch * (long - short) // chunk * layer.w0.nbytes


def test_growth_with_layers(compare, benchmark):
    """The number of fast layers in a model of eight."""
    model = SmallModel()
    with torch.no_grad():
        runs = {
            f"static{AT}0": lambda: model.read(model.static),
            f"{CAPTURED}{AT}0": lambda: model.read(model.captured),
        }
        for count in LAYERS:
            runs |= {f"{name}{AT}{count}": run for name, run in model.fast(count).items()}
        times = compare(
            runs,
            kind="growth",
            shape={"model": "Llama, 8 layers, D=128", "tokens": model.ids.shape[1], "variable": "layers"},
        )
        sizes = {name: {"bytes": peak_bytes(run)} for name, run in runs.items()}
    benchmark.extra_info |= {
        "variable": "layers",
        "values": list(LAYERS),
        "fit": _per_layer(times, "seconds"),
        "bytes": {name: ys for name, ys in series(sizes, "bytes").items() if len(ys) > 1},
        "fit_bytes": _per_layer(sizes, "bytes"),
    }


def _per_layer(figures, figure):
    """Without a fast layer each is the static model."""
    base = figures[f"static{AT}0"][figure]
    return {
        name: linear([0, *LAYERS], [base, *ys]) for name, ys in series(figures, figure).items() if len(ys) > 1
    }
