"""Whole models: logits of a text, and tokens decoded one by one with a cache."""

from __future__ import annotations

import statistics

import pytest
import torch

from bench.decode import CHUNK, LR, gate
from bench.measure import clock_of
from bench.model import STEPS, Models, ModelShape


def parameters(*shapes: ModelShape) -> list:
    """The small model is quick, and what CI runs is smaller still."""
    tiny = pytest.param(ModelShape("small", CHUNK + 9), marks=pytest.mark.ci, id="ci")
    return [tiny] + [
        pytest.param(s, marks=[pytest.mark.quick] if s.name == "small" else [], id=str(s).replace(" ", ","))
        for s in shapes
    ]


@pytest.mark.parametrize(
    "shape",
    parameters(
        ModelShape("small", 512),
        ModelShape("SmolLM2-135M", 1024),
        ModelShape("SmolLM2-135M", 4096),
        ModelShape("Qwen3-0.6B", 1024),
        ModelShape("Qwen3-0.6B", 4096),
        # Without a unit for bf16, a processor is five times as slow with it: the smallest case shows it.
        ModelShape("SmolLM2-135M", 1024, "bfloat16"),
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
    benchmark.extra_info["seconds_per_token"] = {n: x["seconds"] / shape.tokens for n, x in times.items()}


@pytest.mark.parametrize(
    "shape",
    parameters(ModelShape("small", 512), ModelShape("SmolLM2-135M", 1024), ModelShape("Qwen3-0.6B", 1024)),
)
def test_model_decode(compare, benchmark, shape):
    models = Models(shape)
    runs = models.decoders()
    with torch.no_grad():
        gate(models.fast, models.published)
        times = compare(
            runs,
            rounds=7,
            kind="model decode",
            shape={**vars(shape), "lr": LR, "batch": 1},
            repeats=STEPS,
        )
    benchmark.extra_info["seconds_per_token"] = {n: x["seconds"] for n, x in times.items()}


@pytest.mark.parametrize(
    "shape",
    [ModelShape(name, 1024, chunk=512) for name in ("SmolLM2-135M", "Qwen3-0.6B")],
    ids=str,
)
def test_model_border(benchmark, shape):
    """What a user sees of a write: the steps around a chunk's end, where every fast layer writes at once."""
    models = Models(shape)
    clock, rounds = clock_of(torch.get_num_threads()), 3
    with torch.no_grad():
        models.fast.compile(backend="inplace_ttt", dynamic=True)
        gate(models.fast, models.published)
        steps, written = benchmark.pedantic(lambda: models.across_a_border(clock, rounds), rounds=1)
    assert written == [1] * rounds, f"{written} chunks were written: no timing"
    median = statistics.median(steps)
    benchmark.extra_info |= {
        "kind": "border",
        "shape": {**vars(shape), "lr": LR},
        "steps": {"ours": steps},
        "median": median,
        "worst": max(steps) / median,
    }
