"""What one token per row costs at a fast-weight site, in dense and in factored form.

The static projection reads W0 once for the whole batch. Dense, every row reads its own fp32 W instead;
factored, the batch reads W0 and every row its N written tokens (h and v). A write is spread over the C tokens
that pay for it. May be changed here: the count, together with the decode kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ttt_compiler.codegen.devices import Device
from ttt_compiler.codegen.phases import Phase, cost_of
from ttt_compiler.spec import state_dtype


@dataclass(frozen=True)
class DecodeShape:
    """One step of one site.

    Attributes:
        batch: B rows, a token each.
        written: N, tokens of a row that its fast weight holds.
        d_model: D.
        d_ff: F.
        chunk: C.
        dtype: of weights and operands.
    """

    batch: int
    written: int
    d_model: int
    d_ff: int
    chunk: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def matrix(self) -> int:
        """D F."""
        return self.d_model * self.d_ff


def static(shape: DecodeShape, device: Device) -> tuple[Phase, ...]:
    """The base model's projection."""
    return (_product("W0", shape, device, shape.matrix * shape.dtype.itemsize),)


def dense(shape: DecodeShape, device: Device) -> tuple[Phase, ...]:
    """Every row reads its own W, which holds W0 too."""
    held = state_dtype(shape.dtype).itemsize
    reads = _product("W", shape, device, shape.batch * shape.matrix * held)
    return (reads, _keep(shape), _write(shape, device))


def factored(shape: DecodeShape, device: Device) -> tuple[Phase, ...]:
    """The batch reads W0, every row its written tokens; writing is keeping them."""
    rows = shape.batch * shape.written
    flops = 2.0 * rows * (shape.d_model + shape.d_ff)
    tokens = Phase(
        "tokens",
        flops,
        flops / device.peak(shape.dtype),
        hbm=rows * (shape.d_model + shape.d_ff) * shape.dtype.itemsize,
    )
    return (*static(shape, device), tokens, _keep(shape))


def choose(shape: DecodeShape, device: Device) -> tuple[str, tuple[Phase, ...]]:
    """The cheaper form and its phases; without written tokens the static projection alone."""
    if shape.written == 0:
        return "static", (*static(shape, device), _keep(shape))
    both = {"dense": dense(shape, device), "factored": factored(shape, device)}
    name = min(both, key=lambda form: cost_of(both[form], device, recorded=True).seconds)
    return name, both[name]


def crossover(batch: int, d_model: int, d_ff: int) -> float:
    """Written tokens from which a dense W of the operands' width reads less than factored rows do.

    ``N* = (1 - 1/B) D F / (D + F)``; an fp32 W doubles what dense reads and moves it up.
    """
    return (1 - 1 / batch) * d_model * d_ff / (d_model + d_ff)


def _product(name: str, shape: DecodeShape, device: Device, nbytes: int) -> Phase:
    flops = 2.0 * shape.batch * shape.matrix
    return Phase(name, flops, flops / device.peak(shape.dtype), hbm=nbytes)


def _keep(shape: DecodeShape) -> Phase:
    """h and t of the token join the tail of their chunk."""
    return Phase("tail", hbm=shape.batch * (shape.d_ff + shape.d_model) * shape.dtype.itemsize)


def _write(shape: DecodeShape, device: Device) -> Phase:
    """One token's share of a chunk's write; its launches are shared by the chunk and left out."""
    flops = 2.0 * shape.batch * shape.matrix
    state = 2 * shape.matrix * state_dtype(shape.dtype).itemsize / shape.chunk
    rows = (shape.d_ff + shape.d_model) * shape.dtype.itemsize
    rate = device.peak(shape.dtype) * device.gemm.value
    return Phase("write", flops, flops / rate, hbm=shape.batch * (state + rows), launches=0)
