"""Small records of the benchmark suite, as it leaves them, for the tests of what becomes of them.

May be changed here: a record's fields, with the suite's.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench import goals, results

SHAPE = {"d": 64, "f": 128, "tokens": 256, "chunk": 32, "batch": 1, "dtype": "float32"}
ENVIRONMENT = {"cpu": "a processor", "threads": 1, "isa": ["avx2", "avx512f"]}


def timed(seconds: float, ratio: float) -> dict[str, float]:
    return {"seconds": seconds, "ratio": ratio, "low": ratio - 0.25, "high": ratio + 0.25}


PREFILL = {
    "kind": "prefill",
    "shape": SHAPE,
    "flops": 2e9,
    "static_flops": 1e9,
    "times": {
        "static": timed(0.011, 1.0),
        "torch.mm": timed(0.010, 0.9),
        "ours": timed(0.025, 2.25),
        "official inference loop": timed(0.040, 3.6),
    },
    "ours_over": {"official inference loop": {"ratio": 0.62, "low": 0.6, "high": 0.65}},
}
GROWTH = {
    "kind": "growth",
    "shape": {**SHAPE, "variable": "T"},
    "variable": "T",
    "values": [256, 512],
    "times": {
        "static @ 256": timed(0.001, 1.0),
        "ours @ 256": timed(0.002, 2.0),
        "static @ 512": timed(0.002, 1.0),
        "ours @ 512": timed(0.004, 2.0),
    },
    "bytes": {"ours": [2**20, 3 * 2**20]},
    "fit": {"static": {"exponent": 1.0, "r2": 1.0}, "ours": {"exponent": 1.02, "r2": 0.99}},
    "fit_bytes": {"ours": {"exponent": 1.58, "r2": 1.0}},
}
LAYERS = {
    **GROWTH,
    "variable": "layers",
    "shape": {"model": "Llama", "variable": "layers"},
    "fit": {"ours": {"slope": 0.0015, "intercept": 0.1, "r2": 0.9}},
    "fit_bytes": {"ours": {"slope": 2.0**19, "intercept": 2.0**20, "r2": 1.0}},
}
BORDER = {"kind": "border", "shape": SHAPE, "steps": {"ours": [0.001, 0.001, 0.009], "static": [0.001] * 3}}
MEMORY = {
    "kind": "memory, training",
    "shape": {**SHAPE, "variable": "T"},
    "variable": "T",
    "values": [256, 512],
    "bytes": {"static": [2**20, 2**21], "ours": [2**21, 2**22], "official": [2**22, 2**24]},
    "extra_bytes": {"ours": [2**20, 2**21], "official": [3 * 2**20, 14 * 2**20]},
    "extra_ratio": [1 / 3, 1 / 7],
    "fit_bytes": {"ours": {"exponent": 1.0, "r2": 1.0}},
    "fit_extra": {"ours": {"exponent": 1.0, "r2": 1.0}, "official": {"exponent": 2.22, "r2": 1.0}},
}
PHASES = {"import": 1.5, "first call": 6.0, "until the first answer": 9.0}
INSTRUCTIONS = {
    "kind": "instructions",
    "shape": {"d": 8, "f": 8},
    "tool": "valgrind",
    "per_step": {"B=1": 38814, "B=4": 47266},
}
WHOLE_CHUNK = {
    "kind": "step, whole chunk",
    "shape": {"d": 1024, "batch": 1, "chunk": 512, "past": 1024, "dtype": "float32"},
    "times": {
        "static": timed(2e-4, 1.0),
        "ours": timed(3e-4, 1.5),
        "the same bytes, v and the write": timed(2.5e-4, 1.25),
    },
    "floor": ["the same bytes, v and the write"],
    "ours_over": {"static": timed(3e-4, 1.5)},
    "mean": {"static": 2e-4, "ours": 3e-4},
    "median": {"static": 2e-4, "ours": 2.5e-4},
}
STARTUP = {
    "kind": "startup",
    "shape": {"model": "Llama"},
    "seconds": {"static, cold": PHASES, "ours, cold": {**PHASES, "first call": 7.25}},
    "ratio": {"cold": 1.14},
}


def write(path: Path, *infos: dict, **environment: object) -> Path:
    """A file as pytest-benchmark writes it."""
    benchmarks = [{"name": f"test_{i}", "extra_info": info} for i, info in enumerate(infos)]
    machine = {"ttt": {**ENVIRONMENT, **environment}}
    path.write_text(json.dumps({"benchmarks": benchmarks, "machine_info": machine}))
    return path


def reached(*paths: Path) -> dict[str, dict[str, str]]:
    """The table of goals: per goal its row, by column."""
    block = goals.table(results.load(paths))
    return {row[0]: dict(zip(block.head, row, strict=True)) for row in block.rows}
