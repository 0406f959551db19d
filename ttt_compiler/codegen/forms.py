"""The forms of the chunk scan that are made of library calls, as phases: FLOPs, bytes, launches.

``y_i = q_i W_i^T ; W_{i+1} = W_i + v_i^T k_i`` over chunks of C tokens, W ``[D, F]``; in the forward scan
q = k = h. Our own kernel is :mod:`ttt_compiler.codegen.on_chip`, a processor's loop
:mod:`ttt_compiler.codegen.forms_cpu`. May be changed here: the count of a form, with its test against a count
by hand and against torch's own counter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ttt_compiler.codegen.devices import Device
from ttt_compiler.codegen.phases import Phase, cost_of, gemm, stream
from ttt_compiler.spec import state_dtype

# The share of the shared cache that data which is to stay there may take; the rest streams through.
L2_SHARE = 0.5


@dataclass(frozen=True)
class ScanShape:
    """One scan.

    Attributes:
        tokens: T, of one row.
        d_model: D, width of y and v.
        d_ff: F, width of q and k.
        chunk: C.
        batch: B rows.
        dtype: of the operands; the state is fp32 (fp64 for fp64).
        final: whether the state after the last complete chunk is wanted; else its write is left out.
        apart: whether q and k are different tensors, as in two of the three scans of a backward.
    """

    tokens: int
    d_model: int
    d_ff: int
    chunk: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    final: bool = False
    apart: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "d_model", "d_ff", "chunk", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def chunks(self) -> int:
        """Chunks, the last one perhaps incomplete."""
        return -(-self.tokens // self.chunk)

    @property
    def writes(self) -> int:
        """Chunks that are written."""
        return self.tokens // self.chunk if self.final else self.chunks - 1

    @property
    def unit(self) -> float:
        """FLOPs of the static projection, 2 B T D F."""
        return 2.0 * self.batch * self.tokens * self.d_model * self.d_ff

    @property
    def flops(self) -> float:
        """FLOPs of the state form: every token applied, every written chunk written."""
        written = self.writes * self.chunk
        return self.unit + 2.0 * self.batch * written * self.d_model * self.d_ff

    @property
    def matrix(self) -> int:
        """Numbers in the states of all rows."""
        return self.batch * self.d_model * self.d_ff

    @property
    def state_itemsize(self) -> int:
        """Bytes of one number of the state."""
        return state_dtype(self.dtype).itemsize

    @property
    def turned(self) -> ScanShape:
        """The scan of the transposed state: D and F change places."""
        return replace(self, d_model=self.d_ff, d_ff=self.d_model)


def static(shape: ScanShape, device: Device) -> tuple[Phase, ...]:
    """The base model's projection, ``h W0^T``."""
    rows = shape.batch * shape.tokens
    return (gemm("static", device, shape.dtype, rows, shape.d_model, shape.d_ff),)


def values(
    shape: ScanShape, device: Device, *, d_target: int | None = None, proj: bool = True
) -> tuple[Phase, ...]:
    """``v = conv(t) P``: one fused convolution that reads t and writes v, then one product."""
    width = shape.d_model if d_target is None else d_target
    rows = shape.batch * shape.tokens
    phases = (stream("conv", 2 * rows * width * shape.dtype.itemsize, flops=10.0 * rows * width),)
    return (*phases, gemm("P", device, shape.dtype, rows, shape.d_model, width)) if proj else phases


def two_gemm(shape: ScanShape, device: Device, *, state_itemsize: int | None = None) -> tuple[Phase, ...]:
    """An apply and an accumulate GEMM per chunk, the state in memory between them.

    State bytes per chunk and number: the accumulate reads and writes ``state_itemsize``; where operands are
    narrower, a copy for the next apply is made (read and write), which that apply reads.

    Args:
        shape: of the scan.
        device: where.
        state_itemsize: bytes of one number of the state; default fp32's, 2 is the official inference loop.
    """
    held = shape.state_itemsize if state_itemsize is None else state_itemsize
    item, chunk, writes = shape.dtype.itemsize, shape.chunk, shape.writes
    d, f, batch = shape.d_model, shape.d_ff, shape.batch
    rows = batch * chunk * (d + f) * item
    apply = gemm(
        "apply", device, shape.dtype, chunk, d, f, batch=batch, count=shape.chunks, hbm=rows,
        flops=shape.unit / shape.chunks,
    )  # fmt: skip
    write = gemm(
        "write", device, shape.dtype, d, f, chunk, batch=batch, count=writes, hbm=rows * (1 + shape.apart)
    )
    phases = [
        _with_state(apply, shape, device, item * shape.chunks, held),
        _with_state(write, shape, device, 2 * held * writes, held),
    ]
    if held != item and writes:
        copy = Phase("copy", launches=writes)
        phases.append(_with_state(copy, shape, device, (held + item) * writes, held))
    return tuple(p for p in phases if p.launches)


def dual(shape: ScanShape, device: Device, *, span: int | None = None) -> tuple[Phase, ...]:
    """The attention form inside spans of tokens, one write between spans.

    Inside of a span ``y = q W^T + strict_block_tril(q k^T) v``; only blocks below the diagonal are made.

    Args:
        shape: of the scan.
        device: where.
        span: tokens of a span, a multiple of C; default the whole sequence.
    """
    chunk, d, f, batch = shape.chunk, shape.d_model, shape.d_ff, shape.batch
    span = shape.chunks * chunk if span is None else span
    if span % chunk:
        raise ValueError(f"span={span} must be a multiple of the chunk, {chunk}")
    spans = math.ceil(shape.tokens / span)
    outer = replace(shape, chunk=span)
    phases = list(two_gemm(outer, device))
    blocks = min(span // chunk, shape.chunks)
    if blocks > 1:
        steps = spans * (blocks - 1)
        # Row block i meets i blocks of keys: half of the square in the mean.
        keys = chunk * blocks // 2
        item = shape.dtype.itemsize
        phases += [
            gemm("scores", device, shape.dtype, chunk, keys, f, batch=batch, count=steps),
            gemm("mix", device, shape.dtype, chunk, d, keys, batch=batch, count=steps),
            stream("add", 3 * batch * shape.tokens * d * item, launches=steps),
        ]
    return tuple(phases)


def best_span(shape: ScanShape, device: Device) -> int:
    """The span of :func:`dual` with the least predicted time, among C times powers of two and the whole."""
    whole = shape.chunks * shape.chunk
    spans, span = [whole], shape.chunk
    while span < whole:
        spans.append(span)
        span *= 2
    return min(sorted(spans), key=lambda s: cost_of(dual(shape, device, span=s), device).seconds)


def stacked_cumsum(shape: ScanShape, device: Device) -> tuple[Phase, ...]:
    """The official training forward: all chunks' weights side by side, summed up along the chunks.

    Tokens are padded to whole chunks. The increments are written, read and written by a concatenation with
    W0, read and written by the sum in the operands' dtype, and read by the batched apply.
    """
    item, n, writes = shape.dtype.itemsize, shape.chunks, shape.chunks - 1
    d, f, chunk, matrix = shape.d_model, shape.d_ff, shape.chunk, shape.matrix
    apply = gemm("apply", device, shape.dtype, chunk, d, f, batch=shape.batch * n)
    if not writes:
        return (apply,)
    return (
        gemm("increments", device, shape.dtype, d, f, chunk, batch=shape.batch * writes),
        stream("concatenate", (writes + n) * matrix * item),
        stream("sum", 2 * n * matrix * item),
        apply,
    )


def stacked_backward(shape: ScanShape, device: Device) -> tuple[Phase, ...]:
    """Its backward by autograd: four batched products, and the sum in reverse."""
    item, n, writes = shape.dtype.itemsize, shape.chunks, shape.chunks - 1
    d, f, chunk, matrix = shape.d_model, shape.d_ff, shape.chunk, shape.matrix
    own = {"batch": shape.batch * n}
    phases = [
        gemm("dy W", device, shape.dtype, chunk, f, d, **own),
        gemm("dy^T h", device, shape.dtype, d, f, chunk, **own),
    ]
    if writes:
        other = {"batch": shape.batch * writes}
        phases += [
            stream("sum", 2 * n * matrix * item),
            gemm("h S^T", device, shape.dtype, chunk, d, f, **other),
            gemm("v S", device, shape.dtype, chunk, f, d, **other),
            stream("add", 3 * shape.batch * shape.tokens * f * item),
        ]
    return tuple(phases)


def stack_bytes(shape: ScanShape, *, training: bool) -> int:
    """Bytes that the stacked form holds at its peak beside its inputs.

    Forward: increments, their concatenation with W0, and the sums. With a backward one more stack, of
    gradients; measured peaks of the official code fit four stacks.
    """
    stacks = 4 if training else 3
    return stacks * shape.chunks * shape.matrix * shape.dtype.itemsize


def _with_state(phase: Phase, shape: ScanShape, device: Device, per_number: int, held: int) -> Phase:
    """``phase`` with ``per_number`` bytes per number of the state, from the cache where all of it fits."""
    nbytes = per_number * shape.matrix
    if shape.matrix * held <= L2_SHARE * device.l2:
        return replace(phase, l2=phase.l2 + nbytes)
    return replace(phase, hbm=phase.hbm + nbytes)
