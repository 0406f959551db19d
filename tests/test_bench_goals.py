"""What was to be reached: bounds, the worst case, how many cases there are, and what was not measured."""

from __future__ import annotations

from collections import Counter

import pytest

from bench import goals, growth, planned, results
from bench.figures import Figure
from tests.bench_records import BORDER, GROWTH, LAYERS, MEMORY, PREFILL, WHOLE_CHUNK, reached, timed, write


@pytest.fixture
def record(tmp_path):
    """A function that writes a file as pytest-benchmark does."""
    return lambda *infos, name="run.json", **environment: write(tmp_path / name, *infos, **environment)


def test_goals(record):
    """The worst case counts; what no case is about is not measured, and said so."""
    slow = {**PREFILL, "times": {**PREFILL["times"], "ours": timed(0.0209, 1.9)}}
    ours = {"official training form": {"ratio": 0.5, "low": 0.4, "high": 0.625}}
    shape = {"d": 1024, "f": 3072, "tokens": 4096, "chunk": 512, "batch": 1, "dtype": "float32"}
    forward = {**slow, "kind": "forward", "shape": shape, "ours_over": ours}
    slower = {**forward, "ours_over": {"official inference loop": {"ratio": 1.25, "low": 1.2, "high": 1.3}}}
    host = {"kind": "host", "shape": {}, "times": {"static": timed(2e-6, 1.0), "ours": timed(19e-6, 9.5)}}
    border = {**BORDER, "shape": {"d": 1024}, "worst": 9.0}
    files = [record(forward, slower, host, border), record(forward, name="tuned.json", allocator="tuned")]
    block = goals.table(results.load(files))
    found = {row[0]: dict(zip(block.head, row, strict=True)) for row in block.rows}
    said = {name: (row["bound"], row["measured [quartiles]"], row["met"]) for name, row in found.items()}
    assert said["forward float32, T=4096 C=512: / FLOP floor"] == ("<= 1.05", "1.04 [0.907, 1.18]", "yes")
    form, loop = "official training form", "official inference loop"
    assert said[f"forward fp32 C=512: {form} / ours"] == (">= 1.85", "2 [1.6, 2.5]", "yes")
    assert said[f"forward fp32 C=512, tuned allocator: {form} / ours"] == (">= 1.3", "2 [1.6, 2.5]", "yes")
    # The loop's 40 ms by the floor's 20.
    assert found[f"forward fp32 C=512: {loop} / ours"]["at the floor"] == "2"
    grid = "forward, every shape, default allocator: ours / "
    assert said[grid + loop] == ("<= 1", "1.25 [1.2, 1.3]", "NO")
    assert said[f"{grid}{loop}, compiled"] == ("<= 1", "-", "NOT MEASURED")
    assert said["decode, a step's host time in microseconds"] == ("<= 15", "17", "NO")
    assert said["decode, one layer: longest step / median, C<=512"] == ("<= 3", "9", "NO")
    counts = Counter(row["met"] for row in found.values())
    met, part, missed, unknown = (counts[x] for x in ("yes", "yes, so far", "NO", "NOT MEASURED"))
    assert min(met, part, missed) > 1
    summary = (
        f"{met + part} of {len(found)} met ({part} of them as far as the suite's cases were measured), "
        f"{missed} missed (0 of them at the floor, too), {unknown} not"
    )
    assert block.lines[0].startswith(summary)
    assert counts["NOT MEASURED"] > 10


@pytest.mark.parametrize(
    ("loop", "ratio", "met"),
    [(0.04, 0.75, "NO"), (0.027, 0.75, "NO, NOR THE FLOOR"), (0.027, 0.7, "yes")],
)
def test_a_bound_that_the_arithmetic_alone_misses_too_says_so(record, loop, ratio, met):
    """A floor of 20 ms, at least 1.38 times as fast as the loop: of 27 ms that is 1.35 at the floor."""
    shape = {"d": 1024, "f": 3072, "tokens": 4096, "chunk": 512, "batch": 1, "dtype": "float32"}
    name = "official inference loop"
    times = {**PREFILL["times"], name: timed(loop, 2.0)}
    ours = {name: {"ratio": ratio, "low": ratio, "high": ratio}}
    row = reached(record({**PREFILL, "shape": shape, "times": times, "ours_over": ours}))
    assert row[f"prefill fp32 C=512: {name} / ours"]["met"] == met


def test_a_goal_says_how_many_of_the_suites_cases_there_are(record):
    """Whichever allocator is asked for; what CI alone runs is none of them."""
    ours = {"ours_over": {"official inference loop": {"ratio": 0.5, "low": 0.5, "high": 0.5}}}
    files = [record({**PREFILL, **ours}), record({**PREFILL, **ours}, name="t.json", allocator="tuned")]
    from bench.suite import test_layer

    every = sum(all(mark.name != "ci" for mark in one.marks) for one in test_layer.GRID)
    for allocator in ("default", "tuned"):
        row = reached(*files)[f"prefill, every shape, {allocator} allocator: ours / official inference loop"]
        assert row["cases"] == f"1 of {every}"
    row = reached(*files)["decode, B=1, before the first write: / static"]
    assert (row["met"], row["cases"]) == ("NOT MEASURED", "0 of 2")


def test_every_kind_that_the_suite_has_can_be_counted():
    kinds = Counter(case.kind for case in planned.planned())
    assert kinds["border"] > 27
    assert kinds["growth"] == len(growth.SWEEPS) + len(growth.QUICK)
    assert {"decode", "step, whole chunk", "model logits", "memory, forward"} < kinds.keys()
    assert all(case.shape for case in planned.planned())


def test_a_missed_bound_shows_in_its_digits():
    just, at = Figure(1.0503), Figure(1.05)
    assert (just.said(1.05), at.said(1.05), Figure(1.96).said(1.05)) == ("1.0503", "1.05", "1.96")
    # A lower bound that is just missed.
    assert Figure(1.8499, 1.8, 1.9).said(1.85) == "1.8499 [1.8, 1.9]"


def test_goals_of_sweeps_name_the_point(record):
    slow = {f"official inference loop @ {x}": timed(0.1, ratio) for x, ratio in ((256, 0.5), (512, 1.25))}
    row = reached(record({**GROWTH, "ours_over": slow}, {**LAYERS, "ours_over": {}}))[
        "growth, every point of a sweep: ours / official inference loop"
    ]
    assert (row["measured [quartiles]"], row["met"]) == ("1.25 [1, 1.5]", "NO")
    assert row["worst case"].endswith("T=512")


def test_goals_of_decode(record):
    """Each place by itself: at a chunk's end, while it is written, and while v of the next one is made."""
    shape = {"d": 1024, "f": 3072, "chunk": 512, "batch": 4, "dtype": "float32"}
    infos = [
        {
            "kind": "decode",
            "shape": {**shape, "past": past},
            "times": {"the same bytes": timed(1.0, 1.0), "ours": timed(ratio, ratio)},
            "floor": ["the same bytes"],
        }
        for past, ratio in ((0, 1.5), (256, 1.4), (1024, 1.3), (1088, 1.2), (1280, 1.1))
    ]
    found = reached(record(*infos, WHOLE_CHUNK))
    goal = "decode, B=4, {}: / the slower of its bytes and, where W0 is read, the static product"
    values = [
        found[goal.format(where)]["measured [quartiles]"].split()[0]
        for where in (
            "before the first write",
            "while v of the first chunk is made",
            "a matrix a row, nothing waiting",
            "a matrix a row, a write in progress",
            "a matrix a row, v of a chunk made",
        )
    ]
    # The worst place counts: one that was counted at another, too, would show there.
    assert values == ["1.5", "1.4", "1.3", "1.2", "1.1"]
    whole = found["decode, B=1, mean step over a whole chunk: / static"]
    assert (whole["measured [quartiles]"], whole["at the floor"]) == ("1.5 [1.25, 1.75]", "1.25")


@pytest.mark.parametrize(("ratio", "met"), [(1.625, "NO, NOR THE FLOOR"), (1.02, "yes")])
def test_a_models_prompt_has_the_floor_of_what_it_writes(record, ratio, met):
    """Of five layers v and 16 writes of 256 tokens, at the rate of the products of a layer of that run."""
    flops = 5 * 2 * 4096 * 576 * (1536 + 576)
    asked = {"name": "SmolLM2-135M", "tokens": 4096, "dtype": "float32", "chunk": 256, "batch": 1, "lr": 0.3}
    static = flops / 1e11 / 0.6
    infos = {
        "kind": "model prefill",
        "shape": asked,
        "times": {"static": timed(static, 1.0), "ours": timed(ratio * static, ratio)},
        "ours_over": {"static": {"ratio": ratio, "low": ratio, "high": ratio}},
    }
    goal = "SmolLM2-135M, every 6th layer, prefill T=4096: / static compiled"
    assert reached(record(infos))[goal]["at the floor"] == "-"  # no product of this machine
    row = reached(record(infos, PREFILL))[goal]
    assert (row["at the floor"], row["met"]) == ("1.6", met)


def test_goals_of_memory(record):
    by_tokens = {**MEMORY, "shape": {"d": 1024, "dtype": "float32", "variable": "T"}, "values": [4096, 8192]}
    by_chunks = {**by_tokens, "shape": {**by_tokens["shape"], "variable": "C"}, "variable": "C"}
    by_chunks["fit_extra"] = {"ours": {"exponent": -0.02, "r2": 0.5}}
    found = [row for row in reached(record(by_tokens, by_chunks)).values() if row["met"] != "NOT MEASURED"]
    assert [(row["measured [quartiles]"], row["met"]) for row in found] == [("0.143", "yes"), ("0.02", "yes")]
