"""One fast-weight layer as a benchmark sees it: operands, arithmetic, and the gate before any number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_compiler.codegen import reference
from ttt_compiler.codegen.cpu.scan import tail_chunks

LR = 0.3
# The gate: error against fp64 relative to the largest output. A bf16 result may err as plain torch does.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# Tokens that are held against fp64; all of them are held against each other.
_EXACT_CHUNKS = 4


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer's call: D, F, tokens T, chunk C, rows B, dtype of the operands."""

    d: int
    f: int
    tokens: int
    chunk: int
    batch: int = 1
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"D={self.d} F={self.f} T={self.tokens} C={self.chunk} B={self.batch} {self.dtype}"

    @property
    def static_flops(self) -> float:
        """Of the static projection."""
        return 2.0 * self.batch * self.tokens * self.d * self.f

    def written(self, *, state: bool) -> int:
        """Chunks of a row that are written; with ``state`` the last one too, since its state is wanted."""
        complete = self.tokens // self.chunk
        return complete if state or self.tokens % self.chunk else max(complete - 1, 0)

    def forward_flops(self, *, state: bool) -> float:
        """Of the form with the fewest: apply, write, and v's projection for the chunks that are written.

        Args:
            state: whether the last complete chunk is written too, since its state is wanted.
        """
        tokens = self.batch * self.written(state=state) * self.chunk
        flops = self.static_flops + 2.0 * tokens * self.d * (self.f + self.d)
        # Without a state, last chunks read each other instead of a written matrix where that is less.
        last = min(tail_chunks(self.chunk, self.d, self.f), self.written(state=False) + 1)
        if state or last < 2:
            return flops
        rest = self.tokens % self.chunk or self.chunk
        reads = (last - 1) * (last - 2) / 2 * self.chunk**2 + (last - 1) * self.chunk * rest
        saved = (last - 1) * self.chunk * self.d * self.f - reads * (self.d + self.f)
        return flops - 2.0 * self.batch * saved

    def training_flops(self) -> float:
        """Of forward and backward, with every chunk's W computed again: 7 + 3 D/F static projections."""
        complete = self.tokens // self.chunk
        nu = (max(complete - 1, 0) if self.tokens % self.chunk == 0 else complete) * self.chunk / self.tokens
        unit = self.static_flops
        # Forward apply and dh, dW0's share are there for every token; the others for written chunks.
        return unit * (3 + 4 * nu) + 3 * nu * unit * self.d / self.f


class Layer:
    """Operands: h ``[B, T, F]``, t ``[B, T, D]``, w0 ``[D, F]``, conv ``[D, 1, 5]``, proj ``[D, D]``."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, shape.dtype)
        self.shape, self.dtype = shape, dtype

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=g) * scale).to(dtype)

        self.h = draw(shape.batch, shape.tokens, shape.f)
        self.t = draw(shape.batch, shape.tokens, shape.d)
        self.w0 = draw(shape.d, shape.f, scale=0.02)
        self.conv = draw(shape.d, 1, 5, scale=0.1)
        # Small enough that W stays of the size of W0 over a long text.
        self.proj = draw(shape.d, shape.d, scale=0.3 / shape.d)

    def gate(self, results: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
        """No number from a wrong result: errors against fp64, and at full length against the first.

        Raises:
            AssertionError: one is beyond its bound.
        """
        shape, bound = self.shape, BOUNDS[self.dtype]
        length = min(shape.tokens, _EXACT_CHUNKS * shape.chunk + shape.chunk // 2)
        wide = [x.double() for x in (self.h[0, :length], self.t[0, :length], self.w0, self.conv, self.proj)]
        exact = reference.chunked(*wide, lr=LR, chunk=shape.chunk)[0]
        errors: dict[str, float] = {}
        first: Tensor | None = None
        with torch.no_grad():
            for name, run in results.items():
                y = run().double()
                assert y.shape == (shape.batch, shape.tokens, shape.d), f"{name}: {tuple(y.shape)}"
                first = y if first is None else first
                error = (y[0, :length] - exact).abs().max() / exact.abs().max()
                apart = (y - first).abs().max() / first.abs().max()
                errors[name] = float(error)
                assert float(error) <= bound, f"{name}, {shape}: error {float(error):.1e}, no timing"
                assert float(apart) <= 2 * bound, f"{name}, {shape}: {float(apart):.1e} apart, no timing"
        return errors

    def gate_gradients(self, results: dict[str, Callable[[], list[Tensor | None]]]) -> dict[str, float]:
        """The same for gradients of h, t, w0, conv and proj, against the first competitor in fp64.

        Raises:
            AssertionError: one is beyond its bound.
        """
        bound, errors = 3 * BOUNDS[self.dtype], {}
        exact = self._exact_gradients()
        for name, run in results.items():
            apart = 0.0
            for got, want in zip(run(), exact, strict=True):
                assert got is not None
                apart = max(apart, float((got.double() - want).abs().max() / want.abs().max()))
            errors[name] = apart
            assert apart <= bound, f"{name}, {self.shape}: gradients {apart:.1e} apart, no timing"
        return errors

    def _exact_gradients(self) -> list[Tensor]:
        given = (self.h, self.t, self.w0, self.conv, self.proj)
        wide = [x.double().requires_grad_() for x in given]
        rows = [
            reference.chunked(h, t, *wide[2:], lr=LR, chunk=self.shape.chunk)[0]
            for h, t in zip(wide[0], wide[1], strict=True)
        ]
        torch.stack(rows).backward(self.t.double())
        return [x.grad for x in wide if x.grad is not None]
