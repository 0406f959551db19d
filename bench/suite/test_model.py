"""Whole models: logits of a text, and tokens decoded one by one with a cache."""

from __future__ import annotations

import pytest
import torch

from bench.decode import CHUNK, LR, gate
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
            shape={**vars(shape), "chunk": CHUNK, "lr": LR},
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
            shape={**vars(shape), "chunk": CHUNK, "lr": LR, "batch": 1},
            repeats=STEPS,
        )
    benchmark.extra_info["seconds_per_token"] = {n: x["seconds"] for n, x in times.items()}
