"""Products that are added to an fp32 matrix, block by block in the private cache, by oneDNN's own kernel.

A write ``W += v.T @ h`` so reads and writes W once: torch's product of 16-bit operands has a 16-bit result,
which is added to W in a second pass, and a third one makes the copy that the next apply reads. In fp32 it is
faster than either library's product where the second factor is not transposed. Measured on an AMD EPYC,
D=1024 F=3072, C=512/256/128: a write in fp32 102/101/96 GF/s (MKL 94/93/87, oneDNN 99/93/83), in bf16 with
both passes 192/177/157 (torch 176/106/69); ``x @ W`` of 512 rows 103 (MKL 84, oneDNN 98). May be changed
here: what is called.
"""

from __future__ import annotations

import functools
from typing import Any

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
        copy: ``[D, F]`` of the operands' dtype to fill with W, or as :mod:`.panels` has it, or None.
        written: whether ``w`` holds W already.

    Returns:
        Whether it was done; if not, nothing has changed.
    """
    before = _ITSELF if written else _ZERO if base is None else _BASE
    return _run(v, h, w, base, copy, len(v), before, turned=True)


def product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> bool:
    """``out = a @ b``, or ``out += a @ b``, if that can be done: all fp32.

    Args:
        a: ``[m, k]``.
        b: ``[k, n]``.
        out: ``[m, n]``.
        accumulate: whether the product is added.

    Returns:
        Whether it was done; if not, nothing has changed.
    """
    return _run(a, b, out, None, None, len(b), _ITSELF if accumulate else _ZERO, turned=False)


def there_are_blocks(dtype: torch.dtype) -> bool:
    """Whether there are such products of operands of ``dtype``."""
    return _function(dtype) is not None


def _run(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    base: Tensor | None,
    copy: Tensor | None,
    depth: int,
    before: int,
    *,
    turned: bool,
) -> bool:
    function = _function(a.dtype)
    operands = [x for x in (a, b, out, base, copy) if x is not None]
    if (
        function is None
        or out.dtype != torch.float32
        or not all(x.dtype == a.dtype for x in operands if x is not out)
        or not all(x.is_contiguous() for x in operands)
        or a.numel() == 0
        or b.numel() == 0
    ):
        return False
    addresses = [None if x is None else x.data_ptr() for x in (a, b, out, base, copy)]
    in_panels = copy is not None and copy.dim() > 2
    if not function(*addresses, depth, *out.shape, before, turned, in_panels, torch.get_num_threads()):
        raise RuntimeError(
            f"oneDNN made a block product once and failed now, {tuple(a.shape)} {tuple(b.shape)}"
        )
    return True


def _function(dtype: torch.dtype) -> Any:
    """The function for operands of ``dtype`` on this processor, or None."""
    return _tried(dtype) if native.is_used() else None


@functools.cache
def _tried(dtype: torch.dtype) -> Any:
    """It, by trying it once."""
    if dtype not in native.NAMES or dtype == torch.float64:
        return None
    wide = product_dtype(dtype)
    function = native.function("blocks" if wide == dtype else "wideblocks", dtype)
    addresses = block_product(wide)
    if function is None or addresses is None:
        return None
    call = functools.partial(function, *addresses)
    v, h = torch.arange(6.0).view(3, 2).to(dtype), torch.ones(3, 5, dtype=dtype)
    w, copy = torch.ones(2, 5), torch.empty(2, 5, dtype=dtype)
    done = call(v.data_ptr(), h.data_ptr(), w.data_ptr(), None, copy.data_ptr(), 3, 2, 5, _ITSELF, 1, 0, 1)
    exact = 1 + v.float().t() @ h.float()
    return call if done and torch.equal(w, exact) and torch.equal(copy.float(), exact) else None
