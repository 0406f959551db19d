"""What our library form costs: spans of chunks whose states stand side by side, and pairs of blocks in them.

Forward, over n spans of a row: n - 1 writes as one batch of products into fp32, one pass that adds them up
and leaves a state per span in the operands' dtype, one batch of applies; and for every size of blocks, from C
to half of a span, the scores of second halves against first ones and their mix. The gradients: writes once
more, ``dy W``, the same sums in reverse, ``h S^T`` and ``v S``, and five products per pair. The official form
is this one with a span of one chunk, states in the operands' dtype, and all of them at once. May be changed
here: the count, together with :mod:`ttt_compiler.codegen.gpu.library`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ttt_compiler.codegen.devices import Device
from ttt_compiler.codegen.forms import L2_SHARE, ScanShape
from ttt_compiler.codegen.phases import Phase, cost_of, gemm, stream

# The part of a device's memory that states held at a time may take.
STACK_SHARE = 1 / 128
# Of predicted times so close, less memory is better than less time.
NEAR = 1.05


@dataclass(frozen=True)
class Spans:
    """How a text is cut.

    Attributes:
        span: tokens between two writes, C times a power of two.
        held: spans whose states are in memory at a time.
    """

    span: int
    held: int


def spans_choices(shape: ScanShape, device: Device, *, decays: bool = False) -> tuple[Spans, ...]:
    """Spans from C on, doubled until one holds the text, each with as many states as memory allows.

    Args:
        shape: of the scan.
        device: where.
        decays: whether W decays: then every chunk is written by itself.
    """
    found, span = [], shape.chunk
    while True:
        count = math.ceil(shape.tokens / span)
        room = int(STACK_SHARE * device.memory // (_state_bytes(shape) * shape.d_model * shape.d_ff))
        found.append(Spans(span, max(1, min(count, room))))
        if decays or count == 1:
            return tuple(found)
        span *= 2


def spans(shape: ScanShape, device: Device, cut: Spans) -> tuple[Phase, ...]:
    """The forward scan.

    Raises:
        ValueError: the state after the last chunk is wanted: this form does not make it.
    """
    if shape.final:
        raise ValueError("the library form leaves no state")
    return _called(
        *_states(shape, device, cut, "write", "apply"), *_pairs(shape, device, cut, "scores", "mix")
    )


def spans_backward(shape: ScanShape, device: Device, cut: Spans) -> tuple[Phase, ...]:
    """The gradients of h, v and W0 of that scan."""
    count = math.ceil(shape.tokens / cut.span)
    d, f, rows = shape.d_model, shape.d_ff, shape.batch * shape.tokens
    phases = list(_states(shape, device, cut, "v^T h", "dy W"))
    if count == 1:
        phases.append(gemm("dy^T h", device, shape.dtype, d, f, rows))
    else:
        # Reverse: the last write is wanted, as part of dW0, but nobody reads what is before the last span.
        phases += _writes(shape, device, cut, count, "dy^T h")
        phases.append(_batch("h S^T", shape, device, cut, count - 1, cut.span, d, f))
        phases.append(_batch("v S", shape, device, cut, count - 1, cut.span, f, d))
    names = ("scores", "scores' gradient", "mix to dv", "mix to dh, second", "mix to dh, first")
    return _called(*phases, *_pairs(shape, device, cut, *names, backward=True))


def spans_workspace(shape: ScanShape, cut: Spans) -> int:
    """Bytes of the states held at a time, and of the scores of the largest pairs of blocks."""
    count = math.ceil(shape.tokens / cut.span)
    states = 0 if count == 1 else (cut.held * _state_bytes(shape) + shape.state_itemsize)
    scores = shape.batch * shape.tokens * cut.span // 4 if cut.span > shape.chunk else 0
    return states * shape.d_model * shape.d_ff + scores * shape.dtype.itemsize


@functools.lru_cache(maxsize=1024)
def best_spans(shape: ScanShape, device: Device, *, decays: bool = False, backward: bool = False) -> Spans:
    """The cut with the least predicted time; of those about as fast the one with the least memory.

    Args:
        shape: of the forward.
        device: where.
        decays: whether W decays.
        backward: of the gradients instead of the scan.
    """
    form: Callable[[ScanShape, Device, Spans], tuple[Phase, ...]] = spans_backward if backward else spans
    choices = spans_choices(shape, device, decays=decays)
    seconds = {cut: cost_of(form(shape, device, cut), device).seconds for cut in choices}
    near = [cut for cut in choices if seconds[cut] <= NEAR * min(seconds.values())]
    return min(near, key=lambda cut: spans_workspace(shape, cut))


def _state_bytes(shape: ScanShape) -> int:
    """Of one number of a state that is held: what was written, and what is read."""
    return shape.state_itemsize + shape.dtype.itemsize


def _states(shape: ScanShape, device: Device, cut: Spans, write: str, apply: str) -> list[Phase]:
    """Writes, sums and applies of all spans; the last write is left out."""
    count, d, f = math.ceil(shape.tokens / cut.span), shape.d_model, shape.d_ff
    if count == 1:
        return [gemm(apply, device, shape.dtype, shape.batch * shape.tokens, d, f)]
    phases = _writes(shape, device, cut, count - 1, write)
    return [*phases, _batch(apply, shape, device, cut, count, cut.span, d, f)]


def _writes(shape: ScanShape, device: Device, cut: Spans, count: int, name: str) -> list[Phase]:
    """Products of ``count`` spans into fp32, and the pass that adds them up."""
    d, f, wide = shape.d_model, shape.d_ff, shape.state_itemsize
    product = _batch(name, shape, device, cut, count, d, f, cut.span)
    # The product's result is wider than the operands; the pass reads it and writes what is read.
    more = shape.batch * count * d * f * (wide - shape.dtype.itemsize)
    total = shape.batch * count * d * f * _state_bytes(shape)
    in_cache = cut.held * _state_bytes(shape) * d * f <= L2_SHARE * device.l2
    calls = shape.batch * math.ceil(count / cut.held)
    product = Phase(
        product.name, product.flops, product.seconds, product.hbm + (0 if in_cache else more),
        more if in_cache else 0, product.launches,
    )  # fmt: skip
    passes = stream("sum", 0 if in_cache else total, launches=calls)
    if in_cache:
        passes = Phase("sum", l2=total, launches=calls)
    return [product, passes]


def _batch(
    name: str, shape: ScanShape, device: Device, cut: Spans, count: int, m: int, n: int, k: int
) -> Phase:
    """``count`` products of every row, as many at a time as states are held."""
    whole, rest = divmod(count, cut.held)
    parts = [gemm(name, device, shape.dtype, m, n, k, batch=cut.held, count=shape.batch * whole)] * (
        whole > 0
    )
    if rest:
        parts.append(gemm(name, device, shape.dtype, m, n, k, batch=rest, count=shape.batch))
    return _together(name, parts)


def _pairs(shape: ScanShape, device: Device, cut: Spans, *names: str, backward: bool = False) -> list[Phase]:
    """Products of pairs of blocks, size by size: scores and mix, or the five of the gradients."""
    d, f = shape.d_model, shape.d_ff
    parts: list[list[Phase]] = [[] for _ in names]
    size = shape.chunk
    while size < cut.span:
        pairs = shape.tokens / (2 * size)
        # The text may end inside of a second block: so much of a pair counts.
        whole, rest = int(pairs), max(0.0, 2 * (pairs - int(pairs)) - 1)
        sizes = [(size, size, f), (size, d, size)]
        if backward:
            sizes = [(size, size, f), (size, size, d), (size, d, size), (size, f, size), (size, f, size)]
        for part, (m, n, k) in zip(parts, sizes, strict=True):
            if whole:
                part.append(gemm("", device, shape.dtype, m, n, k, batch=shape.batch * whole))
            if rest:
                ends = math.ceil(rest * size)
                part.append(gemm("", device, shape.dtype, ends, n, k, batch=shape.batch))
        size *= 2
    return [_together(name, part) for name, part in zip(names, parts, strict=True) if part]


def _called(*phases: Phase) -> tuple[Phase, ...]:
    """Phases that Python launches one by one."""
    return tuple(replace(phase, called=True) for phase in phases)


def _together(name: str, parts: list[Phase]) -> Phase:
    """Products of one kind as one phase."""
    return Phase(
        name,
        sum(p.flops for p in parts),
        sum(p.seconds for p in parts),
        sum(p.hbm for p in parts),
        launches=sum(p.launches for p in parts),
    )
