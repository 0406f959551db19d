"""One call of a running sequence on a GPU: apply, append to the chunk tail, write when a chunk is full.

The same arguments, result and effects as :mod:`ttt_compiler.codegen.cpu.step`; nothing is read on the host,
so the call can be captured into a CUDA graph and replayed at any place of any chunk. It differs in this:

- A chunk with NaN or Inf cannot raise. Its write is left out and SKIPPED grows, whatever ``on_nonfinite``
  says; ``ttt.stats`` counts it.
- A factored row that meets a call of several tokens becomes a matrix, ``W0 + V^T H``, and stays one.
- Which slot or lane a row takes, when it shares one, may differ: rows are served at once, not in order.
- v of chunks that wait (R > 0) is not kept by calls of several tokens: CACHED is 0 after them.
- With an all-zero convolution nothing is written, but products with W0 are computed by our kernels: equal to
  the base model up to the order of sums, not bit for bit. With ``lr = 0`` they are the base model's own.
- Tables of more than 128 rows are served by the path of several tokens, whatever T is.
- W is kept in fp32 and rounded to the operands' dtype where it is applied, in every path.

May be changed here: what is refused, and which path serves a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen.gpu.decode import decode_step
from ttt_compiler.codegen.gpu.sequence import sequence_step
from ttt_compiler.codegen.kernels.decode_plan import MOST_ROWS
from ttt_compiler.codegen.layout import StateTensors
from ttt_compiler.errors import UnsupportedDeviceError
from ttt_compiler.spec import SiteSpec

OPERANDS = (torch.float32, torch.bfloat16, torch.float16)


def fast_weight_step(
    h: Tensor,
    t: Tensor,
    w0: Tensor,
    bias: Tensor | None,
    conv: Tensor,
    proj: Tensor | None,
    pos: Tensor | None,
    spec: SiteSpec,
    state: StateTensors,
    batch: Tensor,
) -> Tensor:
    """Advance every sequence of the batch by T tokens; the tensors of ``state`` change in place.

    Args:
        h: ``[B, T, F]``.
        t: ``[B, T, Dt]`` target source.
        w0: ``[D, F]``; bias ``[D]`` or None; conv ``[Dt, 1, K]``; proj ``[Dt, D]`` or None.
        bias: see w0.
        conv: see w0.
        proj: see w0.
        pos: int64 ``[B or 1, T]`` or None; 0 resets the row, a negative position is padding.
        spec: the site's constants.
        state: tables of L >= B rows.
        batch: int64 ``[B]``: which row of the tables is sequence b; no row twice.

    Returns:
        ``y [B, T, D]``.

    Raises:
        UnsupportedDeviceError: the operands' dtype has no kernels, or the device no schedule.
    """
    if h.dtype not in OPERANDS or state.w.dtype != torch.float32:
        raise UnsupportedDeviceError(
            f"{spec.key} runs in {h.dtype} with a state in {state.w.dtype}: on {h.device.type} there are "
            "kernels for float32, bfloat16 and float16 with a state in float32. Type model.to(torch.bfloat16)"
        )
    if t.dtype != h.dtype:
        raise UnsupportedDeviceError(
            f"{spec.key}: hidden rows are {h.dtype}, target rows {t.dtype}. Kernels take one dtype: convert t"
        )
    if h.numel() == 0:
        return h.new_empty(h.shape[0], h.shape[1], w0.shape[0])
    run = decode_step if h.shape[1] == 1 and len(state.rows) <= MOST_ROWS else sequence_step
    bias = None if bias is None else bias.contiguous()
    return run(h.contiguous(), t.contiguous(), w0, bias, conv, proj, pos, spec, state, batch.contiguous())
