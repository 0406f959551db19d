"""Pictures of a run of the suite: ``python -m bench.plots FILE... --out DIR``.

``growth-X.svg`` (cost and memory against X), ``ratios-KIND.svg`` (the grid of layers), ``border.svg`` (steps
of a decode across a chunk's end), each where the files have it; equal figures make equal files. May be
changed here: what is drawn, and its style.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bench.report import fit, steps
from bench.results import AT, OURS, STATIC, Case, load, series
from ttt_compiler.errors import TTTError

_STYLE = {
    "svg.hashsalt": "ttt",  # ids that do not change from run to run
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_GRID = ("forward", "prefill", "training")


def plots(cases: Sequence[Case], folder: Path) -> list[Path]:
    """Write what can be drawn; returns the files.

    Raises:
        TTTError: nothing can.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    seen: Counter[str] = Counter()
    with matplotlib.rc_context(_STYLE):
        for name, figure in _figures(cases):
            # Two sweeps of one variable are two files.
            seen[name] += 1
            path = folder / (f"{name}.svg" if seen[name] == 1 else f"{name}-{seen[name]}.svg")
            figure.savefig(path, metadata={"Date": None})
            written.append(path)
    if not written:
        raise TTTError("nothing to draw: no case has times with ratios, values of a sweep, or steps")
    return written


def _figures(cases: Sequence[Case]) -> Iterator[tuple[str, Figure]]:
    colours = _colours(cases)
    for case in cases:
        if case.kind == "growth" and series(case):
            variable = str(case.info.get("variable", "?"))
            yield f"growth-{variable.replace('·', '')}", _growth(case, variable, colours)
    for kind in _GRID:
        if alike := [c for c in cases if c.kind == kind and _ratio_names(c)]:
            yield f"ratios-{kind}", _ratios(kind, alike, colours)
    for case in cases:
        if case.kind == "border" and steps(case):
            yield "border", _border(case, colours)


def _colours(cases: Sequence[Case]) -> dict[str, str]:
    """One per competitor in all pictures: ours and the static layer first."""
    drawn = (n.split(AT)[0] for c in cases for n in (*c.times, *steps(c)))
    names = dict.fromkeys((OURS, STATIC[0], *(n for n in drawn if n not in STATIC)))
    return {name: f"C{i % 10}" for i, name in enumerate(names)}


def _growth(case: Case, variable: str, colours: dict[str, str]) -> Figure:
    memory = case.info.get("bytes") or {}
    figure = Figure(figsize=(9.6 if memory else 5.2, 4.2), layout="constrained")
    axes = figure.subplots(1, 2 if memory else 1, squeeze=False)[0]
    _lines(axes[0], case, "fit", {n: [s * 1e3 for s in y] for n, y in series(case).items()}, colours)
    axes[0].set_ylabel("ms")
    if memory:
        _lines(axes[1], case, "fit_bytes", {n: [m * 2**-20 for m in y] for n, y in memory.items()}, colours)
        axes[1].set_ylabel("MiB beside the operands")
    for one in axes:
        one.set_xlabel(variable)
    figure.suptitle(f"{case.label}, one variable: {variable}")
    return figure


def _lines(axes: Any, case: Case, field: str, found: dict[str, list[float]], colours: dict[str, str]) -> None:
    values = case.info["values"]
    for name, taken in found.items():
        label = f"{name}: {fit(case, field, name)}"
        axes.plot(values, taken, marker="o", color=colours.get(name), label=label)
    if not any("slope" in one for one in (case.info.get(field) or {}).values()):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.set_xticks(values, [str(x) for x in values])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _ratios(kind: str, cases: Sequence[Case], colours: dict[str, str]) -> Figure:
    """Of every case its competitors' ratios to the static layer, with quartiles."""
    names = dict.fromkeys(n for c in cases for n in _ratio_names(c))
    figure = Figure(figsize=(8.0, 1.2 + 0.25 * len(cases) * (len(names) + 1)), layout="constrained")
    axes, height = figure.subplots(), 1.0 / (len(names) + 1)
    for i, name in enumerate(names):
        taken = [(y, c.times[name]) for y, c in enumerate(cases) if name in _ratio_names(c)]
        ratios = [t["ratio"] for _, t in taken]
        spread = [
            [max(t["ratio"] - t.get("low", t["ratio"]), 0.0) for _, t in taken],
            [max(t.get("high", t["ratio"]) - t["ratio"], 0.0) for _, t in taken],
        ]
        at = [y + (i - (len(names) - 1) / 2) * height for y, _ in taken]
        axes.barh(
            at, ratios, height, xerr=spread, color=colours[name], label=name, error_kw={"linewidth": 0.8}
        )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), [c.label for c in cases])
    axes.invert_yaxis()
    axes.set_xlabel(f"{kind}: seconds / seconds of the static layer")
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    return figure


def _ratio_names(case: Case) -> list[str]:
    return [name for name, t in case.times.items() if name not in STATIC and "ratio" in t]


def _border(case: Case, colours: dict[str, str]) -> Figure:
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, taken in steps(case).items():
        axes.plot([s * 1e3 for s in taken], marker=".", color=colours[name], label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0.0)
    axes.set_title(f"decode across a chunk's border, {case.label}")
    axes.legend(fontsize="small")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of pytest-benchmark, JSON")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if missing")
    a = parser.parse_args()
    try:
        for path in plots(load(a.files), a.out):
            print(f"written: {path}")
    except (TTTError, OSError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main()
