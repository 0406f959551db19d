"""Paired timing: competitors in one process, in turns, medians and ratios; and memory of one call.

Every callable runs once per round, in an order that changes; a ratio is taken within its round, so that a
busy machine disturbs both sides alike. May be changed here: clocks, and what is said of many rounds.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from ttt_compiler.codegen.cpu.workspaces import release_workspaces


def clock_of(threads: int) -> Callable[[], float]:
    """Of one thread its own processor time, which a busy machine does not stretch; of several, wall time."""
    return time.thread_time if threads == 1 else time.perf_counter


def one_round(
    competitors: Mapping[str, Callable[[], object]], clock: Callable[[], float], order: random.Random
) -> dict[str, float]:
    """Seconds of one call of each, in a random order, and no garbage collected meanwhile.

    Who runs after whom changes: one that finds its operands in the cache owes it to the one before.
    """
    taken = {}
    gc.disable()
    try:
        for name in order.sample(list(competitors), len(competitors)):
            start = clock()
            competitors[name]()
            taken[name] = clock() - start
    finally:
        gc.enable()
    return taken


def summary(taken: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Median seconds of rounds, and the ratio to those of ``base``: median and quartiles."""
    ratios = [a / b for a, b in zip(taken, base, strict=True)]
    low, _, high = statistics.quantiles(ratios * (2 if len(ratios) == 1 else 1), n=4, method="inclusive")
    return {"seconds": statistics.median(taken), "ratio": statistics.median(ratios), "low": low, "high": high}


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
