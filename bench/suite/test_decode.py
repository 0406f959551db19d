"""Decode of one layer: a step, a chunk of steps with its border, and what a step costs besides bytes."""

from __future__ import annotations

import statistics

import pytest
import torch

from bench.decode_layer import STEPS, Decoding, Place, WholeChunks, across_a_chunk
from bench.layer import KEY
from bench.measure import clock_of
from bench.results import WHOLE_CHUNK, WITH_V_AND_WRITE
from ttt_compiler.codegen.layout import WRITES, spread_tokens

MEDIUM = (1024, 3072)
# Before the first write, while v of the first chunk is made, at borders with nothing in waiting; and inside
# of a later chunk: while the write of the one before is in progress, and while v is made again.
PASTS = (0, 256, 1024, 4096, 16384, 1024 + 64, 1024 + 256)


def places():
    for past in (128, 128 + 2, 128 + 32):
        place = Place(16, 48, 64, 2, past)
        yield pytest.param(place, marks=pytest.mark.ci, id="ci" if past == 128 else f"ci,N={past}")
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 4, 16):
            for past in PASTS:
                place = Place(*MEDIUM, 512, batch, past, dtype)
                marks = [pytest.mark.quick] if (batch, past) in ((1, 1024), (4, 1024)) else []
                yield pytest.param(place, marks=marks, id=str(place).replace(" ", ","))


@pytest.mark.parametrize("place", places())
@torch.no_grad()
def test_step(compare, place):
    decoding = Decoding(place)
    errors = decoding.gate()
    compare(
        decoding.runs(clock_of(torch.get_num_threads())),
        rounds=9,
        kind="decode",
        shape=vars(place),
        repeats=STEPS,
        bytes=decoding.bytes_read(),
        decoded=decoding.decoded,
        errors=errors,
        floor=["the same bytes", *(["static"] if decoding.reads_base() else [])],
    )


def chunks():
    yield pytest.param(Place(16, 48, 64, 2, 128), marks=pytest.mark.ci, id="ci")
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 4, 16):
            place = Place(*MEDIUM, 512, batch, 1024, dtype)
            yield pytest.param(place, id=str(place).replace(" ", ","))


@pytest.mark.parametrize("place", chunks())
@torch.no_grad()
def test_whole_chunk(compare, benchmark, place):
    """All steps of a chunk, with its write and its v: the mean is what a token costs, whoever pays when."""
    decoding, clock = Decoding(place), clock_of(torch.get_num_threads())
    decoding.gate()
    whole = WholeChunks(decoding, clock)
    times = compare(whole.runs(), rounds=3, kind=WHOLE_CHUNK, shape=vars(place), repeats=place.chunk)
    # The first call of each is none of the rounds.
    steps = {name: torch.tensor(taken[1:]).median(0).values for name, taken in whole.taken.items()}
    benchmark.extra_info |= {
        "errors": whole.gate(),
        "bytes": decoding.bytes_read(),
        "floor": [WITH_V_AND_WRITE],
        "mean": {name: taken["seconds"] for name, taken in times.items()},
        "median": {name: float(each.median()) for name, each in steps.items()},
        "steps": {name: each.tolist() for name, each in steps.items()},
    }


@pytest.mark.quick
@pytest.mark.parametrize("batch", [1, 4, 16])
@torch.no_grad()
def test_host(compare, batch):
    """D = F = 8, where nothing is left but calling the op."""
    decoding = Decoding(Place(8, 8, 512, batch, 1024))
    errors = decoding.gate()
    runs = decoding.runs(clock_of(torch.get_num_threads()))
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
    for n in (0, 64, 128):
        yield pytest.param(Place(16, 48, 64, 2, n), marks=pytest.mark.ci, id=f"ci,N={n}")
    for past in (0, 1, 2048):
        for chunk in (128, 256, 512):
            for batch in (1, 4, 16):
                marks = [pytest.mark.quick] if (chunk, batch, past) == (512, 1, 2048) else []
                n = chunk if past == 1 else past
                place = Place(*MEDIUM, chunk, batch, n)
                yield pytest.param(place, marks=marks, id=f"C={chunk},B={batch},N={n}")


@pytest.mark.parametrize("place", borders())
@torch.no_grad()
def test_border(benchmark, request, place):
    decoding = Decoding(place)
    errors = decoding.gate()
    # A first border is crossed again and again from the same place, a later one is followed by the next.
    rounds, again = 1 if request.config.getoption("--quick") else 3, place.past < 2 * place.chunk
    steps: list[float] = []
    clock = clock_of(torch.get_num_threads())
    before = decoding.state.column(KEY, WRITES)
    benchmark.pedantic(lambda: steps.extend(across_a_chunk(decoding, clock, rounds, again=again)), rounds=1)
    after = decoding.state.column(KEY, WRITES)
    assert after == [n + (1 if again else rounds) for n in before], f"{before} -> {after} writes: no timing"
    # Until the write behind the last border is done by the steps that follow it.
    errors |= {f"{name}, after": x for name, x in decoding.gate(spread_tokens(decoding.spec) + 1).items()}
    median = statistics.median(steps)
    benchmark.extra_info |= {
        "kind": "border",
        "shape": vars(place),
        "steps": {"ours": steps},
        "errors": errors,
        "median": median,
        "worst": max(steps) / median,
    }
