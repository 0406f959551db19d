"""The chunk scan on GPUs, launched op by op; compiled graphs use ``lowering_gpu.py``.

May be changed here: how the scans are put together, together with that file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen.choose import gradient_form, scan_plan
from ttt_compiler.codegen.forms import ScanShape
from ttt_compiler.codegen.gpu.library import chunk_scan_backward_library
from ttt_compiler.codegen.kernels.chunk_scan import Carried, chunk_scan_partial
from ttt_compiler.codegen.kernels.chunk_table import chunk_table, require_whole_documents, skip_nonfinite
from ttt_compiler.codegen.kernels.tiles import DECAY, GRADIENT, SCAN, Tile
from ttt_compiler.compat.processor import tf32_allowed


def chunk_scan(
    h: Tensor,
    v: Tensor,
    w0: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    chunk: int,
    decay: float = 1.0,
    on_nonfinite: str = "raise",
) -> Tensor:
    """See :func:`ttt_compiler.codegen.cpu.scan.chunk_scan`; nothing is raised for NaN, it spreads."""
    h, v = h.contiguous(), v.contiguous()
    table = _chunks(pos, chunk, v, h, on_nonfinite)
    tile, groups = _schedule(h, v, chunk, SCAN if decay == 1.0 else DECAY)
    y = chunk_scan_partial(
        h, h, v, w0, table, chunk, tile, groups, decay=decay, precision=precision(h.dtype)
    ).sum(0)
    return (y if bias is None else y + bias).to(h.dtype)


def chunk_scan_backward(
    dy: Tensor,
    h: Tensor,
    v: Tensor,
    w0: Tensor,
    pos: Tensor | None,
    chunk: int,
    decay: float = 1.0,
    on_nonfinite: str = "raise",
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`ttt_compiler.codegen.cpu.scan.chunk_scan_backward`."""
    dy, h, v = dy.contiguous(), h.contiguous(), v.contiguous()
    if pos is None and on_nonfinite == "raise" and gradient_form(h.device, _shape(h, v, chunk)) == "library":
        return chunk_scan_backward_library(dy, h, v, w0, chunk, decay)
    table = _chunks(pos, chunk, v, h, on_nonfinite)
    exact = precision(h.dtype)

    def scan(q: Tensor, k: Tensor, v: Tensor, base: Tensor | None, final: Carried | None = None) -> Tensor:
        tile, groups = _schedule(q, v, chunk, GRADIENT if decay == 1.0 else DECAY)
        back = base is None
        return chunk_scan_partial(
            q, k, v, base, table, chunk, tile, groups, decay=decay, reverse=back, final=final, precision=exact
        ).sum(0)

    dh = scan(dy, v, h, w0.t()) + scan(v, dy, h, None)
    final = None
    if table is None and decay == 1.0:
        states = torch.empty(h.shape[0], *w0.shape, dtype=torch.float32, device=h.device)
        final = Carried(states, torch.arange(h.shape[0], dtype=torch.int32, device=h.device))
    dv = scan(h, h, dy, None, final)
    # With several documents or decay the last state is not the sum over all chunks.
    dw0 = final.states.sum(0) if final is not None else dy.flatten(0, 1).t() @ h.flatten(0, 1)
    return dh.to(h.dtype), dv.to(v.dtype), dw0.to(w0.dtype)


def precision(dtype: torch.dtype) -> str:
    """Of products of operands of ``dtype``: what the user chose for torch's own."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"


def _schedule(q: Tensor, v: Tensor, chunk: int, use: str) -> tuple[Tile, int]:
    plan = scan_plan(q.device, use, _shape(q, v, chunk), only_kernel=True)
    return plan.tiles[0], plan.groups


def _shape(q: Tensor, v: Tensor, chunk: int) -> ScanShape:
    batch, length, inner = q.shape
    return ScanShape(max(length, 1), v.shape[-1], inner, chunk, max(batch, 1), q.dtype)


def _chunks(pos: Tensor | None, chunk: int, v: Tensor, h: Tensor, on_nonfinite: str) -> Tensor | None:
    table = None
    if pos is not None:
        require_whole_documents(pos)
        table = chunk_table(pos, chunk)
    return table if on_nonfinite == "raise" else skip_nonfinite(table, v, h, chunk)
