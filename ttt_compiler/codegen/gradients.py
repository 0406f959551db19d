"""Autograd formulas of the stateless fast-weight ops; :mod:`ttt_compiler.codegen.ops` registers them.

Each backward is made of ops again, so that a compiler sees through it. May be changed here: a formula,
together with the op's schema.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ttt_compiler.compat import below_autograd
from ttt_compiler.stand_in import runs_on_cpu


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


def _values_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *saved, ctx.chunk = inputs
    ctx.save_for_backward(*saved)


def _values_backward(ctx: Any, dv: Tensor) -> tuple[Any, ...]:
    needed = list(ctx.needs_input_grad[:3])
    grads = torch.ops.ttt.chunk_values_backward(dv, *ctx.saved_tensors, ctx.chunk, needed)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None


class _RecordedScan(torch.autograd.Function):
    """A scan that a backward follows; on CPU it keeps what that would compute again."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, v: Tensor, w0: Tensor, bias: Tensor | None, pos: Tensor | None, *constants: Any
    ) -> Tensor:
        given, kept = (h, v, w0, bias, pos, *constants), None
        with below_autograd():
            if runs_on_cpu(h.device):
                y, kept = torch.ops.ttt.chunk_scan_keeping(*given)
            else:
                y = torch.ops.ttt.chunk_scan(*given)
        ctx.save_for_backward(h, v, w0, pos, kept)
        ctx.has_bias, ctx.constants = bias is not None, constants
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        h, v, w0, pos, kept = ctx.saved_tensors
        given: tuple[Any, ...] = ctx.constants
        if kept is not None:
            given = (*given, *_DEFAULTS[len(given) :], kept)
        dh, dv, dw0 = torch.ops.ttt.chunk_scan_backward(dy, h, v, w0, pos, *given)
        bias = dy.sum(dim=(0, 1)) if ctx.has_bias else None
        return dh, dv, dw0, bias, None, *(None for _ in ctx.constants)


# Of chunk, decay and on_nonfinite, the last of which a call may leave out.
_DEFAULTS = (None, 1.0, "raise")


def chunk_scan(*args: Any) -> Any:
    """``ttt::chunk_scan`` where autograd may record it."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return _RecordedScan.apply(*args)  # type: ignore[no-untyped-call]
    with below_autograd():
        return torch.ops.ttt.chunk_scan(*args)


def _limit_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, h, limit, pos, *ctx.constants = inputs
    ctx.save_for_backward(v, h, limit, pos)


def _limit_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dv, dh, dlimit = torch.ops.ttt.limit_writes_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return dv, dh, dlimit if ctx.needs_input_grad[2] else None, None, None, None


# Backward and setup of each of the others.
FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "chunk_conv": (_conv_backward, _conv_setup),
    "chunk_values": (_values_backward, _values_setup),
    "limit_writes": (_limit_backward, _limit_setup),
}
