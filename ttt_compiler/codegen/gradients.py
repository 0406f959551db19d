"""Autograd formulas of the stateless fast-weight ops; :mod:`ttt_compiler.codegen.ops` registers them.

Each backward is made of ops again, so that a compiler sees through it. May be changed here: a formula,
together with the op's schema.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    t, conv, pos, chunk = inputs
    ctx.save_for_backward(t, conv, pos)
    ctx.chunk = chunk


def _conv_backward(ctx: Any, dv: Tensor) -> tuple[Any, ...]:
    t, conv, pos = ctx.saved_tensors
    # Centred taps and zero padding: the adjoint is the same convolution with the taps reversed.
    dt = torch.ops.ttt.chunk_conv(dv, conv.flip(-1), pos, ctx.chunk) if ctx.needs_input_grad[0] else None
    dw = None
    if ctx.needs_input_grad[1]:
        dw = torch.ops.ttt.chunk_conv_dweight(dv, t, pos, ctx.chunk, conv.shape[-1])
    return dt, dw, None, None


def _project_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *saved, ctx.chunk = inputs
    ctx.save_for_backward(*saved)


def _project_backward(ctx: Any, dv: Tensor) -> tuple[Any, ...]:
    c, proj, pos = ctx.saved_tensors
    dc = torch.ops.ttt.chunk_project(dv, proj.t(), pos, ctx.chunk) if ctx.needs_input_grad[0] else None
    dp = torch.ops.ttt.chunk_project_dweight(dv, c, pos, ctx.chunk) if ctx.needs_input_grad[1] else None
    return dc, dp, None, None


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, v, w0, bias, pos, *ctx.constants = inputs
    ctx.save_for_backward(h, v, w0, pos)
    ctx.has_bias = bias is not None


def _scan_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return _scan_gradients(ctx, dy, *ctx.saved_tensors)


def _scan_keeping_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    h, v, w0, bias, pos, *ctx.constants = inputs
    ctx.save_for_backward(h, v, w0, pos, output[1])
    ctx.has_bias = bias is not None
    # Nobody differentiates what is kept: zeros of its size are not made for it.
    ctx.set_materialize_grads(False)


def _scan_keeping_backward(ctx: Any, dy: Tensor | None, _: object) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * (5 + len(ctx.constants))
    return _scan_gradients(ctx, dy, *ctx.saved_tensors)


def _scan_gradients(
    ctx: Any, dy: Tensor, h: Tensor, v: Tensor, w0: Tensor, pos: Tensor | None, *kept: Tensor
) -> tuple[Any, ...]:
    dh, dv, dw0 = torch.ops.ttt.chunk_scan_backward(dy, h, v, w0, pos, *ctx.constants, *kept)
    bias = dy.sum(dim=(0, 1)) if ctx.has_bias else None
    return dh, dv, dw0, bias, None, *(None for _ in ctx.constants)


def _limit_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, h, limit, pos, *ctx.constants = inputs
    ctx.save_for_backward(v, h, limit, pos)


def _limit_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dv, dh, dlimit = torch.ops.ttt.limit_writes_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return dv, dh, dlimit if ctx.needs_input_grad[2] else None, None, None, None


# Backward and setup of each op.
FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "chunk_conv": (_conv_backward, _conv_setup),
    "chunk_project": (_project_backward, _project_setup),
    "limit_writes": (_limit_backward, _limit_setup),
    "chunk_scan": (_scan_backward, _scan_setup),
    "chunk_scan_keeping": (_scan_keeping_backward, _scan_keeping_setup),
}
