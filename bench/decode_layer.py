"""One fast-weight layer in the middle of a text, one token a call: ours, and the best that others can do.

May be changed here: competitors, if they compute the same; :meth:`Decoding.gate` says whether they do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bench.layer import BOUNDS, LR
from bench.results import WITH_V
from ttt_compiler.codegen import ops  # noqa: F401  (registers the ops)
from ttt_compiler.codegen.cpu.native.squares import norm
from ttt_compiler.codegen.layout import FACTORED, WRITES
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.spec import SiteSpec

KEY = "w"
# Steps of one timed call, none of which may cross a border.
STEPS = 20


@dataclass(frozen=True)
class Place:
    """Where the decode stands: sizes D and F, chunk C, rows B, tokens N read before, dtype."""

    d: int
    f: int
    chunk: int
    batch: int
    past: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"D={self.d} F={self.f} C={self.chunk} B={self.batch} N={self.past} {self.dtype}"


class Decoding:
    """Operands of a step, and the state after N tokens, which were really read."""

    def __init__(self, place: Place, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.place, self.dtype = place, getattr(torch, place.dtype)
        b, d, f = place.batch, place.d, place.f

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=g) * scale).to(self.dtype)

        self.w0, self.conv, self.proj = (
            draw(d, f, scale=0.02),
            draw(d, 1, 5, scale=0.1),
            draw(d, d, scale=0.3 / d),
        )
        self.spec = SiteSpec(KEY, d, f, d, place.chunk, LR, "hidden_states", True, 5, "m")
        self.state = FastWeightState.zeros([self.spec], b, self.dtype, torch.device("cpu"), spread=True)
        self.site, self.constants = self.state.sites[KEY], self.spec.encode()
        for start in range(0, place.past, place.chunk):
            size = min(place.chunk, place.past - start)
            self.call(draw(b, size, f), draw(b, size, d))
        self.h, self.t = draw(b, 1, f), draw(b, 1, d)
        self.begin = self.site.rows.clone()

    def call(self, h: Tensor, t: Tensor) -> Tensor:
        """The op on the next tokens."""
        return torch.ops.ttt.fast_weight_step.default(
            *(h, t, self.w0, None, self.conv, self.proj, None, self.constants, *self.site, self.state.batch)
        )

    def matrices(self) -> Tensor:
        """W of every row, ``[B, D, F]`` in the state's dtype."""
        return torch.stack([self.state.matrix(KEY, b, self.w0) for b in range(self.place.batch)])

    def bytes_read(self) -> int:
        """What one step must read of the form that each row has: W0 once, then matrices or factored rows."""
        d, f, item = self.place.d, self.place.f, self.dtype.itemsize
        total = self.reads_base() * d * f * item
        for row in self.site.rows.tolist():
            dense = row[WRITES] and not row[FACTORED]
            total += d * f * self.site.w.element_size() if dense else row[FACTORED] * (d + f) * item
        return total

    def reads_base(self) -> bool:
        """Whether a row reads W0: the static product is a part of the step then."""
        return any(not row[WRITES] or row[FACTORED] for row in self.site.rows.tolist())

    def step(self) -> Tensor:
        """One token, from the same place each time."""
        self.site.rows.copy_(self.begin)
        return self.call(self.h, self.t)

    def ours(self) -> Tensor:
        """``STEPS`` tokens."""
        self.site.rows.copy_(self.begin)
        for _ in range(STEPS):
            y = self.call(self.h, self.t)
        return y

    def runs(self) -> dict[str, Callable[[], object]]:
        """Of ``STEPS`` tokens each: static, the bytes alone, a merged weight a row, ours.

        Where steps make v of a chunk, static also with that: P of as many tokens, in one product.
        """
        merged = self.matrices().to(self.dtype).transpose(1, 2)
        static = _times(lambda: functional.linear(self.h, self.w0))
        runs = {
            "static": static,
            "the same bytes": _times(reader(self.bytes_read(), self.place.f)),
            "merged weights": _times(lambda: torch.bmm(self.h, merged)),
            "ours": self.ours,
        }
        if self.makes_v():
            tokens = self.t.expand(-1, STEPS, -1).flatten(0, 1).contiguous()
            runs[WITH_V] = lambda: (static(), torch.mm(tokens, self.proj))
        return runs

    def makes_v(self) -> bool:
        """Whether the text stands inside of a chunk, of which steps make v ahead of its end."""
        return self.place.past % self.place.chunk > STEPS

    def gate(self) -> float:
        """Error of a step against fp64.

        Raises:
            AssertionError: it is beyond the bound: no number from a wrong result.
        """
        exact = torch.bmm(self.h.double(), self.matrices().double().transpose(1, 2))
        error = float((self.step().double() - exact).abs().max() / exact.abs().max())
        assert error <= BOUNDS[self.dtype], f"{self.place}: error {error:.1e}, no timing"
        return error


def reader(size: int, width: int) -> Callable[[], object]:
    """What reads so many bytes fastest here: a product, a sum, or a norm."""
    buffer, vector = torch.ones(size // (4 * width), width), torch.ones(width)
    ways = (lambda: torch.mv(buffer, vector), buffer.sum, lambda: norm(buffer))
    taken = {way: [_seconds(way) for _ in range(5)] for way in ways}
    return min(taken, key=lambda way: min(taken[way][1:]))


def _seconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def across_a_chunk(
    decoding: Decoding, clock: Callable[[], float], rounds: int, *, again: bool
) -> list[float]:
    """Seconds of each of C steps, of which the last one completes a chunk: medians over ``rounds`` chunks.

    With ``again`` it is the same chunk each time, else one behind the other.
    """
    assert decoding.place.past % decoding.place.chunk == 0
    taken = []
    for _ in range(rounds):
        if again:
            decoding.site.rows.copy_(decoding.begin)
        steps = []
        for _ in range(decoding.place.chunk):
            start = clock()
            decoding.call(decoding.h, decoding.t)
            steps.append(clock() - start)
        taken.append(steps)
    return torch.tensor(taken).median(0).values.tolist()


def _times(fn: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(STEPS):
            fn()

    return run
