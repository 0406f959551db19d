"""Inductor lowering of the target projection on CPU: an extern kernel whose result lives in planned memory.

On GPUs it is an ordinary matmul of the graph and never comes here. May be changed here: how it is lowered.
Checked on torch 2.13.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.select_algorithm import ExternKernelChoice

from ttt_compiler.codegen import ops as ttt_ops  # noqa: F401  (the ops must exist)
from ttt_compiler.codegen.cpu import project as cpu_project
from ttt_compiler.codegen.target import on_cpu

_op = torch.ops.ttt.chunk_project.default
_fallback = fallback_handler(_op, add_to_fallback_set=False)


def chunk_project_out(c: Tensor, proj: Tensor, *pos: Tensor, chunk: int, out: Tensor) -> Tensor:
    """:func:`cpu_project.chunk_project` into ``out [B, T, D]``."""
    return cpu_project.chunk_project(c, proj, pos[0] if pos else None, chunk, out=out)


_kernel = ExternKernelChoice(chunk_project_out, name="ttt_chunk_project")


@register_lowering(_op, type_promotion_kind=None)
def _lower_chunk_project(c: Any, proj: Any, pos: Any, chunk: int) -> Any:
    return on_cpu(_kernel, _fallback, (c, proj, pos), chunk, width=proj.get_size()[1])
