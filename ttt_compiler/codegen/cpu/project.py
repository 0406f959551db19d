"""The target projection on CPU: ``v = c @ P`` of the chunks that are written, by the faster library.

A document's last chunk is applied and never written, so its v is not computed: zeros stand there. May be
changed here: how it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ttt_compiler.codegen.cpu.gemm import FastMatrix, project, workspace
from ttt_compiler.codegen.segments import documents, row_runs
from ttt_compiler.spec import state_dtype

# Tokens of one product: as fast as all at once, and what is widened for it stays small.
_ROWS = 512


def chunk_project(
    c: Tensor, proj: Tensor, pos: Tensor | None, chunk: int, *, out: Tensor | None = None
) -> Tensor:
    """``c @ proj`` for tokens of chunks that are written; zeros for others.

    Args:
        c: ``[B, T, Dt]``.
        proj: ``[Dt, D]``.
        pos: int64 ``[B or 1, T]`` or None.
        chunk: C.
        out: contiguous ``[B, T, D]`` to fill; by default a new tensor.
    """
    c = c.contiguous()
    batch, length, _ = c.shape
    out = c.new_empty(batch, length, proj.shape[1]) if out is None else out
    done = [0] * batch
    for b, rows in _written(pos, batch, length, chunk):
        out[b, done[b] : rows.start].zero_()
        project(c[b, rows], proj, out[b, rows], "project")
        done[b] = rows.stop
    for b, stop in enumerate(done):
        out[b, stop:].zero_()
    return out


def chunk_project_dweight(dv: Tensor, c: Tensor, pos: Tensor | None, chunk: int) -> Tensor:
    """Gradient of :func:`chunk_project` for ``proj``: ``[Dt, D]``."""
    dv, c = dv.contiguous(), c.contiguous()
    shape = (c.shape[2], dv.shape[2])
    total = FastMatrix(None, workspace("project.d", shape, state_dtype(c.dtype)), c.dtype, name="project.d")
    for b, rows in _written(pos, len(c), c.shape[1], chunk):
        total.write(c[b, rows], dv[b, rows])
    if total.is_zero:
        return c.new_zeros(shape)
    return total.master.to(c.dtype, copy=True)


def _written(pos: Tensor | None, batch: int, length: int, chunk: int) -> Iterator[tuple[int, slice]]:
    """Tokens of chunks that are written, a few chunks at a time: (row, tokens)."""
    step = max(1, _ROWS // chunk) * chunk
    for b, runs in enumerate(row_runs(pos, batch, length)):
        for doc in documents(runs):
            last = doc.start + (doc.stop - doc.start - 1) // chunk * chunk
            for start in range(doc.start, last, step):
                yield b, slice(start, min(start + step, last))
