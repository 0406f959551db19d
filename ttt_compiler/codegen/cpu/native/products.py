"""Products by the oneDNN that torch holds, into memory that is there, in fp32 too, where torch calls MKL.

May be changed here: what is called. Whether it is faster is :mod:`ttt_compiler.codegen.cpu.gemm`'s rule.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu import native
from ttt_compiler.compat.processor import onednn_product, tensor_in_cpp

_DTYPES = (torch.float32, torch.bfloat16)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> bool:
    """``out = a @ b``, or ``out += a @ b``, if that can be done; fp32 sums.

    Args:
        a: ``[m, k]``, transposed or not.
        b: ``[k, n]``, transposed or not.
        out: ``[m, n]`` with rows in one piece.

    Returns:
        Whether it was done; if not, nothing has changed.
    """
    if not (
        a.dtype == b.dtype == out.dtype
        and 0 not in (*a.shape, *b.shape)
        and native.is_used()
        and _there(a.dtype)
    ):
        return False
    if out.stride(1) != 1 or not all(1 in x.stride() and 0 not in x.stride() for x in (a, b)):
        return False
    return _multiply(a, b, out, accumulate)


def _multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> bool:
    found = native.library()
    assert found is not None
    taken = found.multiply(onednn_product(), *map(tensor_in_cpp, (a, b, out)), float(accumulate))
    return bool(taken)


@functools.cache
def _there(dtype: torch.dtype) -> bool:
    """Whether this processor's oneDNN takes such a product, by trying one."""
    if dtype not in _DTYPES or native.library() is None or onednn_product() is None:
        return False
    a, b = torch.arange(32.0).view(8, 4).to(dtype), torch.ones(3, 4, dtype=dtype)
    out = torch.ones(8, 3, dtype=dtype)
    return _multiply(a, b.t(), out, True) and torch.equal(out, a @ b.t() + 1)
