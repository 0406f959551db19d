"""One fast-weight layer: the forward without a state, and a prompt that leaves one."""

from __future__ import annotations

import pytest
import torch

from bench import competitors
from bench.layer import Layer, Shape

SMALL, MEDIUM, LARGE = (576, 1536), (1024, 3072), (2560, 9728)


def shapes(*sizes: tuple[tuple[int, int], int, int, int], quick: int = 0) -> list:
    """Parameters of ``(D, F), T, C, B`` in both dtypes; the first few belong to a quick run.

    One more, tiny, is CI's.
    """
    tiny = (Shape(16, 48, 64, 16, 1, dtype) for dtype in ("float32", "bfloat16"))
    found = [pytest.param(s, marks=pytest.mark.ci, id=f"ci,{s.dtype}") for s in tiny]
    for i, ((d, f), tokens, chunk, batch) in enumerate(sizes):
        for dtype in ("float32", "bfloat16"):
            shape = Shape(d, f, tokens, chunk, batch, dtype)
            marks = [pytest.mark.quick] if i < quick else []
            found.append(pytest.param(shape, marks=marks, id=str(shape).replace(" ", ",")))
    return found


GRID = shapes(
    (MEDIUM, 4096, 512, 1),
    (MEDIUM, 4096, 256, 1),
    (MEDIUM, 4096, 128, 1),
    (MEDIUM, 4096, 1024, 1),
    (MEDIUM, 16384, 4096, 1),
    (MEDIUM, 1024, 512, 1),
    (MEDIUM, 1000, 512, 1),
    (MEDIUM, 4096, 512, 4),
    (SMALL, 4096, 512, 1),
    (SMALL, 16384, 512, 1),
    (LARGE, 2048, 512, 1),
    quick=1,
)


def measure(compare, shape, competing, *, state):
    """The competitors of a layer beside the static product and what bounds them."""
    layer = Layer(shape)
    runs = competing(layer)
    errors = layer.gate(runs)
    limits = competitors.libraries(layer) | competitors.products(layer, state=state)
    with torch.no_grad():
        compare(
            {"static": competitors.static(layer), **limits, **runs},
            kind=competing.__name__,
            shape=vars(shape),
            errors=errors,
            flops=shape.forward_flops(state=state),
            static_flops=shape.static_flops,
        )


@pytest.mark.parametrize("shape", GRID)
def test_forward(compare, shape):
    measure(compare, shape, competitors.forward, state=False)


@pytest.mark.parametrize("shape", GRID)
def test_prefill(compare, shape):
    measure(compare, shape, competitors.prefill, state=True)


@pytest.mark.parametrize(
    "shape",
    shapes(
        (MEDIUM, 8192, 512, 1), (MEDIUM, 4096, 512, 1), (MEDIUM, 4096, 256, 1), (SMALL, 4096, 512, 1), quick=0
    ),
)
def test_training(compare, shape):
    layer = Layer(shape)
    errors = layer.gate_gradients({n: r for n, r in competitors.training(layer).items() if n != "static"})
    compare(
        competitors.training(layer),
        kind="training",
        shape=vars(shape),
        errors=errors,
        flops=shape.training_flops(),
        static_flops=3 * shape.static_flops,
    )
