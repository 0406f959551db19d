"""One fast-weight layer as a benchmark sees it: operands, arithmetic, and the gate before any number.

May be changed here: operands, what counts as the least FLOPs, bounds of the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ttt_compiler.codegen import reference
from ttt_compiler.codegen.cpu.kept import places, stretches, tail_chunks
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.runtime.tables import has_room_to_spread
from ttt_compiler.spec import SiteSpec

LR = 0.3
# The only site of a layer's state.
KEY = "w"
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
        """Of forward and backward, with every chunk's W kept between them: the least of any form.

        Apply, dh and dW0's share are there for every token; write, v and their gradients for written chunks.
        Reads of last chunks by each other are counted for the forward alone.
        """
        unit, nu = self.static_flops, self.written(state=False) * self.chunk / self.tokens
        return self.forward_flops(state=False) + unit * (2 + 2 * nu) + 2 * nu * unit * self.d / self.f

    def training_flops_in_memory(self, kept: int) -> float:
        """The same for a form that keeps so many matrices, of all rows, and computes the others again.

        It begins at every kept one; the last chunks before the next one read each other where that is less.
        """
        chunks, rest = -(-self.tokens // self.chunk), self.tokens % self.chunk or self.chunk
        tail, again = tail_chunks(self.chunk, self.d, self.f), 0.0
        for marks in places([chunks] * self.batch, kept, tail):
            writes, reads = stretches(chunks, marks, tail)
            # An incomplete last chunk reads with fewer rows.
            last = min(chunks - max(marks, default=0), tail)
            rows = reads * self.chunk - (last - 1) * (self.chunk - rest)
            again += 2.0 * self.chunk * (writes * self.d * self.f + rows * (self.d + self.f))
        return self.training_flops() + again


@dataclass(frozen=True)
class Leaving:
    """What reads a prompt, and W ``[B, D, F]`` that its last call left behind: read when no time is taken."""

    run: Callable[[], Tensor]
    weights: Callable[[], Tensor]

    def __call__(self) -> Tensor:
        return self.run()


def fresh_state(d: int, f: int, chunk: int, batch: int, dtype: torch.dtype) -> FastWeightState:
    """State of a layer of ``batch`` sequences that have not begun, laid out as sessions have it on CPU."""
    spec = SiteSpec(KEY, d, f, d, chunk, LR, "hidden_states", True, 5, "m")
    device = torch.device("cpu")
    return FastWeightState.zeros([spec], batch, dtype, device, spread=has_room_to_spread(device, 0))


def held(what: str, got: Tensor, want: Tensor, bound: float) -> float:
    """Largest difference by the largest number.

    Raises:
        AssertionError: it is beyond its bound, or no number.
    """
    error = float((got.double() - want).abs().max() / want.abs().max())
    assert error <= bound, f"{what}: error {error:.1e}, no timing"
    return error


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

        What is :class:`Leaving` is also held by the W that it leaves: of the first row against fp64 over the
        whole text, of all rows against the first one's.

        Raises:
            AssertionError: one is beyond its bound.
        """
        shape, bound = self.shape, BOUNDS[self.dtype]
        length = self._exact_length
        wide = [x.double() for x in (self.h[0, :length], self.t[0, :length], self.w0, self.conv, self.proj)]
        exact = reference.chunked(*wide, lr=LR, chunk=shape.chunk)[0]
        leaving = any(isinstance(run, Leaving) for run in results.values())
        exact_w = self._exact_weight() if leaving else None
        errors: dict[str, float] = {}
        first: Tensor | None = None
        first_w: Tensor | None = None
        with torch.no_grad():
            for name, run in results.items():
                y, said = run().double(), f"{name}, {shape}"
                assert y.shape == (shape.batch, shape.tokens, shape.d), f"{name}: {tuple(y.shape)}"
                first = y if first is None else first
                errors[name] = held(said, y[0, :length], exact, bound)
                held(f"{said}, against the first", y, first, 2 * bound)
                if isinstance(run, Leaving):
                    w = run.weights().double()
                    assert w.shape == (shape.batch, shape.d, shape.f), f"{name}: W {tuple(w.shape)}"
                    first_w = w if first_w is None else first_w
                    errors[f"{name}: W"] = held(f"{said}, W", w[0], exact_w, bound)
                    held(f"{said}, W against the first", w, first_w, 2 * bound)
        return errors

    def gate_static(self, results: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
        """The same for the static product, on which floors stand: ``[B * T, D]``.

        Raises:
            AssertionError: one is beyond its bound.
        """
        length = self._exact_length
        exact = functional.linear(self.h[0, :length].double(), self.w0.double())
        return {
            name: held(f"{name}, {self.shape}", run()[:length], exact, BOUNDS[self.dtype])
            for name, run in results.items()
        }

    @property
    def _exact_length(self) -> int:
        return min(self.shape.tokens, _EXACT_CHUNKS * self.shape.chunk + self.shape.chunk // 2)

    def _exact_weight(self) -> Tensor:
        """W of the first row after the whole text, in fp64."""
        w0, conv, proj = (x.double() for x in (self.w0, self.conv, self.proj))
        w, chunk = w0.clone(), self.shape.chunk
        for i in range(0, self.shape.tokens - chunk + 1, chunk):
            h, t = (x[0, i : i + chunk].double() for x in (self.h, self.t))
            w += reference.increment(t, h, w0, conv, proj, LR)
        return w

    def gate_gradients(self, results: dict[str, Callable[[], list[Tensor | None]]]) -> dict[str, float]:
        """The same for gradients of h, t, w0, conv and proj, against the first competitor in fp64.

        Raises:
            AssertionError: one is beyond its bound.
        """
        bound, errors = 3 * BOUNDS[self.dtype], {}
        exact = self._exact_gradients()
        for name, run in results.items():
            said = f"{name}, {self.shape}, a gradient"
            pairs = zip(run(), exact, strict=True)
            errors[name] = max(held(said, got, want, bound) for got, want in pairs)
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
