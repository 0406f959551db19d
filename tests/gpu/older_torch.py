"""The package on torch 2.11, which it does not support, for devices where there is no other torch.

    python -m tests.gpu.older_torch bench.gpu --rounds 5

What differs from 2.13 and is used here: the templates' choice has one result, a template cannot forbid what
is fused behind it, graph passes come alone and not in a list, C++ loads with other flags. Nothing of the
package is changed on disk; ``tests/gpu`` calls :func:`install` by itself. Not for use: caches of compiled
graphs are off, and only what the tests on the device and ``bench.gpu`` run was looked at.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import torch


def needed() -> bool:
    """Whether the installed torch is older than the package wants."""
    return tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 13)


def install() -> None:
    """Mend what differs, once, before anything is compiled."""
    from torch._inductor import config
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.scheduler import Scheduler

    from ttt_compiler import compat
    from ttt_compiler.backend import inplace_ttt, inplace_ttt_eager
    from ttt_compiler.codegen.templates import chunk_scan

    if getattr(compat, "_older_torch", False):
        return
    for backend in (inplace_ttt, inplace_ttt_eager):
        # Elsewhere by the entry points of the installed package; here it is a folder on the path.
        if backend.__name__ not in torch._dynamo.list_backends(exclude_tags=()):
            torch._dynamo.register_backend(backend)
    load, can_fuse, select = CppCodeCache.load, Scheduler.can_fuse, chunk_scan.autotune_select_algorithm

    def inductor_compile(gm: Any, inputs: Any, *, mode: str | None, uuid: str) -> Any:
        patches = {} if mode in (None, "default") else dict(torch._inductor.list_mode_options(mode))
        return compile_fx(gm, list(inputs), config_patches=patches)

    def without_new_flags(*args: Any, needs_vec_isa: bool = True, **kwargs: Any) -> Any:
        return load(*args, **kwargs)

    def one_and_nothing(*args: Any, **kwargs: Any) -> Any:
        return select(*args, return_multi_template=False, **kwargs), None

    def obeying(self: Any, first: Any, second: Any, *args: Any, **kwargs: Any) -> bool:
        if first.is_template() and not second.is_template():
            template = first.get_template_node()
            if getattr(template, "allow_epilogue_fusion", None) is False:
                return False
        return bool(can_fuse(self, first, second, *args, **kwargs))

    config.force_disable_caches = True
    compat.inductor_compile = inductor_compile
    CppCodeCache.load = without_new_flags
    chunk_scan.autotune_select_algorithm = one_and_nothing
    Scheduler.can_fuse = obeying
    compat._older_torch = True


def main() -> None:
    if needed():
        install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
