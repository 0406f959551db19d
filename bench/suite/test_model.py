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


def per_token(benchmark, shape, times):
    tokens = shape.batch * shape.tokens
    benchmark.extra_info["seconds_per_token"] = {n: x["seconds"] / tokens for n, x in times.items()}


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
def test_logits(compare, benchmark, shape):
    models = Models(shape)
    runs, errors = models.logits()
    with torch.no_grad():
        times = compare(
            runs,
            rounds=5,
            kind="model logits",
            shape={**vars(shape), "lr": LR},
            errors=errors,
        )
    per_token(benchmark, shape, times)


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
def test_prefill(compare, benchmark, shape):
    """What serving runs on a prompt: a cache and fast weights that stay, and logits of the last token."""
    models = Models(shape)
    runs, errors = models.prefill()
    with torch.no_grad():
        times = compare(runs, rounds=5, kind="model prefill", shape={**vars(shape), "lr": LR}, errors=errors)
    per_token(benchmark, shape, times)


@pytest.mark.parametrize(
    "shape",
    parameters(
        ModelShape("small", 512),
        ModelShape(SMOL, 1024),
        full=(ModelShape(SMOL, 2048), ModelShape(SMOL, 1024, batch=4), ModelShape(QWEN, 1024)),
    ),
)
def test_model_training(compare, benchmark, shape):
    """Forward, loss and backward, with gradients of every parameter."""
    runs, errors = training(Models(shape))
    times = compare(runs, rounds=5, kind="model training", shape={**vars(shape), "lr": LR}, errors=errors)
    per_token(benchmark, shape, times)


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
def test_model_decode(compare, benchmark, shape):
    models = Models(shape)
    runs = models.decoders()
    with torch.no_grad():
        errors = {"ours": gate(models.fast, models.published, shape.chunk)}
        times = compare(
            runs,
            rounds=7,
            kind="model decode",
            shape={**vars(shape), "lr": LR},
            repeats=STEPS,
            errors=errors,
        )
    benchmark.extra_info["seconds_per_token"] = {n: x["seconds"] / shape.batch for n, x in times.items()}


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
