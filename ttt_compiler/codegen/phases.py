"""From FLOPs, bytes and launches to seconds and the limit that binds.

A form of an algorithm is a list of phases, one per kernel (or per group of equal kernels that follow each
other). On a GPU a phase takes as long as the slowest of arithmetic, memory and shared cache; on a processor
core those add up. Phases add up. May be changed here: the machine model; what a form does belongs to
:mod:`ttt_compiler.codegen.forms`, the devices to :mod:`ttt_compiler.codegen.devices`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ttt_compiler.codegen.devices import Device

LIMITS = ("compute", "hbm", "l2", "launch", "host")

# Tiles of the output that a vendor's GEMM chooses from, and the part of its best rate that each reaches:
# a smaller tile reads each operand more often. Assumed; the order is what public profiles show.
GEMM_TILES = (
    (256, 128, 1.0),
    (128, 256, 1.0),
    (128, 128, 0.92),
    (128, 64, 0.75),
    (64, 128, 0.75),
    (64, 64, 0.6),
)


@dataclass(frozen=True)
class Phase:
    """One kernel, or equal kernels in a row.

    Attributes:
        name: what it computes.
        flops: useful FLOPs, a multiplication and an addition being two.
        seconds: of arithmetic, with everything that keeps the matrix units from their peak.
        hbm: bytes between memory and chip.
        l2: bytes between the shared cache and the SMs, where they bind; 0 where the arithmetic's rate
            already contains them.
        launches: kernels.
    """

    name: str
    flops: float = 0.0
    seconds: float = 0.0
    hbm: float = 0.0
    l2: float = 0.0
    launches: int = 1


@dataclass(frozen=True)
class Cost:
    """What a list of phases takes on a device.

    Attributes:
        seconds: predicted time.
        limit: which of :data:`LIMITS` takes most of it; ``"host"`` when the device waits for the host.
        flops: useful FLOPs.
        hbm: bytes between memory and chip.
        l2: bytes between shared cache and SMs that were counted.
        launches: kernels.
        by_limit: (limit, seconds) of every limit that bound some phase, largest first.
    """

    seconds: float
    limit: str
    flops: float
    hbm: float
    l2: float
    launches: int
    by_limit: tuple[tuple[str, float], ...]


def cost_of(phases: Iterable[Phase], device: Device, *, recorded: bool = False) -> Cost:
    """Predicted time of phases that run one after another.

    Args:
        phases: in any order.
        device: where.
        recorded: whether the kernels are launched as one recorded graph, so that the host does not matter.
    """
    phases = tuple(phases)
    seconds = dict.fromkeys(LIMITS, 0.0)
    for phase in phases:
        parts = {
            "compute": phase.seconds,
            "hbm": phase.hbm / device.hbm_reached,
            "l2": phase.l2 / device.l2_reached,
        }
        if device.overlaps:
            slowest = max(parts, key=lambda name: parts[name])
            seconds[slowest] += parts[slowest]
        else:
            for name, value in parts.items():
                seconds[name] += value
        seconds["launch"] += phase.launches * device.launch
    launches = sum(phase.launches for phase in phases)
    host = 0.0 if recorded else launches * device.host
    if device.overlaps:
        # The host enqueues ahead of the device; only where it is slower does it show.
        total = sum(seconds.values())
        if host > total:
            seconds = {**dict.fromkeys(LIMITS, 0.0), "host": host}
    else:
        seconds["host"] = host
    ranked = sorted(((n, s) for n, s in seconds.items() if s > 0), key=lambda pair: -pair[1])
    return Cost(
        seconds=sum(seconds.values()),
        limit=ranked[0][0] if ranked else "launch",
        flops=sum(p.flops for p in phases),
        hbm=sum(p.hbm for p in phases),
        l2=sum(p.l2 for p in phases),
        launches=launches,
        by_limit=tuple(ranked),
    )


def gemm(
    name: str,
    device: Device,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    *,
    batch: int = 1,
    count: int = 1,
    flops: float | None = None,
    hbm: float | None = None,
) -> Phase:
    """A vendor's matrix product ``[m, k] x [k, n]``, ``count`` times in a row.

    Args:
        name: what it computes.
        device: where.
        dtype: of the operands.
        m: rows.
        n: columns.
        k: length of the reduction.
        batch: products of one call.
        count: calls.
        flops: useful FLOPs of one call, when some are known to be wasted; default ``2 batch m n k``.
        hbm: bytes of one call; default both operands and the result once.
    """
    whole = 2.0 * batch * m * n * k
    rate = device.peak(dtype) * device.gemm.value * filled(device, m, n, k, batch)
    moved = batch * (m * k + k * n + m * n) * dtype.itemsize
    return Phase(
        name=name,
        flops=count * (whole if flops is None else flops),
        seconds=count * whole / rate,
        hbm=count * (moved if hbm is None else hbm),
        launches=count,
    )


def filled(device: Device, m: int, n: int, k: int, batch: int = 1) -> float:
    """Which part of a large GEMM's rate one of this shape reaches: padding of tiles, and SMs left idle.

    The best of :data:`GEMM_TILES`, each also with the reduction split over up to four groups of SMs.
    """
    if not device.overlaps:
        return 1.0  # the rate was measured on a core, which no other one waits for
    best = 0.0
    for rows, columns, rate in GEMM_TILES:
        down, across = math.ceil(m / rows), math.ceil(n / columns)
        useful = m * n / (down * rows * across * columns)
        for split in (1, 2, 4):
            if split > 1 and k // split < 1024:
                continue
            programs = down * across * batch * split
            waves = math.ceil(programs / device.sms) * device.sms
            # A split writes and reads fp32 partial sums; assumed to take a twentieth per doubling.
            best = max(best, rate * useful * programs / waves * (1 - 0.05 * math.log2(split)))
    return best


def stream(name: str, nbytes: float, *, launches: int = 1, flops: float = 0.0) -> Phase:
    """A pointwise kernel that moves ``nbytes`` bytes of memory."""
    return Phase(name=name, hbm=nbytes, launches=launches, flops=flops)
