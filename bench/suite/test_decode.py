"""Decode of one layer: a step, a chunk of steps with its border, and what a step costs besides bytes."""

from __future__ import annotations

import statistics

import pytest
import torch

from bench.decode_layer import KEY, STEPS, Decoding, Place, across_a_chunk
from bench.measure import clock_of
from ttt_compiler.codegen.layout import WRITES

MEDIUM = (1024, 3072)


def places():
    found = [pytest.param(Place(16, 48, 64, 2, 128), marks=pytest.mark.ci, id="ci")]
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 4, 16):
            for past in (0, 256, 1024, 4096, 16384):
                place = Place(*MEDIUM, 512, batch, past, dtype)
                marks = [pytest.mark.quick] if (batch, past) in ((1, 1024), (4, 1024)) else []
                found.append(pytest.param(place, marks=marks, id=str(place).replace(" ", ",")))
    return found


@pytest.mark.parametrize("place", places())
@torch.no_grad()
def test_step(compare, place):
    decoding = Decoding(place)
    errors = {"ours": decoding.gate()}
    runs = decoding.runs()
    compare(
        runs,
        rounds=9,
        kind="decode",
        shape=vars(place),
        repeats=STEPS,
        bytes=decoding.bytes_read(),
        errors=errors,
        floor=["the same bytes", *(["static"] if decoding.reads_base() else [])],
    )


@pytest.mark.quick
@pytest.mark.parametrize("batch", [1, 4, 16])
@torch.no_grad()
def test_host(compare, batch):
    """D = F = 8, where nothing is left but calling the op."""
    decoding = Decoding(Place(8, 8, 512, batch, 1024))
    errors = {"ours": decoding.gate()}
    runs = decoding.runs()
    compare(
        {name: runs[name] for name in ("static", "ours")},
        rounds=31,
        kind="host",
        shape=vars(decoding.place),
        repeats=STEPS,
        errors=errors,
    )


def borders():
    """The first two borders of a text, and one behind which every row reads a matrix anyway."""
    for past in (0, 1, 2048):
        for chunk in (128, 256, 512):
            for batch in (1, 4, 16):
                marks = [pytest.mark.quick] if (chunk, batch, past) == (512, 1, 2048) else []
                n = chunk if past == 1 else past
                yield pytest.param(chunk, batch, n, marks=marks, id=f"C={chunk},B={batch},N={n}")


@pytest.mark.parametrize(("chunk", "batch", "past"), borders())
@torch.no_grad()
def test_border(benchmark, request, chunk, batch, past):
    decoding = Decoding(Place(*MEDIUM, chunk, batch, past))
    error = decoding.gate()
    decoding.site.rows.copy_(decoding.begin)
    # A first border is crossed again and again from the same place, a later one is followed by the next.
    rounds, again = 1 if request.config.getoption("--quick") else 3, past < 2048
    steps: list[float] = []
    clock = clock_of(torch.get_num_threads())
    before = decoding.state.column(KEY, WRITES)
    benchmark.pedantic(lambda: steps.extend(across_a_chunk(decoding, clock, rounds, again=again)), rounds=1)
    after = decoding.state.column(KEY, WRITES)
    assert after == [n + (1 if again else rounds) for n in before], f"{before} -> {after} writes: no timing"
    median = statistics.median(steps)
    benchmark.extra_info |= {
        "kind": "border",
        "shape": vars(decoding.place),
        "steps": {"ours": steps},
        "errors": {"ours": error},
        "median": median,
        "worst": max(steps) / median,
    }
