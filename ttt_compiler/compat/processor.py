"""What products cost on this machine and which library makes them, and the compiler that is on it.

Each entry names the version it was checked on; ``tests/test_compat.py`` fails loudly when one moves. May be
changed here: the bodies, for a new torch. Checked on torch 2.13.0.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
from torch import Tensor


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


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` by oneDNN. x ``[m, F]``, weight ``[D, F]``, both contiguous. Checked on
    2.13."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


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


def build_cpp(source: str) -> Any:
    """A library of ``extern "C"`` functions, cached beside Inductor's own; None without a compiler.

    Checked on 2.13: ``CppCodeCache.load`` takes flags that come after its own, which forbid vectorization.
    """
    from torch._inductor.codecache import CppCodeCache

    if cpp_compiler() is None:
        return None
    flags = ("-ftree-loop-vectorize", "-ffp-contract=fast")
    return CppCodeCache.load(source, needs_vec_isa=True, extra_flags=flags)
