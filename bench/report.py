"""What a run of the suite found, as a page: ``python -m bench.report FILE... [--markdown FILE]``.

Per case and competitor: milliseconds, the ratio to the case's base and ours to it with quartiles over rounds,
the rate of FLOPs against the largest that a plain product reached there, and the ratio to the floor. Every
table says by which commit it was measured; what a file lacks is listed, never guessed. A page is written only
of figures that a commit stands for; ``--keep FOLDER`` puts them into a record (:mod:`bench.record`). May be
changed here: columns and wording.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from bench.goals import table as goals
from bench.measured import MACHINE, Origins, common, condition, lines
from bench.page import Block, command
from bench.pictures import SWEEP_OF_MEMORY, pictures
from bench.results import AT, INSTRUCTIONS, RIVALS, STATIC, WHOLE_CHUNK, Case, peaks, series, steps

LEGEND = (
    "Base: the first competitor of a case. In brackets: quartiles over rounds, of ratios within a round.",
    "GFLOP/s counts the FLOPs that the algorithm needs, whoever computes them.",
    "Peak: the largest rate of a static product of that dtype in these files, on that machine.",
    "Floor: the algorithm's FLOPs at the rate of the same case's static product, by the fastest library; "
    "of a decode step, what reads the same bytes fastest, or the static product where that is a part.",
    "Beyond the peak and below the floor: 16-bit operands that are multiplied in fp32, where that is faster; "
    "a state in the cache where what reads the same bytes is not.",
    "MiB beside the operands: what torch's allocator gave out, by its profiler. What C++ allocates itself, "
    "such as oneDNN's packed operands, is not seen. Memory of a layer's forward or training step is the peak "
    "of a fresh process as the system counts it, where nothing is missed.",
    "Memory layers (titans-pytorch) compute another function, with projections of their own: their times say "
    "what such a layer costs, not that one form of the same function is faster.",
)
_KINDS = (
    *("forward", "prefill", "training", "decode", WHOLE_CHUNK, "border", "host"),
    *("model logits", "model prefill", "model training", "model decode"),
    *("memory, forward", "memory, training", "growth", "startup", INSTRUCTIONS, "memory layers"),
)
# Fields without which a table of that kind has holes.
_NEEDED = {
    "growth": ("times", "variable", "values", "fit", "bytes", "fit_bytes"),
    "border": ("steps",),
    **dict.fromkeys(("memory, forward", "memory, training"), (*SWEEP_OF_MEMORY, "fit_bytes", "fit_extra")),
    "startup": ("seconds", "ratio"),
    INSTRUCTIONS: ("per_step", "tool"),
    "decode": ("times", "floor", "ours_over"),
    WHOLE_CHUNK: ("times", "floor", "ours_over", "mean", "median"),
    **dict.fromkeys(("forward", "prefill", "training"), ("times", "flops", "static_flops", "ours_over")),
}
_HEAD = ("case", "competitor", "ms", "/ base", "ours / it", "GFLOP/s", "of peak", "/ floor")


def report(cases: Sequence[Case]) -> list[Block]:
    """Goals of the cases, what they share, a table or more per kind and machine, and what is missing."""
    known, shown = common(cases), pictures(cases)
    blocks = [goals(cases), Block("Environment", lines(known) or ["nothing that is recorded holds for all"])]
    for kind, alike in _by(cases, lambda case: case.kind, _KINDS):
        for _, here in _by(alike, lambda case: [case.environment.get(name) for name in MACHINE]):
            blocks += _kind(kind, here, peaks(cases), known, shown)
    lacking = [
        f"{c.name}: {', '.join(names)}"
        for c in cases
        if (names := c.lacks("kind", "shape", *_NEEDED.get(c.kind, ("times",))))
    ]
    if lacking:
        blocks.append(Block("Missing in the file", lacking))
    return [*blocks, Block("How to read this", list(LEGEND))]


def _kind(
    kind: str,
    cases: Sequence[Case],
    rates: dict[tuple[Any, ...], float],
    known: dict[str, Any],
    shown: dict[str, list[Case]],
) -> list[Block]:
    """The tables of one kind on one machine, with their origin and the pictures that show them."""
    alone = {"growth": _growth, "memory, forward": _memory, "memory, training": _memory}
    alone |= {"startup": _startup, INSTRUCTIONS: _instructions}
    blocks = []
    # What is a table by itself, or all cases in one.
    for alike in [[case] for case in cases] if kind in alone else [cases]:
        origins = Origins(alike, known)
        if kind in alone:
            made = alone[kind](alike[0])
        elif kind == "border":
            made = [_border(alike, origins)]
        else:
            rows = [row for c in alike for row in _rows(c, origins.label(c), rates.get(c.machine))]
            made = [Block(kind.capitalize(), head=_HEAD, rows=rows)]
            made += [_steps(alike, origins)] if kind == WHOLE_CHUNK else []
        for block in made:
            block.title += condition(alike[0], known)
            block.lines += origins.lines()
        made[0].pictures += [
            name for name, drawn in shown.items() if any(a is b for a in alike for b in drawn)
        ]
        blocks += made
    return blocks


def _rows(case: Case, label: str, peak: float | None) -> list[Sequence[str]]:
    floor, found = case.floor(peak), []
    for name, taken in case.times.items():
        seconds, static = taken.get("seconds"), name in STATIC
        flops = case.info.get("static_flops" if static else "flops")
        rate = flops / seconds if flops and seconds else None
        found.append(
            (
                label,
                name,
                _number(seconds, 1e3),
                _ratio(taken),
                _ratio((case.info.get("ours_over") or {}).get(name)),
                _number(rate, 1e-9),
                f"{rate / peak:.0%}" if rate and peak else "-",
                f"{seconds / floor:.2f}" if seconds and floor and not static else "-",
            )
        )
    return found or [(label, case.name, *["-"] * (len(_HEAD) - 2))]


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
        "ours / it": (
            {
                f"{n} (by {RIVALS[n]})" if n in RIVALS else n: list(map(_ratio, taken))
                for n, taken in over.items()
                if any(taken)
            },
            None,
        ),
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


def _memory(case: Case) -> list[Block]:
    """A row per value of the variable: peaks, what is beyond the static layer's, ours by the official's."""
    title = f"{case.kind.capitalize()}: {case.label}"
    if case.lacks(*SWEEP_OF_MEMORY):
        return [Block(title, ["no figures"])]
    variable, values, peak, extra, ratios = (case.info[n] for n in SWEEP_OF_MEMORY)
    columns = [[_number(m, 2**-20) for m in taken] for taken in (*peak.values(), *extra.values())]
    rows = [[str(x), *cells, f"{r:.2f}"] for x, *cells, r in zip(values, *columns, ratios, strict=True)]
    fits = [fit(case, "fit_bytes", n) for n in peak] + [fit(case, "fit_extra", n) for n in extra]
    head = (variable, *(f"{n} MiB" for n in peak), *(f"{n}, extra" for n in extra), "extra, ours / official")
    return [Block(title, head=head, rows=[*rows, ["fit", *fits, ""]])]


def _startup(case: Case) -> list[Block]:
    """A row per start: seconds of its phases."""
    seconds = case.info.get("seconds") or {}
    phases = list(next(iter(seconds.values()), {}))
    rows = [[name, *(f"{taken[p]:.2f}" for p in phases)] for name, taken in seconds.items()]
    said = [
        f"ours / static, {until}, {how}: {ratio:.2f}"
        for until, field in (("first answer", "ratio"), ("first token", "ratio_token"))
        for how, ratio in (case.info.get(field) or {}).items()
    ]
    return [Block("Seconds of a start", said, ("start", *phases), rows)]


def _instructions(case: Case) -> list[Block]:
    """A row per number of sequences."""
    said = [f"One decode step of `ttt::fast_weight_step`, {case.label}; counted by {case.info.get('tool')}."]
    rows = [[name, f"{count:,}"] for name, count in (case.info.get("per_step") or {}).items()]
    return [Block("Instructions of a step on the host", said, ("sequences", "instructions"), rows)]


def _steps(cases: Sequence[Case], origins: Origins) -> Block:
    """The mean, which pays for the write and for v, and the median, which may not."""
    rows: list[Sequence[str]] = []
    for case in cases:
        mean, median = (case.info.get(name) or {} for name in ("mean", "median"))
        rows += [
            (origins.label(case), name, _number(mean[name], 1e3), _number(median.get(name), 1e3))
            for name in mean
        ]
    head = ("case", "competitor", "mean ms", "median ms")
    return Block("Mean and median step of a whole chunk", head=head, rows=rows)


def _border(cases: Sequence[Case], origins: Origins) -> Block:
    rows: list[Sequence[str]] = []
    for case in cases:
        for name, taken in steps(case).items():
            worst = max(range(len(taken)), key=taken.__getitem__)
            typical, most = _number(statistics.median(taken), 1e3), _number(taken[worst], 1e3)
            rows.append((origins.label(case), name, str(len(taken)), typical, most, str(worst)))
    head = ("case", "competitor", "steps", "median ms", "longest ms", "which")
    return Block("Decode across a chunk's border", head=head, rows=rows)


def _by(
    cases: Sequence[Case], key: Callable[[Case], Any], order: Sequence[Any] = ()
) -> list[tuple[Any, list[Case]]]:
    """Cases of an equal key together: keys in this order, others behind as they come."""
    keys = [key(case) for case in cases]
    distinct = [k for k in order if k in keys]
    for k in keys:
        distinct += [] if k in distinct else [k]
    return [(k, [case for case in cases if key(case) == k]) for k in distinct]


def _number(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value * unit:.4g}"


def _ratio(taken: dict[str, float] | None) -> str:
    if not taken or "ratio" not in taken:
        return "-"
    spread = f" [{taken['low']:.2f}, {taken['high']:.2f}]" if {"low", "high"} <= taken.keys() else ""
    return f"{taken['ratio']:.2f}{spread}"


if __name__ == "__main__":
    command(__doc__.partition("\n")[0], report, keeps=True)
