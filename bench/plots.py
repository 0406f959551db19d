"""Pictures of a run of the suite: ``python -m bench.plots FILE... --out DIR``.

Cost and memory against one variable, ratios of layers and models, a step of decode along a text, and the
steps of a chunk: each where the files have it. ``bench/pictures.py`` says which case is in which. Equal
figures make equal files. May be changed here: how something is drawn, and its style.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bench.pictures import compared, pictures
from bench.report import fit
from bench.results import AT, OURS, STATIC, Case, load, series, steps
from ttt_compiler.errors import TTTError

_STYLE = {
    "svg.hashsalt": "ttt",  # ids that do not change from run to run
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_PRECISE = re.compile(r"\d+\.\d{2,}")


def plots(cases: Sequence[Case], folder: Path) -> list[Path]:
    """Write what can be drawn; returns the files.

    Raises:
        TTTError: nothing can.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    colours = _colours(cases)
    with matplotlib.rc_context(_STYLE):
        for name, drawn in pictures(cases).items():
            written.append(folder / f"{name}.svg")
            written[-1].write_text(_svg(_figure(drawn, colours)))
    if not written:
        raise TTTError("nothing to draw: no case has times with ratios, values of a sweep, or steps")
    return written


def _svg(figure: Figure) -> str:
    """Without a date, and drawn to a tenth of a point: thousands of steps are many digits."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return re.sub(r' d="[^"]*"', lambda path: _PRECISE.sub(_rounded, path[0]), out.getvalue())


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}"


def _figure(cases: Sequence[Case], colours: dict[str, str]) -> Figure:
    kind = cases[0].kind
    if kind == "growth":
        return _growth(cases[0], colours)
    if kind.startswith("memory, "):
        return _memory(cases[0], colours)
    if kind == "decode":
        return _decode(cases, colours)
    return _border(cases) if kind == "border" else _ratios(kind, cases, colours)


def _colours(cases: Sequence[Case]) -> dict[str, str]:
    """One per competitor in all pictures: ours and the static layer first."""
    swept = (c.info.get("extra_bytes") or {} for c in cases)
    drawn = [n.split(AT)[0] for names in (*(c.times for c in cases), *swept) for n in names]
    names = dict.fromkeys((OURS, STATIC[0], *(n for n in drawn if n not in STATIC)))
    return {name: f"C{i % 10}" for i, name in enumerate(names)}


def _growth(case: Case, colours: dict[str, str]) -> Figure:
    variable = str(case.info.get("variable", "?"))
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


def _memory(case: Case, colours: dict[str, str]) -> Figure:
    """Peaks of fresh processes, and what of them is beyond the static layer's."""
    variable = case.info["variable"]
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, field, fits, said in zip(
        panels,
        ("bytes", "extra_bytes"),
        ("fit_bytes", "fit_extra"),
        ("peak, MiB", "beyond the static layer's, MiB"),
        strict=True,
    ):
        found = {n: [m * 2**-20 for m in y] for n, y in case.info[field].items()}
        _lines(axes, case, fits, found, colours)
        axes.set_xlabel(variable)
        axes.set_ylabel(said)
    figure.suptitle(f"{case.kind}, a fresh process: {case.label}")
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
    names = dict.fromkeys(n for c in cases for n in compared(c))
    figure = Figure(figsize=(8.0, 1.2 + 0.25 * len(cases) * (len(names) + 1)), layout="constrained")
    axes, height = figure.subplots(), 1.0 / (len(names) + 1)
    for i, name in enumerate(names):
        taken = [(y, c.times[name]) for y, c in enumerate(cases) if name in compared(c)]
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
    axes.set_xlabel(f"{kind}: seconds / seconds of static")
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    return figure


def _decode(cases: Sequence[Case], colours: dict[str, str]) -> Figure:
    """A panel per dtype and B: milliseconds of a step at the places of a text that were measured."""
    kinds = sorted({(str(c.shape.get("dtype")), int(c.shape.get("batch", 1))) for c in cases})
    columns = len({batch for _, batch in kinds})
    rows = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(3.4 * columns, 0.8 + 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    labels: dict[str, Any] = {}
    for axes, (dtype, batch) in zip(panels.flat, kinds, strict=False):
        here = [c for c in cases if (c.shape.get("dtype"), c.shape.get("batch", 1)) == (dtype, batch)]
        here.sort(key=lambda c: int(c.shape.get("past", 0)))
        for name in dict.fromkeys(n for c in here for n in c.times):
            at = [i for i, c in enumerate(here) if name in c.times]
            taken = [1e3 * here[i].times[name]["seconds"] for i in at]
            (labels[name],) = axes.plot(at, taken, marker="o", color=colours.get(name))
        axes.set_xticks(range(len(here)), [str(c.shape.get("past")) for c in here])
        axes.set_ylim(bottom=0.0)
        axes.set_title(f"B={batch} {dtype}")
        axes.set_xlabel("N, tokens read before")
        axes.set_ylabel("ms a step")
    _leave_out(panels, len(kinds))
    figure.legend(labels.values(), labels, loc="outside upper center", ncols=5, fontsize="small")
    return figure


def _border(cases: Sequence[Case]) -> Figure:
    """A panel per chunk and place, a line per B: every step of a chunk by the median step."""
    alike: dict[str, list[Case]] = {}
    for case in cases:
        at = {name: value for name, value in case.shape.items() if name != "batch"}
        alike.setdefault(Case(case.kind, {"shape": at}).label, []).append(case)
    columns = min(3, len(alike))
    rows = math.ceil(len(alike) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, (label, here) in zip(panels.flat, alike.items(), strict=False):
        for case in here:
            for name, taken in steps(case).items():
                typical = statistics.median(taken)
                batch = f"{name}, B={case.shape['batch']}" if "batch" in case.shape else name
                axes.plot([s / typical for s in taken], linewidth=0.7, label=batch)
        axes.set_title(label, fontsize="small")
        axes.set_xlabel("step")
        axes.set_ylabel("by the median step")
        axes.set_ylim(bottom=0.0)
        axes.legend(fontsize="x-small")
    _leave_out(panels, len(alike))
    return figure


def _leave_out(panels: Any, used: int) -> None:
    for axes in panels.flat[used:]:
        axes.remove()


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
