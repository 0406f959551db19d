"""What Triton's interpreter lacks to run Inductor's kernels on CPU tensors.

Checked on triton 3.9, torch 2.13. May be changed here: repairs, when a release makes them needless
(``tests/test_compat_gpu.py`` says so).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from ttt_compiler.compat.driver import stub_driver

# libdevice's names where they differ from numpy's.
_NUMPY = {"pow": "power", "nearbyint": "rint", "asin": "arcsin", "acos": "arccos", "atan": "arctan"}
_NUMPY |= {"atan2": "arctan2", "asinh": "arcsinh", "acosh": "arccosh", "atanh": "arctanh"}


def mend_bfloat16() -> None:
    """Products of bfloat16, and roundings to it.

    The interpreter keeps bfloat16 as bit patterns: ``dot`` multiplies those, and a cast truncates.
    """
    import triton.language as tl
    from triton.runtime import interpreter as it

    builder = it.InterpreterBuilder
    if getattr(builder, "_ttt_mended", False):
        return
    dot, cast, convert = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        def exact(x: Any) -> Any:
            bf16 = x.dtype.scalar == tl.bfloat16
            return it.TensorHandle(_widened(x.data), tl.float32) if bf16 else x

        return dot(self, exact(a), exact(b), d, precision, imprecise)

    def between(x: Any, to: Any, otherwise: Callable[[], Any]) -> Any:
        source, target = x.dtype.scalar, to.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return it.TensorHandle(_widened(x.data), target)
        if source == tl.float32 and target == tl.bfloat16:
            return it.TensorHandle(_narrowed(x.data), target)
        return otherwise()

    builder.create_dot = create_dot
    builder.cast_impl = lambda self, x, to: between(x, to, lambda: cast(self, x, to))
    builder.create_fp_to_fp = lambda self, x, to, mode: between(x, to, lambda: convert(self, x, to, mode))
    builder._ttt_mended = True


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Inductor's Triton backend for CPU tensors, with a driver that is none."""
    from torch._inductor import config
    from torch._inductor.runtime import triton_compat, triton_helpers
    from torch.utils import _triton

    memoised = (_triton.triton_backend, _triton.triton_hash_with_backend)
    shim = _Libdevice()
    with contextlib.ExitStack() as stack:
        stack.enter_context(stub_driver("cuda", 90, 32))
        for f in memoised:
            f.cache_clear()
            stack.callback(f.cache_clear)
        stack.enter_context(config.patch(cpu_backend="triton"))
        for module in (triton_helpers, triton_compat):
            stack.enter_context(mock.patch.object(module, "libdevice", shim))
        yield


class _Libdevice:
    """``libdevice`` by numpy: the interpreter has its functions without bodies."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "rsqrt":
            return _elementwise(lambda x: 1 / np.sqrt(x))
        if name == "erf":
            return _elementwise(np.vectorize(math.erf))
        f = getattr(np, _NUMPY.get(name, name), None)
        if f is None:
            raise AttributeError(f"libdevice.{name} has no counterpart for the interpreter; add it here")
        return _elementwise(f)


def _elementwise(f: Callable[..., Any]) -> Callable[..., Any]:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def call(*given: Any, _semantic: Any = None) -> Any:
        xs = [x if isinstance(x, tl.tensor) else tl.core.to_tensor(x) for x in given]
        with np.errstate(all="ignore"):
            out = f(*(x.handle.data for x in xs))
        scalar = tl.int1 if out.dtype == np.bool_ else xs[0].type.scalar
        if scalar is not tl.int1:
            out = out.astype(xs[0].handle.data.dtype)
        kind = xs[0].type.with_element_ty(scalar) if xs[0].type.is_block() else scalar
        return tl.core.tensor(TensorHandle(out, scalar), kind)

    return call


def _widened(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrowed(x: Any) -> Any:
    """Bit patterns of fp32 rounded to the nearest even bfloat16."""
    wide = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    return wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
