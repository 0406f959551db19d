"""One fast-weight layer: the forward without a state, a prompt that leaves one, and a training step."""

from __future__ import annotations

import pytest
import torch

from bench import competitors
from bench.layer import Layer, Shape
from bench.results import PRODUCTS
from bench.training_products import TrainingProducts
from ttt_compiler.codegen.cpu import kept

SMALL, MEDIUM, LARGE = (576, 1536), (1024, 3072), (2560, 9728)


def shapes(
    *sizes: tuple[tuple[int, int], int, int, int],
    quick: int = 0,
    full: tuple[tuple[tuple[int, int], int, int, int], ...] = (),
) -> list:
    """Parameters of ``(D, F), T, C, B`` in both dtypes; the first few belong to a quick run.

    One more, tiny, is CI's; those of ``full`` are too dear for any other run.
    """
    found = [
        pytest.param(
            Shape(16, 48, tokens, 16, batch, dtype), marks=pytest.mark.ci, id=f"ci,B={batch},{dtype}"
        )
        for tokens, batch in ((64, 1), (70, 2))
        for dtype in ("float32", "bfloat16")
    ]
    for i, ((d, f), tokens, chunk, batch) in enumerate((*sizes, *full)):
        for dtype in ("float32", "bfloat16"):
            shape = Shape(d, f, tokens, chunk, batch, dtype)
            marks = [pytest.mark.quick] if i < quick else []
            marks += [pytest.mark.full] if i >= len(sizes) else []
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
    (MEDIUM, 2048, 512, 1),
    (MEDIUM, 8192, 512, 1),
    (MEDIUM, 8192, 2048, 1),
    (MEDIUM, 1024, 512, 4),
    quick=1,
    full=((MEDIUM, 2048, 512, 4), (MEDIUM, 8192, 512, 4), (MEDIUM, 8192, 256, 4), (LARGE, 8192, 512, 1)),
)


def measure(compare, shape, competing, *, state):
    """The competitors of a layer beside the static product and what bounds them."""
    layer = Layer(shape)
    runs = competing(layer)
    errors = layer.gate(runs)
    libraries = competitors.libraries(layer)
    errors |= layer.gate_static(libraries)
    limits = libraries | competitors.products(layer, state=state)
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
        (MEDIUM, 8192, 512, 1),
        (MEDIUM, 4096, 512, 1),
        (MEDIUM, 4096, 256, 1),
        (SMALL, 4096, 512, 1),
        (MEDIUM, 2048, 512, 1),
        full=((MEDIUM, 16384, 512, 1), (MEDIUM, 2048, 512, 4), (LARGE, 2048, 512, 1)),
    ),
)
def test_training(compare, shape):
    layer = Layer(shape)
    runs = competitors.training(layer)
    errors = layer.gate_gradients({name: run for name, run in runs.items() if name != "static"})
    # No form of the layer: what bounds ours.
    runs[PRODUCTS] = TrainingProducts(layer)
    count = kept.count(shape.batch, shape.tokens, shape.chunk, shape.d, shape.f, layer.dtype)
    compare(
        runs,
        kind="training",
        shape=vars(shape),
        errors=errors,
        flops=shape.training_flops(),
        flops_in_memory=shape.training_flops_in_memory(count),
        kept=count,
        static_flops=3 * shape.static_flops,
    )
