"""What products cost on this machine and which library makes them, and the compiler that is on it.

Each entry names the version it was checked on; ``tests/test_compat.py`` fails loudly when one moves. May be
changed here: the bodies, for a new torch. Checked on torch 2.13.0.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_VECTORIZE = ("-ftree-loop-vectorize", "-ffp-contract=fast")


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype this processor makes products of many rows: fp32 where it has no unit for ``dtype``.

    Checked on 2.13: oneDNN calls bf16 supported on any AVX-512 processor, where its products then take five
    times those of fp32; of fp16 it says no, and such products take ten times as long.
    """
    if dtype not in (torch.bfloat16, torch.float16) or platform.machine().lower() not in ("x86_64", "amd64"):
        return dtype
    cpu = torch.cpu
    if dtype == torch.bfloat16:
        there = cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported()
    else:
        there = cpu._is_amx_fp16_supported() or torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype if there else torch.float32


@functools.cache
def onednn_product() -> int | None:
    """Address of ``at::native::mkldnn_matmul(a, b, out, beta, alpha)``, None where torch has none.

    It takes fp32 too, for which ``torch.mm`` calls MKL. Checked on 2.13: arguments are two-dimensional, of
    one dtype, with unit stride in one of both axes; it throws for what it does not take.
    """
    return _symbol("_ZN2at6native13mkldnn_matmulERKNS_6TensorES3_S3_ff")


@functools.cache
def block_product(dtype: torch.dtype) -> tuple[int, int] | None:
    """Addresses of ``at::native::cpublas::brgemm`` for operands of ``dtype``, and of what ends its use.

    ``C [m, n] (+)= A [m, k] B [k, n]`` with fp32 C, by oneDNN's kernel for a block in the cache; of bf16, B
    holds pairs of rows side by side. Checked on 2.13: it throws where the processor cannot.
    """
    operand = {torch.float32: "PKfS3_Pf", torch.bfloat16: "PKN3c108BFloat16ES5_Pf"}.get(dtype)
    if operand is None or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    found = _symbol(f"_ZN2at6native7cpublas6brgemmEllllllb{operand}b")
    release = _symbol("_ZN2at6native7cpublas14brgemm_releaseEb")
    return None if found is None or release is None else (found, release)


def _symbol(name: str) -> int | None:
    """Address of an exported function of torch's library of CPU operations; None where it is not exported."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists():
        return None
    try:
        return ctypes.cast(getattr(ctypes.CDLL(str(library)), name), ctypes.c_void_p).value
    except AttributeError:
        return None


def tensor_in_cpp(x: Tensor) -> int:
    """Address of the ``TensorImpl`` of ``x``, for a C++ function that takes a tensor.

    Checked on 2.13: ``Tensor._cdata``.
    """
    return int(x._cdata)


def tf32_allowed() -> bool:
    """Whether fp32 products may be TF32 on CUDA, whichever of torch's two settings said so.

    Checked on 2.13: the new setting follows the legacy one, which cannot be read once the new one was set.
    """
    chosen: str = torch.backends.cuda.matmul.fp32_precision
    return (getattr(torch.backends, "fp32_precision") if chosen == "none" else chosen) == "tf32"  # noqa: B009


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor will call, None when it finds none.

    Checked on 2.13: ``get_cpp_compiler`` reads ``CXX`` and raises ``InvalidCxxCompiler``.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        found: str = get_cpp_compiler()
    except InvalidCxxCompiler:
        return None
    return found


def build_cpp(source: str, *flags: str, what: str = "the C++ loops") -> Any:
    """A library of ``extern "C"`` functions, cached beside Inductor's own.

    None without a compiler, and with a warning if what is there cannot compile or load it. Checked on 2.13:
    ``CppCodeCache.load`` takes flags that come after its own, which forbid vectorization.
    """
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError

    if cpp_compiler() is None:
        return None
    try:
        return CppCodeCache.load(source, needs_vec_isa=True, extra_flags=(*_VECTORIZE, *flags))
    except (CppCompileError, OSError) as e:
        reason = next((line for line in str(e).splitlines() if "error" in line.lower()), type(e).__name__)
        warnings.warn(
            f"{cpp_compiler()} cannot build {what}, so torch's slower operations are used: {reason}. "
            "Type ttt-compiler doctor for the compiler, and set CXX to another one, such as g++ 12",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def begin_cpp(source: str, *flags: str) -> None:
    """Compile meanwhile what :func:`build_cpp` will load with the same arguments, which says what goes wrong.

    Checked on 2.13: ``CppCodeCache.load_async`` gives its work to ``submit_fn`` and, when the library is
    asked for, waits for ``result()`` and does what is left to do.
    """
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError

    if cpp_compiler() is None:
        return
    with contextlib.suppress(CppCompileError, OSError):
        flags = (*_VECTORIZE, *flags)
        CppCodeCache.load_async(source, needs_vec_isa=True, extra_flags=flags, submit_fn=_InThread)


class _InThread:
    """Work in a thread that the process waits for: a compiler that is left behind writes half a library."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work, self._process = work, os.getpid()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        # Who asks for the library does the same again, and is told.
        with contextlib.suppress(Exception):
            self._work()

    def result(self) -> None:
        """Wait; a fork has no threads of its parent's, and does the work itself."""
        if os.getpid() == self._process:
            self._thread.join()
