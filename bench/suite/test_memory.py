"""Peak memory of a layer's forward and training step, each point by a fresh process.

Against T with C as it is, where everything grows with its operands; and against C with T as it is, where the
official form grows with the number of chunks T/C and ours does not.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.growth import Sweep, power
from bench.layer import BOUNDS, Layer, Shape
from bench.peak_memory import FORMS, call, fresh

MEDIUM = Shape(1024, 3072, 4096, 512)
# A quarter of the official form's memory is what the sizes of a small shape leave room for.
TINY = Shape(192, 576, 4096, 64)
# The official form's grows with the number of chunks, so that of a few chunks says nothing.
MOST, MANY = 0.35, 16
# So long a text is enough to see that both forms compute the same.
_CHECKED_CHUNKS = 3


def sweeps() -> list:
    tiny = (Sweep("C", (64, 128), TINY), pytest.mark.ci, "ci")
    # A process takes seconds to start.
    quick = Sweep("T", (2048, 4096), Shape(512, 1536, 4096, 256))
    long = (Sweep("T", (1024, 2048, 4096, 8192, 16384), MEDIUM), (), "T")
    split = (Sweep("C", (128, 256, 512, 1024), MEDIUM), (), "C")
    narrow = [
        (Sweep(s.variable, s.values, dataclasses.replace(s.base, dtype="bfloat16")), pytest.mark.full, name)
        for s, name in ((long[0], "T,bfloat16"), (split[0], "C,bfloat16"))
    ]
    both = [
        pytest.param(what, sweep, marks=marks, id=f"{what},{name}")
        for what in ("forward", "training")
        for sweep, marks, name in (tiny, long, split, *narrow)
    ]
    return [*both, pytest.param("training", quick, marks=pytest.mark.quick, id="training,quick")]


@pytest.mark.parametrize(("what", "sweep"), sweeps())
def test_memory(benchmark, what, sweep):
    shapes = [shape for _, shape in sweep.points()]
    gate(what, shapes[0])
    found: dict[str, list[int]] = {}

    def measure() -> None:
        found.update({who: [fresh(what, who, shape) for shape in shapes] for who in FORMS})

    benchmark.pedantic(measure, rounds=1)
    extra = {
        who: [max(size - static, 1) for size, static in zip(found[who], found["static"], strict=True)]
        for who in FORMS
        if who != "static"
    }
    ratios = [ours / official for ours, official in zip(extra["ours"], extra["official"], strict=True)]
    xs = [x for x, _ in sweep.points()]
    benchmark.extra_info |= {
        "kind": f"memory, {what}",
        "shape": {**vars(sweep.base), "variable": sweep.variable},
        "variable": sweep.variable,
        "values": xs,
        "bytes": found,
        "extra_bytes": extra,
        "extra_ratio": ratios,
        "fit_bytes": {who: power(xs, sizes) for who, sizes in found.items()},
        "fit_extra": {who: power(xs, sizes) for who, sizes in extra.items()},
    }
    for shape, ratio in zip(shapes, ratios, strict=True):
        # Of a narrow form fp32 matrices and wide operands are a larger part, by how much is a finding.
        few = shape.dtype != "float32" or shape.tokens < MANY * shape.chunk
        assert few or ratio <= MOST, f"{what}, {shape}: ours needs {ratio:.2f} of the official form's memory"


def gate(what: str, shape: Shape) -> None:
    """No number from a wrong result: outputs or gradients of both forms over some chunks are equal."""
    layer = Layer(dataclasses.replace(shape, tokens=_CHECKED_CHUNKS * shape.chunk + 1))
    pairs = zip(call(what, "ours", layer), call(what, "official", layer), strict=True)
    for ours, official in pairs:
        apart = 1e-3 if layer.dtype == torch.float32 else 2 * BOUNDS[layer.dtype]
        torch.testing.assert_close(ours, official, rtol=apart, atol=apart * float(official.abs().max()))
