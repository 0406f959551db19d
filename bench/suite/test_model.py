"""Whole models: logits of a text, a prompt, a training step, and tokens decoded one by one with a cache."""

from __future__ import annotations

import statistics

import pytest
import torch

from bench.decode import CHUNK, LR, gate
from bench.measure import clock_of
from bench.model import STEPS, Models, ModelShape
from bench.model_training import training

SMOL, QWEN = "SmolLM2-135M", "Qwen3-0.6B"


def parameters(*shapes: ModelShape, full: tuple[ModelShape, ...] = (), tiny: int = CHUNK + 9) -> list:
    """The small model is quick, and what CI runs is smaller still; ``full`` ones are too dear otherwise."""
    found = [pytest.param(ModelShape("small", tiny), marks=pytest.mark.ci, id="ci")]
    for s in (*shapes, *full):
        marks = [pytest.mark.quick] if s.name == "small" else []
        marks += [pytest.mark.full] if s in full else []
        found.append(pytest.param(s, marks=marks, id=str(s).replace(" ", ",")))
    return found


@pytest.fixture
def filed(compare, benchmark):
    """A function that times a model's competitors, and says what a token costs in all rows."""

    def run(kind, shape, runs, errors, *, tokens, rounds=5, **options):
        times = compare(
            runs, rounds=rounds, kind=kind, shape={**vars(shape), "lr": LR}, errors=errors, **options
        )
        many = shape.batch * tokens
        benchmark.extra_info["seconds_per_token"] = {n: x["seconds"] / many for n, x in times.items()}

    return run


@pytest.mark.parametrize(
    "shape",
    parameters(
        ModelShape("small", 512),
        ModelShape(SMOL, 1024),
        ModelShape(SMOL, 4096),
        ModelShape(QWEN, 1024),
        ModelShape(QWEN, 4096),
        # Without a unit for bf16, a processor is five times as slow with it: the smallest case shows it.
        ModelShape(SMOL, 1024, "bfloat16"),
        ModelShape(SMOL, 2048),
        ModelShape(QWEN, 1024, "bfloat16"),
        full=(
            ModelShape(SMOL, 8192),
            ModelShape(SMOL, 1024, batch=4),
            ModelShape(QWEN, 2048),
            ModelShape(QWEN, 2048, "bfloat16"),
        ),
    ),
)
def test_logits(filed, shape):
    runs, errors = Models(shape).logits()
    with torch.no_grad():
        filed("model logits", shape, runs, errors, tokens=shape.tokens)


@pytest.mark.parametrize(
    "shape",
    parameters(
        ModelShape("small", 512),
        ModelShape(SMOL, 1024),
        ModelShape(SMOL, 4096),
        full=(
            ModelShape(SMOL, 2048),
            ModelShape(SMOL, 8192),
            ModelShape(SMOL, 1024, batch=4),
            ModelShape(SMOL, 1024, "bfloat16"),
            ModelShape(QWEN, 1024),
            ModelShape(QWEN, 1024, "bfloat16"),
            ModelShape(QWEN, 4096),
        ),
    ),
)
def test_prefill(filed, shape):
    """What serving runs on a prompt: a cache and fast weights that stay, and logits of the last token."""
    runs, errors = Models(shape).prefill()
    with torch.no_grad():
        filed("model prefill", shape, runs, errors, tokens=shape.tokens)


@pytest.mark.parametrize(
    "shape",
    parameters(
        ModelShape("small", 512),
        ModelShape(SMOL, 1024),
        full=(ModelShape(SMOL, 2048), ModelShape(SMOL, 1024, batch=4), ModelShape(QWEN, 1024)),
    ),
)
def test_model_training(filed, shape):
    """Forward, loss and backward, with gradients of every parameter."""
    runs, errors = training(Models(shape))
    filed("model training", shape, runs, errors, tokens=shape.tokens)


@pytest.mark.parametrize(
    "shape",
    parameters(
        ModelShape("small", 512),
        ModelShape(SMOL, 1024),
        ModelShape(QWEN, 1024),
        ModelShape(SMOL, 0),
        ModelShape(SMOL, 256),
        ModelShape(SMOL, 1024, batch=4),
        full=(
            *(ModelShape(SMOL, past, batch=4) for past in (0, 256, 4096)),
            *(ModelShape(SMOL, past, batch=16) for past in (0, 256, 1024, 4096)),
            ModelShape(SMOL, 4096),
            *(ModelShape(QWEN, past) for past in (0, 256, 4096)),
        ),
        tiny=CHUNK,
    ),
)
def test_model_decode(filed, shape):
    models = Models(shape)
    runs = models.decoders()
    with torch.no_grad():
        errors = {"ours": gate(models.fast, models.published, shape.chunk)}
        filed("model decode", shape, runs, errors, tokens=1, rounds=7, repeats=STEPS)


@pytest.mark.parametrize(
    "shape",
    [ModelShape(name, 1024, chunk=512) for name in (SMOL, QWEN)],
    ids=str,
)
def test_model_border(benchmark, shape):
    """What a user sees of a write: the steps around a chunk's end, where every fast layer writes at once."""
    models = Models(shape)
    clock, rounds = clock_of(torch.get_num_threads()), 3
    with torch.no_grad():
        models.fast.compile(backend="inplace_ttt", dynamic=True)
        errors = {"ours": gate(models.fast, models.published, shape.chunk)}
        steps, written = benchmark.pedantic(lambda: models.across_a_border(clock, rounds), rounds=1)
    assert written == [1] * rounds, f"{written} chunks were written: no timing"
    median = statistics.median(steps)
    benchmark.extra_info |= {
        "kind": "border",
        "shape": {**vars(shape), "lr": LR},
        "steps": {"ours": steps},
        "errors": errors,
        "median": median,
        "worst": max(steps) / median,
    }
