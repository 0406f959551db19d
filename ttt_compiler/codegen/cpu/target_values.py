"""Values on CPU: ``v = conv(t) @ P`` of the chunks that are written, and gradients, a few chunks at a time.

What the convolution makes lies in a buffer that stays in the cache and is never as long as the text; the
gradient of P makes it once more instead of keeping it (a thousandth of a training step). A document's last
chunk is applied and never written, so its v is not computed: zeros stand there. May be changed here: how it
is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu.conv import add_taps_gradient, convolve
from ttt_compiler.codegen.cpu.gemm import FastMatrix, project
from ttt_compiler.codegen.cpu.workspaces import leased, workspace
from ttt_compiler.codegen.segments import Run, documents, row_runs
from ttt_compiler.spec import state_dtype

# Tokens of one product: as fast as all at once, and what is between convolution and product stays small.
BLOCK = 512


def chunk_values(
    t: Tensor, conv: Tensor, proj: Tensor, pos: Tensor | None, chunk: int, *, out: Tensor | None = None
) -> Tensor:
    """``conv(t) @ proj`` for tokens of chunks that are written; zeros for others.

    Args:
        t: ``[B, T, Dt]``.
        conv: ``[Dt, 1, K]``, eta folded in; see :func:`.conv.chunk_conv`.
        proj: ``[Dt, D]``.
        pos: int64 ``[B or 1, T]`` or None.
        chunk: C.
        out: contiguous ``[B, T, D]`` to fill; by default a new tensor.
    """
    t = t.contiguous()
    out = t.new_empty(*t.shape[:2], proj.shape[1]) if out is None else out
    taps, blocks = conv[:, 0].t(), _Blocks(t, pos, chunk)
    for b, rows in blocks:
        convolved = blocks.buffer(rows)
        convolve(blocks.chunks(t[b, rows]), taps, blocks.chunks(convolved))
        project(convolved, proj, out[b, rows], "project")
    blocks.zero_others(out)
    return out


def chunk_values_backward(
    dv: Tensor,
    t: Tensor,
    conv: Tensor,
    proj: Tensor,
    pos: Tensor | None,
    chunk: int,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`chunk_values` for t, conv and proj; empty where ``needed`` says no."""
    dv, t = dv.contiguous(), t.contiguous()
    dt = leased("values.dt", tuple(t.shape) if needed[0] else (0,), t.dtype)
    taps, blocks = conv[:, 0].t(), _Blocks(t, pos, chunk)
    # Centred taps and zero padding: the adjoint is the same convolution with the taps reversed.
    turned = taps.flip(0)
    dtaps = torch.zeros(taps.shape, dtype=torch.float64)
    dproj = t.new_zeros(proj.shape if needed[2] else 0, dtype=state_dtype(t.dtype))
    of_proj = FastMatrix(None, dproj, t.dtype, name="values.d")
    for b, rows in blocks:
        source = blocks.chunks(t[b, rows])
        if needed[2]:
            convolved = blocks.buffer(rows)
            convolve(source, taps, blocks.chunks(convolved))
            of_proj.write(convolved, dv[b, rows])
        if needed[0] or needed[1]:
            grad = blocks.buffer(rows)
            project(dv[b, rows], proj.t(), grad, "project")
            if needed[0]:
                convolve(blocks.chunks(grad), turned, blocks.chunks(dt[b, rows]))
            if needed[1]:
                add_taps_gradient(blocks.chunks(grad), source, dtaps)
    if needed[0]:
        blocks.zero_others(dt)
    dconv = dtaps.t()[:, None].to(conv.dtype).contiguous() if needed[1] else conv.new_empty(0)
    return dt, dconv, dproj.to(proj.dtype)


class _Blocks:
    """Tokens of chunks that are written, a few chunks at a time: (row, tokens) for each."""

    def __init__(self, t: Tensor, pos: Tensor | None, chunk: int) -> None:
        self.dtype, self.chunk = t.dtype, chunk
        batch, self.length, self.width = t.shape
        self.rows = max(1, BLOCK // chunk) * chunk
        self.places = list(self._written(row_runs(pos, batch, self.length)))
        self.batch = batch

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        return iter(self.places)

    def _written(self, rows: Sequence[list[Run]]) -> Iterator[tuple[int, slice]]:
        for b, runs in enumerate(rows):
            for doc in documents(runs):
                last = doc.start + (doc.stop - doc.start - 1) // self.chunk * self.chunk
                for start in range(doc.start, last, self.rows):
                    yield b, slice(start, min(start + self.rows, last))

    def buffer(self, rows: slice) -> Tensor:
        """``[tokens of a block, Dt]``, of undefined content: the same memory for every block."""
        most = min(self.rows, self.length)
        return workspace("values.c", (most, self.width), self.dtype)[: rows.stop - rows.start]

    def chunks(self, x: Tensor) -> Tensor:
        """``[chunks, C, X]`` of a block's ``[tokens, X]``: those that are written are whole."""
        return x.view(-1, self.chunk, x.shape[-1])

    def zero_others(self, out: Tensor) -> None:
        """Zeros in ``out [B, T, X]`` wherever no block lies."""
        done = [0] * self.batch
        for b, rows in self.places:
            out[b, done[b] : rows.start].zero_()
            done[b] = rows.stop
        for b, stop in enumerate(done):
            out[b, stop:].zero_()
