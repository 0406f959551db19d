"""A few rows times a matrix, turned: reading the matrix is what it costs.

Measured for 8 rows and a matrix of 1024 x 1024 that is not in the cache: half of the time of oneDNN and MKL,
which pack the matrix first. May be changed here: what is called.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu import native

# Elements of a matrix from which on more than one thread reads it.
_MANY = 1 << 16


def project_turned(x: Tensor, p: Tensor, out: Tensor) -> bool:
    """``out = (x @ p).T``, if that can be done; sums in fp32, or fp64.

    Args:
        x: contiguous ``[m, K]``.
        p: contiguous ``[K, N]``.
        out: ``[N, m]`` with rows in one piece.

    Returns:
        Whether it was done: there is a compiler, and the operands are such.
    """
    function = native.function("few_rows", x.dtype)
    if (
        function is None
        or not x.dtype == p.dtype == out.dtype
        or not (x.is_contiguous() and p.is_contiguous())
        or out.stride(1) != 1
    ):
        return False
    threads = torch.get_num_threads() if p.numel() >= _MANY else 1
    function(x.data_ptr(), p.data_ptr(), out.data_ptr(), len(x), *p.shape, out.stride(0), threads)
    return True
