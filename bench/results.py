"""What a run of the suite left in its JSON, as report and plots read it.

A field may be missing, since a run can be of another commit: it is empty here, and whoever needs it says so.
Read are files of pytest-benchmark, of :mod:`bench.record` and of :mod:`bench.instructions`. May be changed
here: what is derived from the figures (floor, peak), and how a case is called.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ttt_compiler.errors import TTTError

# The static product, by whichever library: the fastest one is what the machine can do.
ORDERED = "oneDNN, W in order"
STATIC = ("static", "torch.mm", "oneDNN", ORDERED)
OURS = "ours"
# Of a sweep: the official training form keeps no state and leaves out the last write, and so does what it is
# held against.
STATELESS = "ours, no state"
RIVALS = {"official training form": STATELESS}
# A form's products and nothing else.
PRODUCTS = "products alone"
# The least that a step of decode costs whose share of v is paid when its token comes, not at the chunk's end.
WITH_V = "static, and v"
# And of a step that writes its share of the chunk before.
WITH_SHARE = "static, and a share of the write"
# Steps of a whole chunk, and the least that they can cost in all.
WHOLE_CHUNK = "step, whole chunk"
WITH_V_AND_WRITE = "the same bytes, v and the write"
# What stands between a competitor's name and the variable's value.
AT = " @ "
INSTRUCTIONS = "instructions"
_SHORT = {"d": "D", "f": "F", "tokens": "T", "chunk": "C", "batch": "B", "past": "N", "lr": "eta"}
# What a sweep changes: no part of its shape.
_SWEPT = {"T": ("tokens",), "B": ("batch",), "C": ("chunk",), "D·F": ("d", "f")}


@dataclass(frozen=True)
class Case:
    """One benchmark of one file."""

    name: str
    info: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    source: Path | None = None

    @property
    def kind(self) -> str:
        """Such as forward, prefill, training, growth, border."""
        return str(self.info.get("kind", "of no kind"))

    @property
    def shape(self) -> dict[str, Any]:
        """Sizes by name."""
        return self.info.get("shape") or {}

    @property
    def times(self) -> dict[str, dict[str, float]]:
        """Per competitor: seconds, ratio to its base, its quartiles low and high."""
        return self.info.get("times") or {}

    @property
    def label(self) -> str:
        """The shape in a few letters."""
        left_out = ("variable", *_SWEPT.get(self.info.get("variable", ""), ()))
        said = [
            value if isinstance(value, str) else f"{_SHORT.get(name, name)}={value}"
            for name, value in self.shape.items()
            if name not in left_out
        ]
        return " ".join(said) or self.name

    @property
    def tuned(self) -> bool:
        """Whether malloc kept large blocks."""
        return str(self.environment.get("allocator", "default")) != "default"

    @property
    def commit(self) -> str:
        """Ten digits of it, and whether the tree had changes that no commit has."""
        sha, changed, _ = str(self.environment.get("commit") or "").partition("+")
        return sha[:10] + ("+changes" if changed else "") or "not recorded"

    @property
    def machine(self) -> tuple[Any, ...]:
        """What a measured peak holds for."""
        return (*(self.environment.get(n) for n in ("cpu", "threads")), self.shape.get("dtype"))

    def seconds(self, name: str) -> float | None:
        """Of a competitor; None where there is none."""
        return self.times.get(name, {}).get("seconds")

    def static_seconds(self) -> float | None:
        """Of the static product by the fastest library of this case."""
        return min((s for name in STATIC if (s := self.seconds(name))), default=None)

    def floor(self, peak: float | None = None) -> float | None:
        """Seconds of the slowest competitor named so, or of the FLOPs at the rate of the static product.

        Of a training step, whose static form is no plain product, at the rate ``peak``.
        """
        if named := self.info.get("floor"):
            taken = [self.seconds(name) for name in ([named] if isinstance(named, str) else named)]
            return None if None in taken else max(s for s in taken if s is not None)
        if self.kind == "training":
            return self.info["flops"] / peak if peak and self.info.get("flops") else None
        static, flops, unit = self.static_seconds(), self.info.get("flops"), self.info.get("static_flops")
        return flops / unit * static if static and flops and unit else None

    def gemm_rate(self) -> float | None:
        """FLOP/s of the static product by the fastest library of this case."""
        static, unit = self.static_seconds(), self.info.get("static_flops")
        return unit / static if static and unit else None

    def lacks(self, *names: str) -> list[str]:
        """Those of the fields that are not there."""
        return [name for name in names if not self.info.get(name)]


def held_against(name: str, rivals: dict[str, str]) -> str:
    """Which form of ours a competitor is held against, at the same place of a sweep."""
    competitor, *place = name.partition(AT)
    return "".join((rivals.get(competitor, OURS), *place))


def load(paths: Sequence[Path]) -> list[Case]:
    """The benchmarks of all files, in their order.

    Raises:
        TTTError: a file cannot be read, or is none of pytest-benchmark's.
    """
    found: list[Case] = []
    for path in paths:
        try:
            data = json.loads(path.read_text() or "{}")
        except (OSError, ValueError) as e:
            raise TTTError(f"{path} cannot be read: {e}") from e
        found += _cases(data, path) if isinstance(data, dict) else []
        if not any(case.source == path for case in found):
            raise TTTError(
                f"{path} holds no benchmarks: write one by pytest bench/suite --benchmark-json=FILE"
            )
    return found


def _cases(data: dict[str, Any], path: Path) -> list[Case]:
    """Of one file. A record has several environments, and every case the number of its own."""
    if data.get("kind") == INSTRUCTIONS:
        info = {n: value for n, value in data.items() if n not in ("environment", "d", "f")}
        info["shape"] = {n: data[n] for n in ("d", "f") if n in data}
        # What is counted has one thread, whatever the process had that started it.
        return [Case(INSTRUCTIONS, info, {**data.get("environment", {}), "threads": 1}, path)]
    machine = data.get("machine_info", {}).get("ttt", {})
    return [
        Case(
            b.get("name", "without a name"),
            b.get("extra_info", {}),
            data["environments"][b["environment"]] if "environments" in data else machine,
            path,
        )
        for b in data.get("benchmarks", [])
    ]


def peaks(cases: Sequence[Case]) -> dict[tuple[Any, ...], float]:
    """The largest FLOP/s of a static product, per machine, threads and dtype."""
    found: dict[tuple[Any, ...], float] = {}
    for case in cases:
        # A training step's static product is three, and autograd besides.
        if case.kind != "training" and (rate := case.gemm_rate()):
            found[case.machine] = max(rate, found.get(case.machine, 0.0))
    return found


def series(case: Case, figure: str = "seconds") -> dict[str, list[float]]:
    """Of a sweep: per competitor its figures along the axis, from names such as ``ours @ 4096``."""
    values, found = case.info.get("values") or [], {}
    for name in dict.fromkeys(n.split(AT)[0] for n in case.times):
        taken = [case.times.get(f"{name}{AT}{x}", {}).get(figure) for x in values]
        if taken and None not in taken:
            found[name] = taken
    return found


def steps(case: Case) -> dict[str, list[float]]:
    """Of a decode across a chunk's border: per competitor the seconds of each step, ours if none is named."""
    found = case.info.get("steps") or {}
    return {n: taken for n, taken in (found if isinstance(found, dict) else {OURS: found}).items() if taken}
