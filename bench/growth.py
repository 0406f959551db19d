"""How cost grows: one variable at a time, and the exponent that a straight line on log-log axes gives.

A sweep changes one of T, B, C, D·F of one layer's prompt, or the number of fast layers of a small model,
where the cost of what is no fast layer is a constant: there it is the seconds per layer, and the line is on
plain axes. May be changed here: sweeps and their base. Shapes are small, so that a sweep takes seconds, and
large enough that products and not calls are what is timed. ``bench/suite/test_growth.py`` runs them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bench import competitors
from bench.layer import LR, Layer, Shape, fresh_state
from bench.measure import peak_bytes
from bench.results import AT, STATELESS

BASE = Shape(256, 768, 8192, 256)
Point = tuple[int, Shape]


@dataclass(frozen=True)
class Sweep:
    """Values of one variable; the others stay at the base's."""

    variable: str
    values: tuple[int, ...]
    base: Shape = BASE

    def __str__(self) -> str:
        return f"{self.variable}={self.values[0]}..{self.values[-1]}"

    def points(self) -> list[Point]:
        """What stands on the axis, and the shape there."""
        return [self._point(value) for value in self.values]

    def _point(self, value: int) -> Point:
        if self.variable == "D·F":  # values are D, and F/D stays
            f = value * self.base.f // self.base.d
            return value * f, dataclasses.replace(self.base, d=value, f=f)
        name = {"T": "tokens", "B": "batch", "C": "chunk"}[self.variable]
        return value, dataclasses.replace(self.base, **{name: value})


SWEEPS = (
    Sweep("T", (1024, 2048, 4096, 8192, 16384, 32768, 65536)),
    Sweep("B", (1, 2, 4)),
    Sweep("C", (128, 256, 512, 1024, 2048, 4096)),
    Sweep("D·F", (128, 256, 512, 1024), dataclasses.replace(BASE, tokens=2048)),
)
QUICK = (Sweep("T", (1024, 2048, 4096), Shape(128, 384, 2048, 128)),)
LAYERS = (1, 2, 4, 8)


def power(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    """``y = a x^exponent`` by least squares on log-log axes, and R² there."""
    slope, _, r2 = _line(np.log(xs), np.log(ys))
    return {"exponent": slope, "r2": r2}


def linear(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    """``y = intercept + slope x`` by least squares, and R²."""
    slope, intercept, r2 = _line(np.asarray(xs, float), np.asarray(ys, float))
    return {"slope": slope, "intercept": intercept, "r2": r2}


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    slope, intercept = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    left = float(((y - (slope * x + intercept)) ** 2).sum())
    # A constant is a perfect line.
    return float(slope), float(intercept), 1.0 - left / spread if spread else 1.0


def prompts(layer: Layer) -> dict[str, competitors.Run]:
    """Ours with a state and without, op by op, and both official forms, on a prompt.

    Compiled is only the loop's body, which takes as long for any text: all of it at once would be unrolled.
    """
    args = (layer.h, layer.t, layer.w0, layer.conv, layer.proj, LR, layer.shape.chunk)
    return {
        "ours": competitors.running(layer),
        STATELESS: lambda: competitors.rewritten(*args),
        "official inference loop": competitors.looping(layer),
        "official inference loop, compiled": competitors.by_compiled_chunks(layer),
        "official training form": lambda: competitors.stacked(*args),
    }


def peaks(layer: Layer, runs: dict[str, Callable[[], object]]) -> dict[str, int]:
    """Bytes that each one needs beside the operands; ours with the state that a sequence keeps."""
    found = {name: peak_bytes(run) for name, run in runs.items()}
    found["ours"] += state_bytes(layer.shape)
    return found


def state_bytes(shape: Shape) -> int:
    """Of the state of a batch of such sequences."""
    return fresh_state(shape.d, shape.f, shape.chunk, shape.batch, getattr(torch, shape.dtype)).nbytes


def series(times: dict[str, dict[str, float]], figure: str = "seconds") -> dict[str, list[float]]:
    """Per competitor its figures along the axis, from names such as ``ours @ 4096``, in order."""
    found: dict[str, list[float]] = {}
    for name, taken in times.items():
        found.setdefault(name.split(AT)[0], []).append(taken[figure])
    return found


class SmallModel:
    """A random Llama whose last layers are fast: static, ours and the official algorithm, all op by op."""

    def __init__(self, layers: int = 8, width: int = 128, tokens: int = 1024, chunk: int = 128) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.layers, self.chunk = layers, chunk
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            vocab_size=64,
            max_position_embeddings=tokens,
        )
        self.static = LlamaForCausalLM(config).eval()
        self.captured = copy.deepcopy(self.static)
        self.captured.compile(backend="eager")
        self.ids = torch.randint(0, 64, (1, tokens), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def fast(self, count: int) -> dict[str, Callable[[], torch.Tensor]]:
        """What reads the text with ``count`` fast layers.

        Raises:
            AssertionError: both forms do not compute the same.
        """
        import ttt_compiler as ttt
        from bench.official import official, reset

        chosen = list(range(self.layers - count, self.layers))
        config = ttt.TTTConfig(layers=chosen, chunk_size=self.chunk, lr=LR)
        fast = ttt.convert(copy.deepcopy(self.static), config)
        for name, p in fast.named_parameters():
            if name.rpartition(".")[2].startswith("ttt_"):
                p.copy_(torch.randn(p.shape) * 0.02)
        published = official(fast, chosen, self.chunk, LR)
        fast.compile(backend="inplace_ttt_eager")

        def loop() -> torch.Tensor:
            reset(published)
            return self.read(published)

        want = loop()
        got, plain = self.read(fast), self.read(self.static)
        error = float((got - want).abs().max() / want.abs().max())
        assert error < 1e-3, f"logits differ from the official algorithm's by {error:.1e}: no timing"
        assert not torch.equal(got, plain), "nothing was written: no timing"
        return {"ours": lambda: self.read(fast), "official inference loop": loop}

    def read(self, model: torch.nn.Module) -> torch.Tensor:
        """Logits of the text, without a cache."""
        return model(input_ids=self.ids, use_cache=False).logits
