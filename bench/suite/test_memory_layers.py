"""A prompt through public linear-memory layers of the same D: seconds per token, beside a fast layer's.

They compute another function (see :mod:`bench.memory_layers`); ours is one projection F -> D, theirs has its
projections within.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench import competitors
from bench.layer import Layer, Shape
from bench.memory_layers import gate, memory_layers


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(Shape(32, 96, 128, 16), marks=pytest.mark.ci, id="ci"),
        pytest.param(Shape(256, 768, 2048, 128), marks=pytest.mark.quick, id="quick"),
        pytest.param(Shape(1024, 3072, 4096, 512), id="D=1024"),
    ],
)
def test_memory_layers(compare, benchmark, shape):
    pytest.importorskip("titans_pytorch")
    layer = Layer(shape)
    with torch.no_grad():
        ours = {"ours": competitors.running(layer)}
        errors = layer.gate(ours)
        others = memory_layers(shape.d, shape.chunk)
        gate(others, layer.t)
        times = compare(
            {
                "static": competitors.static(layer),
                **ours,
                **{name: partial(run, layer.t) for name, run in others.items()},
            },
            rounds=5,
            kind="memory layers",
            shape=vars(shape),
            errors=errors,
        )
    tokens = shape.batch * shape.tokens
    benchmark.extra_info["seconds_per_token"] = {n: x["seconds"] / tokens for n, x in times.items()}
