"""One fast-weight layer in the middle of a text, one token a call: ours, and the best that others can do.

May be changed here: competitors, if they compute the same; :meth:`Decoding.gate` says whether they do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bench.exact import Exact
from bench.layer import BOUNDS, KEY, LR, fresh_state, held
from bench.results import WITH_SHARE, WITH_V, WITH_V_AND_WRITE
from ttt_compiler.codegen import ops  # noqa: F401  (registers the ops)
from ttt_compiler.codegen.cpu.gemm import product
from ttt_compiler.codegen.cpu.native.squares import norm
from ttt_compiler.codegen.layout import FACTORED, LEFT, WRITES, spread_tokens
from ttt_compiler.codegen.reference import target
from ttt_compiler.compat.processor import product_dtype
from ttt_compiler.runtime.state import FastWeightState

LOOP = "official inference loop"
# Steps of one timed call, none of which may cross a border.
STEPS = 20
# By so many columns W of a long text is held.
_COLUMNS = 4


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
    """Operands of a step, and the state after N tokens, which were really read.

    Up to the first chunk's end, and to any other, they are a prompt. Where the text stands inside of a later
    chunk, it was decoded there: the chunk before was completed by a single token, and its write is spread.
    """

    def __init__(self, place: Place, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.place, self.dtype = place, getattr(torch, place.dtype)
        b, d, f = place.batch, place.d, place.f
        self.w0, self.conv = self._draw(d, f, scale=0.02), self._draw(d, 1, 5, scale=0.1)
        self.proj = self._draw(d, d, scale=0.3 / d)
        self.state = fresh_state(d, f, place.chunk, b, self.dtype)
        (self.spec,) = self.state.specs
        self.site, self.constants = self.state.sites[KEY], self.spec.encode()
        self.h, self.t = self._draw(b, 1, f), self._draw(b, 1, d)
        columns = torch.cat([self.h.transpose(1, 2), self._draw(b, f, _COLUMNS)], 2)
        self.exact = Exact(self.w0, self.conv, self.proj, LR, place.chunk, columns)
        inside = place.past % place.chunk if place.past > place.chunk else 0
        #: Tokens of the text that were read one by one.
        self.decoded = inside + 1 if inside else 0
        while self.exact.seen < place.past:
            seen = self.exact.seen
            end = place.past - self.decoded
            size = min(place.chunk - seen % place.chunk, end - seen) if seen < end else 1
            h, t = self._draw(b, size, f), self._draw(b, size, d)
            self.call(h, t)
            self.exact.read(h, t)
        self.begin = self.site.rows.clone()

    def _draw(self, *size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=self.random) * scale).to(self.dtype)

    @functools.cached_property
    def tokens(self) -> list[tuple[Tensor, Tensor]]:
        """A chunk of single tokens, h and t of each."""
        b, d, f = self.place.batch, self.place.d, self.place.f
        return [(self._draw(b, 1, f), self._draw(b, 1, d)) for _ in range(self.place.chunk)]

    def read_tokens(self, times: int) -> None:
        """Says that the state has read :attr:`tokens` so many times."""
        h, t = (torch.cat(parts, 1) for parts in zip(*self.tokens, strict=True))
        for _ in range(times):
            self.exact.read(h, t)

    def call(self, h: Tensor, t: Tensor, state: FastWeightState | None = None) -> Tensor:
        """The op on the next tokens, of the text or of another state."""
        site, batch = (self.site, self.state.batch) if state is None else (state.sites[KEY], state.batch)
        return torch.ops.ttt.fast_weight_step.default(
            *(h, t, self.w0, None, self.conv, self.proj, None, self.constants, *site, batch)
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

    def ours(self) -> Tensor:
        """``STEPS`` tokens, from the same place each time.

        Only counters go back: columns that a write in progress has reached are written again.
        """
        self.site.rows.copy_(self.begin)
        for _ in range(STEPS):
            y = self.call(self.h, self.t)
        return y

    def runs(self, clock: Callable[[], float]) -> dict[str, Callable[[], object]]:
        """Of ``STEPS`` tokens each: static, the bytes alone, a merged weight a row, the official loop, ours.

        Where steps make v of a chunk, static also with that: P of as many tokens, in one product. Where they
        write, with as large a part of the chunk's write.
        """
        merged = self.matrices().to(self.dtype).transpose(1, 2)
        static = _times(lambda: functional.linear(self.h, self.w0))
        runs = {
            "static": static,
            "the same bytes": _times(reader(self.bytes_read(), self.place.f, clock)),
            "merged weights": _times(lambda: torch.bmm(self.h, merged)),
            LOOP: self._loop(),
            "ours": self.ours,
        }
        if self.makes_v():
            tokens = self.t.expand(-1, STEPS, -1).flatten(0, 1).contiguous()
            runs[WITH_V] = lambda: (static(), torch.mm(tokens, self.proj))
        elif any(self.state.column(KEY, LEFT)):
            shares = self._shares()
            runs[WITH_SHARE] = lambda: (static(), shares())
        return runs

    def _shares(self) -> Callable[[], None]:
        """Of every row's write what belongs to ``STEPS`` steps, as one product a row."""
        place, dtype = self.place, product_dtype(self.dtype)
        width = place.f * STEPS // spread_tokens(self.spec)
        # Small, since nothing sets W back between rounds.
        v, h = torch.randn(place.chunk, place.d).to(dtype) * 1e-6, torch.randn(place.chunk, width).to(dtype)
        w = torch.zeros(place.d, width, dtype=dtype)

        def run() -> None:
            for _ in range(place.batch):
                product(v.t(), h, w, accumulate=True)

        return run

    def _loop(self) -> Callable[[], None]:
        """The official loop here, held against fp64."""
        loop = Loop(self)
        first = self.exact.products()[:, :, :1].transpose(1, 2)
        held(f"{LOOP}, {self.place}", loop(self.h, self.t), first, BOUNDS[self.dtype])

        def run() -> None:
            loop.seen = self.place.past % self.place.chunk
            for _ in range(STEPS):
                loop(self.h, self.t)

        return run

    def makes_v(self) -> bool:
        """Whether the text stands inside of a chunk, of which steps make v ahead of its end.

        They make none while the write of the chunk before is in progress.
        """
        return self.place.past % self.place.chunk > STEPS and not any(self.state.column(KEY, LEFT))

    def gate(self, steps: int = STEPS) -> dict[str, float]:
        """Errors of every row against fp64: of y in the next steps, on a copy, and of W after them.

        W of a short text is compared as a whole, of a long one by its products (see :mod:`bench.exact`).

        Raises:
            AssertionError: one is beyond the bound: no number from a wrong result.
        """
        assert self.exact.seen % self.place.chunk + steps < self.place.chunk, "W changes at a border"
        trial = self.state.clone()
        trial.own()
        y = torch.cat([self.call(self.h, self.t, trial) for _ in range(steps)], 1)
        want = self.exact.products()[:, :, :1].transpose(1, 2)
        errors = {"ours": held(f"ours, {self.place}", y, want, BOUNDS[self.dtype])}
        trial.finish_writes(lambda _: self.w0)
        w = [trial.matrix(KEY, b, self.w0) for b in range(self.place.batch)]
        return errors | {"ours: W": self.held_weights("ours", w)}

    def held_weights(self, name: str, weights: list[Tensor]) -> float:
        """Error of W ``[D, F]`` of every row after the text.

        Raises:
            AssertionError: it is beyond the bound.
        """
        bound, errors = BOUNDS[self.dtype], []
        products = zip(weights, self.exact.columns, self.exact.products(), strict=True)
        for b, (w, columns, want) in enumerate(products):
            said = f"{name}, {self.place}, W of row {b}"
            errors.append(held(said, w.double() @ columns, want, bound))
            if (whole := self.exact.weight(b)) is not None:
                errors.append(held(said, w, whole, bound))
        return max(errors)


class Loop:
    """The official loop at one row after the other, as cheap as it can be: each row has its W.

    Published, it grows its tail by concatenation, and clones W until the first write; here are buffers.
    """

    def __init__(self, decoding: Decoding) -> None:
        place = decoding.place
        self.weights = list(decoding.matrices().to(decoding.dtype).unbind())
        self.conv, self.proj, self.chunk = decoding.conv, decoding.proj, place.chunk
        self.h = torch.zeros(place.batch, place.chunk, place.f, dtype=decoding.dtype)
        self.t = torch.zeros(place.batch, place.chunk, place.d, dtype=decoding.dtype)
        self.seen = place.past % place.chunk

    def __call__(self, h: Tensor, t: Tensor) -> Tensor:
        out = []
        for b, w in enumerate(self.weights):
            self.h[b, self.seen], self.t[b, self.seen] = h[b, 0], t[b, 0]
            out.append(functional.linear(h[b], w))
            if self.seen + 1 == self.chunk:
                v = target(self.t[b], self.conv, self.proj)
                w.addmm_(v.t(), self.h[b], alpha=LR)
        self.seen = (self.seen + 1) % self.chunk
        return torch.stack(out)


class WholeChunks:
    """A whole chunk of steps a call, one chunk behind the other: what a token costs on the average.

    Attributes:
        taken: per competitor and call, the seconds of each step.
    """

    def __init__(self, decoding: Decoding, clock: Callable[[], float]) -> None:
        assert decoding.place.past % decoding.place.chunk == 0
        self.decoding, self.clock, self.loop = decoding, clock, Loop(decoding)
        self.taken: dict[str, list[list[float]]] = {}

    def runs(self) -> dict[str, Callable[[], object]]:
        """Of C tokens each: static, ours, the official loop, and what any form must do at the least."""
        w0, read = self.decoding.w0, reader(self.decoding.bytes_read(), self.decoding.place.f, self.clock)
        steps = {
            "static": lambda h, _: functional.linear(h, w0),
            "ours": self.decoding.call,
            LOOP: self.loop,
        }
        runs = {name: functools.partial(self._chunk, name, step) for name, step in steps.items()}
        return runs | {WITH_V_AND_WRITE: lambda: self._least(read)}

    def _chunk(self, name: str, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        seconds = []
        for h, t in self.decoding.tokens:
            start = self.clock()
            step(h, t)
            seconds.append(self.clock() - start)
        self.taken.setdefault(name, []).append(seconds)

    def _least(self, read: Callable[[], object]) -> None:
        """Every step's matrices are read; v is made, and W written, by two products a row and chunk."""
        h, t, proj, w, v = self._operands
        for _ in range(self.decoding.place.chunk):
            read()
        for _ in range(self.decoding.place.batch):
            product(t, proj, v)
            product(v.t(), h, w, accumulate=True)

    @functools.cached_property
    def _operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        place, dtype = self.decoding.place, product_dtype(self.decoding.dtype)
        h, t = (torch.randn(place.chunk, width).to(dtype) for width in (place.f, place.d))
        # Small, since nothing sets W back between rounds.
        proj, w = self.decoding.proj.to(dtype) * 1e-6, self.decoding.w0.to(dtype, copy=True)
        return h, t, proj, w, torch.empty(place.chunk, place.d, dtype=dtype)

    def gate(self) -> dict[str, float]:
        """After the timing: what was timed is what is right. Errors of both forms' W, and of ours' y.

        Raises:
            AssertionError: one is beyond the bound.
        """
        self.decoding.read_tokens(len(self.taken["ours"]))
        errors = self.decoding.gate()
        assert len(self.taken[LOOP]) == len(self.taken["ours"])
        return errors | {f"{LOOP}: W": self.decoding.held_weights(LOOP, self.loop.weights)}


def reader(size: int, width: int, clock: Callable[[], float]) -> Callable[[], object]:
    """What reads so many bytes fastest here: a product, a sum, or a norm."""
    buffer, vector = torch.ones(size // (4 * width), width), torch.ones(width)
    ways = (lambda: torch.mv(buffer, vector), buffer.sum, lambda: norm(buffer))
    taken = {way: [_seconds(way, clock) for _ in range(5)] for way in ways}
    return min(taken, key=lambda way: min(taken[way][1:]))


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def across_a_chunk(
    decoding: Decoding, clock: Callable[[], float], rounds: int, *, again: bool
) -> list[float]:
    """Seconds of each of C steps, of which the last one completes a chunk: medians over ``rounds`` chunks.

    With ``again`` it is the same chunk each time, else one behind the other. What was read is then what
    :meth:`Decoding.gate` expects.
    """
    assert decoding.place.past % decoding.place.chunk == 0
    taken = []
    for _ in range(rounds):
        if again:
            decoding.site.rows.copy_(decoding.begin)
        steps = []
        for h, t in decoding.tokens:
            start = clock()
            decoding.call(h, t)
            steps.append(clock() - start)
        taken.append(steps)
    decoding.read_tokens(1 if again else rounds)
    return torch.tensor(taken).median(0).values.tolist()


def _times(fn: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(STEPS):
            fn()

    return run
