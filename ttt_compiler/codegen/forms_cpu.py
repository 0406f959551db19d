"""What the chunk scan of :mod:`ttt_compiler.codegen.cpu.scan` costs on a processor.

Rates come from :mod:`ttt_compiler.codegen.calibrate`; arithmetic and traffic add up, as a core has nobody to
hide the one behind the other. May be changed here: the count, together with the loop that it describes.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ttt_compiler.codegen.cpu import kept
from ttt_compiler.codegen.cpu.gemm import ONEDNN_MIN_ROWS, SHADOW_MIN_ROWS, writes_blocks
from ttt_compiler.codegen.devices import Device
from ttt_compiler.codegen.forms import ScanShape
from ttt_compiler.codegen.phases import Phase
from ttt_compiler.compat.processor import product_dtype

# torch calls per chunk of the loop: apply, two norms with their checks, write, and slicing around them.
_CALLS = 10


def recurrent(shape: ScanShape, device: Device) -> tuple[Phase, ...]:
    """The loop as it runs: an apply per chunk, a write after all but the last, every row on its own."""
    wide = product_dtype(shape.dtype)
    if wide != shape.dtype:
        # h is widened to be applied and to be written, v to be written; y is narrowed.
        rows, both = shape.batch * shape.tokens, shape.dtype.itemsize + wide.itemsize
        moved = rows * (2 * shape.d_ff + 2 * shape.d_model) * both
        again = recurrent(replace(shape, dtype=wide), device)
        return (*again, Phase("widen", hbm=moved, launches=4 * shape.batch * shape.chunks))
    d, f, item, held = shape.d_model, shape.d_ff, shape.dtype.itemsize, shape.state_itemsize
    n, writes, matrix = shape.batch * shape.chunks, shape.batch * shape.writes, d * f
    # A state that stays in the core's own cache moves at the rate of the products, which holds it.
    moving = 0 if matrix * held <= device.l2 else matrix
    rows = shape.batch * shape.tokens
    written = shape.batch * shape.writes * shape.chunk
    library = _library(shape, device)
    narrow = item < held and min(shape.chunk, shape.tokens) < SHADOW_MIN_ROWS
    phases = [
        Phase(
            "apply",
            shape.unit,
            shape.unit / rate_of(device, library, shape.dtype),
            hbm=rows * (f + d) * item + n * moving * (held if narrow else item),
            launches=n,
        ),
        Phase("finite", hbm=written * (f + d) * item, launches=_CALLS * writes),
    ]
    flops = 2.0 * written * matrix
    name = str(shape.dtype).removeprefix("torch.")
    write = flops / rate_of(device, f"{name} write", shape.dtype)
    if item < held and writes_blocks(shape.dtype):
        # Summed in fp32 where W is; the next apply's copy is made on the way.
        phases.append(Phase("write", flops, write, hbm=writes * moving * (2 * held + item), launches=writes))
    elif item == held:
        phases.append(Phase("write", flops, write, hbm=writes * 2 * moving * held, launches=writes))
    else:
        # The increment is written narrow, then added: read, state read, state written.
        phases.append(Phase("increment", flops, write, hbm=writes * moving * item, launches=writes))
        phases.append(Phase("add", hbm=writes * moving * (item + 2 * held), launches=writes))
        if not narrow:
            phases.append(Phase("copy", hbm=writes * moving * (item + held), launches=writes))
    return tuple(p for p in phases if p.launches)


def static(shape: ScanShape, device: Device) -> tuple[Phase, ...]:
    """The base model's projection, by the library that Inductor calls."""
    rows, item = shape.batch * shape.tokens, shape.dtype.itemsize
    name = str(shape.dtype).removeprefix("torch.")
    moved = (rows * (shape.d_ff + shape.d_model) + shape.d_model * shape.d_ff) * item
    seconds = shape.unit / rate_of(device, f"{name} apply", shape.dtype)
    return (Phase("static", shape.unit, seconds, hbm=moved),)


def training(shape: ScanShape, device: Device) -> tuple[Phase, ...]:
    """Forward and backward of the loop: 2 and 5 products per token, less writes that kept matrices save."""
    backward = recurrent(replace(shape, final=True), device)
    extra = shape.unit / rate_of(device, _library(shape, device), shape.dtype)
    mixed = shape.batch * shape.tokens * shape.d_ff * shape.dtype.itemsize * 3
    v_s = Phase("v S", shape.unit, extra, hbm=mixed, launches=shape.chunks)
    return (*recurrent(shape, device), *_again(shape, device), *backward, v_s)


def kept_matrices(shape: ScanShape) -> int:
    """How many matrices a forward keeps for the backward."""
    sizes = (shape.batch, shape.tokens, shape.chunk, shape.d_model, shape.d_ff)
    return int(kept.count(*sizes, shape.dtype))


def _again(shape: ScanShape, device: Device) -> tuple[Phase, ...]:
    """W of every chunk once more, applied to dy."""
    matrices, d, f, c = kept_matrices(shape), shape.d_model, shape.d_ff, shape.chunk
    tail = kept.tail_chunks(c, d, f)
    rows = [shape.chunks] * shape.batch
    work = [
        kept.stretches(n, at, tail) for n, at in zip(rows, kept.places(rows, matrices, tail), strict=True)
    ]
    writes, reads = (sum(x) for x in zip(*work, strict=True))
    part = writes / max(shape.batch * shape.writes, 1)
    phases = [
        replace(p, flops=p.flops * part, seconds=p.seconds * part, hbm=p.hbm * part)
        if p.name in ("write", "increment", "add", "copy")
        else p
        for p in recurrent(shape, device)
    ]
    flops = 2.0 * reads * c * c * (d + f)
    moved = 2 * reads * c * (d + f) * shape.dtype.itemsize
    rate = rate_of(device, _library(shape, device), shape.dtype)
    # W is made where it is kept and read there, but by a write of narrower operands, which copies it first.
    narrow = shape.dtype.itemsize < shape.state_itemsize
    copied = 4 * matrices * d * f * shape.state_itemsize if narrow else 0
    return (
        *phases,
        Phase("read unwritten", flops, flops / rate, hbm=moved, launches=2 * reads),
        Phase("keep", hbm=copied, launches=2 * matrices if copied else 0),
    )


def rate_of(device: Device, name: str, dtype: torch.dtype) -> float:
    """FLOP/s of a measured kind of product, or the dtype's own where that kind was not measured."""
    return device.variants.get(name) or device.peak(dtype)


def _library(shape: ScanShape, device: Device) -> str:
    """Which measured rate an apply runs at; the rule is ``cpu.gemm.apply``'s."""
    name = str(shape.dtype).removeprefix("torch.") + " apply"
    many = min(shape.chunk, shape.tokens) >= ONEDNN_MIN_ROWS
    if shape.dtype == torch.float32 and device.arch == "amd" and many and f"{name} onednn" in device.variants:
        return f"{name} onednn"
    return name
