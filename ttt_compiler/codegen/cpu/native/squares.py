"""The norm of a tensor in one pass, at the speed of reading it. May be changed here: what is called."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu import native
from ttt_compiler.spec import state_dtype

# Numbers from which on more than one thread reads them.
_MANY = 1 << 16


def norm(x: Tensor) -> float:
    """The Frobenius norm; NaN or Inf if a number is, or if the squares are beyond the state's dtype."""
    function = native.function("squares", x.dtype)
    if function is None or not x.is_contiguous():
        return float(torch.linalg.vector_norm(x, dtype=state_dtype(x.dtype)))
    count = x.numel()
    total: float = function(x.data_ptr(), count, torch.get_num_threads() if count >= _MANY else 1)
    # Sums are widened on the way: what the state's dtype cannot hold is said here.
    return math.inf if total > torch.finfo(state_dtype(x.dtype)).max else math.sqrt(total)
