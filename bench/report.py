"""What a run of the suite found, as a page: ``python -m bench.report FILE... [--markdown FILE]``.

Per case and competitor: milliseconds, the ratio to the case's base and ours to it with quartiles over rounds,
the rate of FLOPs against the largest that a plain product reached there, and the ratio to the floor. What a
file lacks is listed, never guessed. May be changed here: columns and wording.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from bench.goals import table as goals
from bench.page import Block, command
from bench.results import AT, OURS, STATIC, Case, peaks, series

LEGEND = (
    "Base: the first competitor of a case. In brackets: quartiles over rounds, of ratios within a round.",
    "GFLOP/s counts the FLOPs that the algorithm needs, whoever computes them.",
    "Peak: the largest rate of a static product of that dtype in these files, on that machine.",
    "Floor: the algorithm's FLOPs at the rate of the same case's static product, by the fastest library;",
    "  of a decode step, what reads the same bytes fastest, or the static product where that is a part.",
    "Beyond the peak and below the floor: 16-bit operands that are multiplied in fp32, where that is faster;",
    "  a state in the cache where what reads the same bytes is not.",
)
_MEMORY = ("variable", "values", "bytes", "extra_bytes", "extra_ratio")
# Fields without which a table of that kind has holes.
_NEEDED = {
    "growth": ("times", "variable", "values", "fit", "bytes", "fit_bytes"),
    "border": ("steps",),
    **dict.fromkeys(("memory, forward", "memory, training"), (*_MEMORY, "fit_bytes", "fit_extra")),
    "startup": ("seconds", "ratio"),
    **dict.fromkeys(("forward", "prefill", "training"), ("times", "flops", "static_flops", "ours_over")),
}
_HEAD = ("case", "competitor", "ms", "/ base", "ours / it", "GFLOP/s", "of peak", "/ floor")


def report(cases: Sequence[Case]) -> list[Block]:
    """Goals of the cases; then a part per environment: its kinds of cases, and what is missing."""
    reached, rates = goals(cases, all_of_them=False), peaks(cases)
    blocks = [reached] if reached.rows else []
    for environment in _distinct(c.environment for c in cases):
        here = [c for c in cases if c.environment == environment]
        said = [f"{name}: {_value(value)}" for name, value in environment.items()]
        blocks.append(Block("Environment", said or ["not recorded"]))
        for kind in _distinct(c.kind for c in here):
            alike = [c for c in here if c.kind == kind]
            if kind == "growth":
                blocks += itertools.chain.from_iterable(map(_growth, alike))
            elif kind == "border":
                blocks.append(_border(alike))
            elif kind.startswith("memory, "):
                blocks += map(_memory, alike)
            elif kind == "startup":
                blocks += map(_startup, alike)
            else:
                rows = [row for c in alike for row in _rows(c, rates.get(c.machine))]
                blocks.append(Block(kind.capitalize(), head=_HEAD, rows=rows))
        lacking = [
            f"{c.name}: {', '.join(names)}"
            for c in here
            if (names := c.lacks("kind", "shape", *_NEEDED.get(c.kind, ("times",))))
        ]
        if lacking:
            blocks.append(Block("Missing in the file", lacking))
    return [*blocks, Block("How to read this", list(LEGEND))]


def _rows(case: Case, peak: float | None) -> list[Sequence[str]]:
    floor, found = case.floor(peak), []
    for name, taken in case.times.items():
        seconds, static = taken.get("seconds"), name in STATIC
        flops = case.info.get("static_flops" if static else "flops")
        rate = flops / seconds if flops and seconds else None
        found.append(
            (
                case.label,
                name,
                _number(seconds, 1e3),
                _ratio(taken),
                _ratio((case.info.get("ours_over") or {}).get(name)),
                _number(rate, 1e-9),
                f"{rate / peak:.0%}" if rate and peak else "-",
                f"{seconds / floor:.2f}" if seconds and floor and not static else "-",
            )
        )
    return found or [(case.label, case.name, *["-"] * (len(_HEAD) - 2))]


def _growth(case: Case) -> list[Block]:
    """Cost, ours against the others, and memory: a row per value of the variable, a column per competitor."""
    variable, values = str(case.info.get("variable", "?")), case.info.get("values") or []
    cost, memory = series(case), case.info.get("bytes") or {}
    over = {n: [(case.info.get("ours_over") or {}).get(f"{n}{AT}{x}") for x in values] for n in cost}
    tables = {
        "ms": ({n: [_number(s, 1e3) for s in taken] for n, taken in cost.items()}, "fit"),
        "ratio to the base": (
            {n: [_ratio(case.times[f"{n}{AT}{x}"]) for x in values] for n in cost if n != STATIC[0]},
            None,
        ),
        "ours / it": ({n: list(map(_ratio, taken)) for n, taken in over.items() if any(taken)}, None),
        "MiB beside the operands": (
            {n: [_number(m, 2**-20) for m in taken] for n, taken in memory.items()},
            "fit_bytes",
        ),
    }
    blocks = []
    for title, (columns, fits) in tables.items():
        if columns:
            rows: list[Sequence[str]] = [
                (str(x), *row) for x, *row in zip(values, *columns.values(), strict=False)
            ]
            if fits:
                rows.append(("fit", *(fit(case, fits, n) for n in columns)))
            title = f"Growth with {variable}, {case.label}: {title}"
            blocks.append(Block(title, head=(variable, *columns), rows=rows))
    return blocks or [Block(f"Growth with {variable}, {case.label}", ["no figures"])]


def fit(case: Case, field: str, name: str) -> str:
    """A fitted line in words, of ``fit`` or ``fit_bytes``: an exponent, or what one more costs."""
    found = (case.info.get(field) or {}).get(name, {})
    if "exponent" in found:
        line = f"{case.info.get('variable', '?')}^{found['exponent']:.2f}"
    elif "slope" in found:
        line = f"{found['slope'] * 1e3:.3g} ms" if field == "fit" else f"{found['slope'] * 2**-20:.3g} MiB"
        line += " each"
    else:
        return "no fit"
    return f"{line}, R² {found['r2']:.3f}" if "r2" in found else line


def steps(case: Case) -> dict[str, list[float]]:
    """Of a decode across a chunk's border: per competitor the seconds of each step, ours if none is named."""
    found = case.info.get("steps") or {}
    return {n: taken for n, taken in (found if isinstance(found, dict) else {OURS: found}).items() if taken}


def _memory(case: Case) -> Block:
    """A row per value of the variable: peaks, what is beyond the static layer's, ours by the official's."""
    title = f"{case.kind.capitalize()}: {case.label}"
    if case.lacks(*_MEMORY):
        return Block(title, ["no figures"])
    variable, values, peak, extra, ratios = (case.info[n] for n in _MEMORY)
    columns = [[_number(m, 2**-20) for m in taken] for taken in (*peak.values(), *extra.values())]
    rows = [[str(x), *cells, f"{r:.2f}"] for x, *cells, r in zip(values, *columns, ratios, strict=True)]
    fits = [fit(case, "fit_bytes", n) for n in peak] + [fit(case, "fit_extra", n) for n in extra]
    head = (variable, *(f"{n} MiB" for n in peak), *(f"{n}, extra" for n in extra), "extra, ours / official")
    return Block(title, head=head, rows=[*rows, ["fit", *fits, ""]])


def _startup(case: Case) -> Block:
    """A row per start: seconds of its phases."""
    seconds = case.info.get("seconds") or {}
    phases = list(next(iter(seconds.values()), {}))
    rows = [[name, *(f"{taken[p]:.2f}" for p in phases)] for name, taken in seconds.items()]
    lines = [f"ours / static, {how}: {ratio:.2f}" for how, ratio in (case.info.get("ratio") or {}).items()]
    return Block("Seconds of a start", lines, ("start", *phases), rows)


def _border(cases: Sequence[Case]) -> Block:
    rows: list[Sequence[str]] = []
    for case in cases:
        for name, taken in steps(case).items():
            worst = max(range(len(taken)), key=taken.__getitem__)
            typical, most = _number(statistics.median(taken), 1e3), _number(taken[worst], 1e3)
            rows.append((case.label, name, str(len(taken)), typical, most, str(worst)))
    head = ("case", "competitor", "steps", "median ms", "longest ms", "which")
    return Block("Decode across a chunk's border", head=head, rows=rows)


def _distinct(items: Any) -> list[Any]:
    found: list[Any] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value * unit:.4g}"


def _ratio(taken: dict[str, float] | None) -> str:
    if not taken or "ratio" not in taken:
        return "-"
    spread = f" [{taken['low']:.2f}, {taken['high']:.2f}]" if {"low", "high"} <= taken.keys() else ""
    return f"{taken['ratio']:.2f}{spread}"


if __name__ == "__main__":
    command(__doc__.partition("\n")[0], report)
