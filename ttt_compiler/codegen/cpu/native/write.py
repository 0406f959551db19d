"""A write ``W += v.T @ h`` with sums in fp32 and W read and written once, whatever the operands' dtype.

Torch's product of 16-bit operands has a 16-bit result, which is then added to W in a second pass, and a third
one makes the copy that the next apply reads. In fp32 blocks of W in the private cache are faster than either
library's product. Measured on an AMD EPYC, D=1024 F=3072, C=512/256/128: fp32 102/101/96 GF/s (MKL 94/93/87,
oneDNN 99/93/83); bf16 with both passes 192/177/157 (torch 176/106/69). May be changed here: what is called.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu import native
from ttt_compiler.compat.processor import block_product, product_dtype

_ITSELF, _BASE, _ZERO = range(3)


def write(
    v: Tensor, h: Tensor, w: Tensor, base: Tensor | None, copy: Tensor | None, *, written: bool
) -> bool:
    """``w = before + v.T @ h``, if that can be done.

    Args:
        v: ``[m, D]``.
        h: ``[m, F]``.
        w: fp32 ``[D, F]``.
        base: what W is before the first write; None is zero. Of the operands' dtype.
        copy: ``[D, F]`` of the operands' dtype to fill with W, or None.
        written: whether ``w`` holds W already.

    Returns:
        Whether it was done; if not, nothing has changed.
    """
    function = _function(v.dtype)
    operands = [x for x in (v, h, w, base, copy) if x is not None]
    if (
        function is None
        or w.dtype != torch.float32
        or not all(x.dtype == v.dtype for x in operands if x is not w)
        or not all(x.is_contiguous() for x in operands)
        or v.numel() == 0
    ):
        return False
    before = _ITSELF if written else _ZERO if base is None else _BASE
    addresses = [None if x is None else x.data_ptr() for x in (v, h, w, base, copy)]
    done = function(*addresses, len(v), *w.shape, before, torch.get_num_threads())
    if not done:
        raise RuntimeError(
            f"oneDNN made a block product once and failed now, {tuple(v.shape)} {tuple(h.shape)}"
        )
    return True


def there_are_blocks(dtype: torch.dtype) -> bool:
    """Whether there is such a write for operands of ``dtype``."""
    return _function(dtype) is not None


@functools.cache
def _function(dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """The function for operands of ``dtype`` on this processor, or None; by trying it."""
    wide = product_dtype(dtype)
    function = (
        native.function("write" if wide == dtype else "widewrite", dtype) if dtype != torch.float64 else None
    )
    addresses = block_product(wide)
    if function is None or addresses is None:
        return None
    call = functools.partial(function, *addresses)
    v, h = torch.arange(6.0).view(3, 2).to(dtype), torch.ones(3, 5, dtype=dtype)
    w, copy = torch.ones(2, 5), torch.empty(2, 5, dtype=dtype)
    done = call(v.data_ptr(), h.data_ptr(), w.data_ptr(), None, copy.data_ptr(), 3, 2, 5, _ITSELF, 1)
    exact = 1 + v.float().t() @ h.float()
    return call if done and torch.equal(w, exact) and torch.equal(copy.float(), exact) else None
