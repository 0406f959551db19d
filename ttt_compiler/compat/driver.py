"""A Triton driver without a device. Checked on triton 3.9.

May be changed here: what triton and Inductor ask a driver for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def stub_driver(backend: str, arch: int | str, warp: int) -> Iterator[None]:
    """Triton compiles for ``arch`` and believes that such a device is there; nothing can be launched."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.driver import driver

    class StubDriver(DriverBase):  # type: ignore[misc]
        utils = None

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            from triton.backends.nvidia.driver import ty_to_cpp

            name: str = ty_to_cpp(ty)
            return name

        def get_current_target(self) -> Any:
            return GPUTarget(backend, arch, warp)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            def bench(fn: Any, quantiles: Any = None, **_: Any) -> Any:
                fn()
                return [1.0] * len(quantiles) if quantiles else 1.0

            return bench

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            pass

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_device_interface(self) -> Any:
            return torch.cpu

    before = driver._active
    driver.set_active(StubDriver())
    try:
        yield
    finally:
        driver._active = before
