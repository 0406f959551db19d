"""Launches of Triton kernels that compile instead, for a device that is not there.

Checked on triton 3.9: ``JITFunction.run(warmup=True)`` compiles for the active driver's target and returns
the result; ``device_caches`` keeps it with that target, by number of the device alone. May be changed here:
how a launch is caught.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from unittest import mock

from ttt_compiler.compat.driver import stub_driver


@contextlib.contextmanager
def compiling_launches(backend: str, arch: int | str, warp: int) -> Iterator[list[tuple[str, Any]]]:
    """A block in which launching a kernel compiles it and runs nothing: what it would write stays undefined.

    Yields:
        Name and machine code of every launch, in order; equal launches again.
    """
    from triton.runtime.jit import JITFunction

    found: list[tuple[str, Any]] = []
    caches: dict[Any, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if self not in caches:  # what other targets left would be returned for this one
            caches[self] = self.device_caches
            self.device_caches = defaultdict(self.create_binder)
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.fn.__name__, compiled))
        return compiled

    with stub_driver(backend, arch, warp), mock.patch.object(JITFunction, "run", compile_only):
        try:
            yield found
        finally:
            for kernel, before in caches.items():
                kernel.device_caches = before
