"""What a training step of one site costs, forward and backward, by our scans and by the stacked form.

Our backward is three scans of the same kind: ``dh`` by the scan of ``dy`` against the transposed weight, and
in reverse order ``dv`` (whose last state is the gradient of W0) and the part of ``dh`` that comes from the
writes. Six units of 2 T D F against the static projection's two; nothing of size T/C x D x F is stored. On a
processor it is :func:`ttt_compiler.codegen.forms_cpu.training`. May be changed here: the count, together with
the backward formula in ``codegen/gradients.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ttt_compiler.codegen import forms, forms_cpu
from ttt_compiler.codegen.devices import Device
from ttt_compiler.codegen.forms import ScanShape
from ttt_compiler.codegen.phases import Phase, gemm, stream

# What runs one scan, as phases, and the bytes of workspace it needs.
Scan = Callable[[ScanShape, Device], tuple[tuple[Phase, ...], int]]


def static_step(shape: ScanShape, device: Device) -> tuple[Phase, ...]:
    """The static projection, forward and backward: three products."""
    rows, d, f = shape.batch * shape.tokens, shape.d_model, shape.d_ff
    return (
        gemm("y", device, shape.dtype, rows, d, f),
        gemm("dh", device, shape.dtype, rows, f, d),
        gemm("dW", device, shape.dtype, d, f, rows),
    )


def backward_scans(shape: ScanShape) -> tuple[ScanShape, ScanShape, ScanShape]:
    """The scans of a backward: dh through the applies, dv with the gradient of W0, dh through the writes.

    Reverse scans also run the first product with their zero state, so each counts as a whole scan.
    """
    turned = replace(shape.turned, apart=True, final=False)
    return turned, replace(shape, final=True), turned


def our_step(shape: ScanShape, device: Device, scan: Scan) -> tuple[tuple[Phase, ...], int]:
    """Our forward and backward: phases, and the largest workspace of its scans in bytes."""
    if not device.overlaps:
        state = 2 * shape.d_model * shape.d_ff * shape.state_itemsize
        return forms_cpu.training(shape, device), state
    done = [scan(part, device) for part in (replace(shape, final=False), *backward_scans(shape))]
    both = stream("dh", 3 * shape.batch * shape.tokens * shape.d_ff * shape.dtype.itemsize)
    return (*(phase for phases, _ in done for phase in phases), both), max(size for _, size in done)


def stacked_step(shape: ScanShape, device: Device) -> tuple[tuple[Phase, ...], int]:
    """The official form's forward and backward: phases, and the bytes of its stacks at the peak."""
    phases = (*forms.stacked_cumsum(shape, device), *forms.stacked_backward(shape, device))
    return phases, forms.stack_bytes(shape, training=True)


def values_step(
    shape: ScanShape, device: Device, *, d_target: int | None = None, proj: bool = True
) -> tuple[Phase, ...]:
    """``v = conv(t) P`` forward and backward: each kernel three times, for the value and two gradients."""
    forward = forms.values(shape, device, d_target=d_target, proj=proj)
    return forward + forward + forward


def saved_bytes(shape: ScanShape, device: Device, *, stacked: bool = False) -> int:
    """Bytes that a forward keeps until the backward beyond the static projection, which keeps h.

    That is v, and W of some chunks on a processor; the stacked form keeps every chunk's weight instead.
    """
    v = shape.batch * shape.tokens * shape.d_model * shape.dtype.itemsize
    if stacked:
        return v + shape.chunks * shape.matrix * shape.dtype.itemsize
    matrices = 0 if device.overlaps else forms_cpu.kept_matrices(shape)
    return v + matrices * shape.d_model * shape.d_ff * shape.state_itemsize
