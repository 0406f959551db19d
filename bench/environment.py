"""Everything that a figure depends on, beside the code: recorded with each of them.

python -m bench.environment python -m pytest bench/suite     # any command, with the tuned allocator

May be changed here: what is recorded.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ttt_compiler.codegen.cpu import native
from ttt_compiler.codegen.cpu.native.blocks import there_are_blocks
from ttt_compiler.codegen.cpu.native.products import multiply
from ttt_compiler.compat.processor import cpp_compiler, product_dtype

# glibc: keep large blocks instead of giving them back, so that fresh tensors cost no page faults.
TUNED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
_PACKAGES = ("torch", "triton", "transformers", "numpy")


def environment() -> dict[str, Any]:
    """Processor, threads, allocator, versions, which code was measured on it, commit and time."""
    commit = _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    dirty = _output("git", "-C", str(Path(__file__).parent), "status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": cpu_name(),
        "isa": [x for x in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if x in cpu_flags()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "allocator": "tuned" if tuned_allocator() else "default",
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        **fast_paths(),
        "commit": commit + ("+changes" if dirty else ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def fast_paths() -> dict[str, Any]:
    """What a layer is made of here: without a compiler or torch's own products it is right, and slow."""
    dtypes = (torch.float32, torch.bfloat16)
    return {
        "compiler": _compiler(),
        "C++ loops": native.is_used() and native.library() is not None,
        "products by oneDNN": [_name(dtype) for dtype in dtypes if _onednn_takes(dtype)],
        "products of blocks": [_name(dtype) for dtype in dtypes if there_are_blocks(dtype)],
        "products of bfloat16": f"in {_name(product_dtype(torch.bfloat16))}",
    }


def _onednn_takes(dtype: torch.dtype) -> bool:
    """By a product that is as small as it can be."""
    return multiply(*(torch.ones(2, 2, dtype=dtype) for _ in range(3)))


def _compiler() -> str | None:
    """Name and version, by its own words."""
    command = cpp_compiler()
    return None if command is None else next(iter(_output(command, "--version").splitlines()), command)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tuned_allocator() -> bool:
    """Whether this process was started with :data:`TUNED_ALLOCATOR`."""
    return all(os.environ.get(name) == value for name, value in TUNED_ALLOCATOR.items())


def cpu_name() -> str:
    """The processor by its own name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Instruction sets, as the kernel names them; empty where it does not."""
    return set(_cpuinfo("flags").split())


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((x.partition(":")[2].strip() for x in lines if x.partition(":")[0].strip() == key), "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    command = sys.argv[1:] or ["env"]
    os.execvpe(command[0], command, os.environ | TUNED_ALLOCATOR)


if __name__ == "__main__":
    main()
