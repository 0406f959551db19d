"""The convolution along a chunk, and the gradient of its taps: loops at the speed of reading their operands.

Five of torch's operations take seven times as long, and for the gradient eight times. May be changed here:
what is called.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu import native

MAX_TAPS = 9


def convolve(src: Tensor, taps: Tensor, out: Tensor) -> bool:
    """``out[..., i, :] = sum_k taps[k] * src[..., i + k - K//2, :]`` inside each chunk, if that can be done.

    Args:
        src: contiguous ``[..., m, Dt]``; sums are in fp32, or fp64.
        taps: ``[K, Dt]``, rounded to the dtype of the sums alone.
        out: contiguous, like ``src``.

    Returns:
        Whether it was done: there is a compiler, and the operands are such.
    """
    function = native.function("conv", src.dtype)
    rows, width = src.shape[-2:]
    if (
        function is None
        or not (src.is_contiguous() and out.is_contiguous())
        or src.dtype != out.dtype
        or len(taps) > MAX_TAPS
    ):
        return False
    if src.numel():
        taps = taps.to(torch.promote_types(src.dtype, torch.float32)).contiguous()
        function(
            *(src.data_ptr(), taps.data_ptr(), out.data_ptr()),
            *(src.numel() // (rows * width), rows, width, len(taps)),
            torch.get_num_threads(),
        )
    return True


def taps_gradient(grad: Tensor, src: Tensor, out: Tensor) -> bool:
    """``out[k] += sum_i grad[..., i, :] * src[..., i + k - K//2, :]`` inside each chunk, if that can be done.

    Args:
        grad: contiguous ``[..., m, Dt]``.
        src: contiguous, like ``grad``.
        out: fp64 ``[K, Dt]``.

    Returns:
        Whether it was done: there is a compiler, and the operands are such.
    """
    function = native.function("taps", src.dtype)
    if (
        function is None
        or not (grad.is_contiguous() and src.is_contiguous() and out.is_contiguous())
        or grad.dtype != src.dtype
        or len(out) > MAX_TAPS
    ):
        return False
    if src.numel():
        rows, width = src.shape[-2:]
        sizes = (src.numel() // (rows * width), rows, width, len(out))
        function(grad.data_ptr(), src.data_ptr(), out.data_ptr(), *sizes, torch.get_num_threads())
    return True
