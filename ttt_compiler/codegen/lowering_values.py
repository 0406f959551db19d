"""Inductor lowering of the values on CPU: an extern kernel whose result lives in planned memory.

On GPUs convolution and projection are nodes of their own, the latter an ordinary matmul, and never come here.
May be changed here: how it is lowered. Checked on torch 2.13.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.select_algorithm import ExternKernelChoice

from ttt_compiler.codegen import ops as ttt_ops  # noqa: F401  (the ops must exist)
from ttt_compiler.codegen.cpu import target_values
from ttt_compiler.codegen.target import on_cpu

_op = torch.ops.ttt.chunk_values.default
_fallback = fallback_handler(_op, add_to_fallback_set=False)


def chunk_values_out(t: Tensor, conv: Tensor, proj: Tensor, *pos: Tensor, chunk: int, out: Tensor) -> Tensor:
    """:func:`target_values.chunk_values` into ``out [B, T, D]``."""
    return target_values.chunk_values(t, conv, proj, pos[0] if pos else None, chunk, out=out)


_kernel = ExternKernelChoice(chunk_values_out, name="ttt_chunk_values")


@register_lowering(_op, type_promotion_kind=None)
def _lower_chunk_values(t: Any, conv: Any, proj: Any, pos: Any, chunk: int) -> Any:
    return on_cpu(_kernel, _fallback, (t, conv, proj, pos), chunk, width=proj.get_size()[1])
