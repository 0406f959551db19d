"""Paired timing: competitors in one process, interleaved, medians and ratios.

Every callable runs once per round, in an order that changes; a ratio is taken within its round, so that a
busy machine disturbs both sides alike.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ttt_compiler.codegen.cpu.gemm import release_workspaces


@dataclass(frozen=True)
class Timing:
    """Median seconds, and the ratio to the first competitor: median and quartiles over rounds."""

    seconds: float
    ratio: float
    low: float
    high: float


def clock_of(threads: int) -> Callable[[], float]:
    """Of one thread its own processor time, which a busy machine does not stretch; of several, wall time."""
    return time.thread_time if threads == 1 else time.perf_counter


def one_round(
    competitors: Mapping[str, Callable[[], object]], clock: Callable[[], float], order: random.Random
) -> dict[str, float]:
    """Seconds of one call of each, in a random order.

    Who runs after whom changes: one that finds its operands in the cache owes it to the one before.
    """
    taken = {}
    for name in order.sample(list(competitors), len(competitors)):
        start = clock()
        competitors[name]()
        taken[name] = clock() - start
    return taken


def paired(
    competitors: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time all competitors; the first is the base of the ratios."""
    names = list(competitors)
    for name in names:
        competitors[name]()
    order = random.Random(0)
    gc.disable()
    try:
        taken = [one_round(competitors, clock, order) for _ in range(rounds)]
    finally:
        gc.enable()
    seconds = {name: [one[name] for one in taken] for name in names}
    out = {}
    for name in names:
        ratios = sorted(a / b for a, b in zip(seconds[name], seconds[names[0]], strict=True))
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        out[name] = Timing(statistics.median(seconds[name]), statistics.median(ratios), low, high)
    return out


def peak_bytes(fn: Callable[[], object]) -> int:
    """Largest number of bytes that torch's allocator held above the start, exact, from the profiler.

    Buffers that ours keeps between calls are among them; what C++ allocates is not seen.
    """
    fn()
    release_workspaces()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        fn()
    live = peak = 0
    for event in sorted(_memory_events(p), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _memory_events(profile: torch.profiler.profile) -> list:
    return [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
