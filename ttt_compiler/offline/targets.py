"""The architectures that kernels are compiled for, and what a block may use there.

May be changed here: architectures, together with their tiles in :mod:`ttt_compiler.codegen.kernels.tiles`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One architecture.

    Attributes:
        name: key of ``tiles.SHIPPED``.
        device: a device of that architecture.
        backend: of triton, ``"cuda"`` or ``"hip"``.
        arch: what triton calls it.
        warp: threads that run together.
        shared_memory: most bytes that a block may use (CUDA C programming guide, table of compute
            capabilities, minus the 1 KiB that the system reserves; 64 KiB of LDS on CDNA3).
        matrix_units: instructions of which at least one must be in the main loop for 16-bit operands.
        processors: streaming multiprocessors or compute units.
        l2: bytes of the last level of cache.
    """

    name: str
    device: str
    backend: str
    arch: int | str
    warp: int
    shared_memory: int
    matrix_units: tuple[str, ...]
    processors: int
    l2: int

    @property
    def capability(self) -> tuple[int, int]:
        """Of CUDA."""
        assert isinstance(self.arch, int)
        return self.arch // 10, self.arch % 10


TARGETS = (
    Target("sm_80", "A100", "cuda", 80, 32, 166_912, ("mma.sync",), 108, 40 << 20),
    Target("sm_90", "H100", "cuda", 90, 32, 232_448, ("wgmma.mma_async",), 132, 50 << 20),
    Target("sm_100", "B200", "cuda", 100, 32, 232_448, ("tcgen05.mma", "mma.sync"), 148, 126 << 20),
    Target("gfx942", "MI300X", "hip", "gfx942", 64, 65_536, ("v_mfma",), 304, 256 << 20),
)


def target(name: str) -> Target:
    """The target of that name.

    Raises:
        KeyError: there is none.
    """
    return {t.name: t for t in TARGETS}[name]
