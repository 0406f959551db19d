"""Compiling Triton kernels for devices that are not there. Checked on triton 3.9.

May be changed here: how triton is asked for machine code, and how its assembler's report is read.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    divisible: Sequence[str],
    backend: str,
    arch: int | str,
    warp: int,
    options: Mapping[str, int],
) -> Any:
    """Machine code of ``kernel`` for one set of arguments.

    Args:
        kernel: a function under ``triton.jit``.
        signature: type of every argument that is not in ``constants``: ``"*bf16"``, ``"i32"``.
        constants: compile-time arguments, None for absent pointers.
        divisible: arguments that are multiples of 16, as aligned pointers and sizes are.
        backend: ``"cuda"`` or ``"hip"``.
        arch: of that backend.
        warp: threads of a warp.
        options: ``num_warps``, ``num_stages``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [p.name for p in kernel.params]
    types = {n: "constexpr" if n in constants else signature[n] for n in names}
    source = ASTSource(
        kernel,
        types,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible if n not in constants},
    )
    return triton.compile(source, target=GPUTarget(backend, arch, warp), options=dict(options))


def resources(compiled: Any) -> dict[str, int]:
    """``registers`` of a thread, bytes that are ``spilled``, bytes of ``shared`` memory of a block."""
    metadata, assembly = compiled.metadata, compiled.asm
    if metadata.target.backend == "hip":
        text = assembly["amdgcn"]
        count = {k: _number(rf"\.{k}:\s+(\d+)", text) for k in ("vgpr_count", "vgpr_spill_count")}
        return {
            "registers": count["vgpr_count"],
            "spilled": 4 * count["vgpr_spill_count"],
            "shared": int(metadata.shared),
        }
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    arch = metadata.target.arch
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(assembly["ptx"])
        file.flush()
        command = [get_ptxas(arch).path, "-v", "--regAllocOptLevel=2"]
        command += [f"--gpu-name={sm_arch_from_capability(arch)}", file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": _number(r"Used (\d+) registers", report),
        "spilled": _number(r"(\d+) bytes spill stores", report),
        "shared": int(metadata.shared),
    }


def instructions(compiled: Any, names: Sequence[str]) -> dict[str, int]:
    """How often each of ``names`` stands in the assembly."""
    text = compiled.asm["amdgcn" if compiled.metadata.target.backend == "hip" else "ptx"]
    return {name: text.count(name) for name in names}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the assembler's report has no {pattern!r}: {text[:300]}")
    return int(found[1])
