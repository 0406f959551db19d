"""Which picture shows which cases: so that a page links what ``bench/plots.py`` draws.

May be changed here: names of pictures, and what lies in one together.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.results import STATIC, Case, series, steps

# Bars of ratios, a group per case.
MODELS = ("model logits", "model prefill", "model training", "model decode")
RATIOS = ("forward", "prefill", "training", *MODELS, "memory layers")
SWEPT = ("growth", "memory, forward", "memory, training")
SWEEP_OF_MEMORY = ("variable", "values", "bytes", "extra_bytes", "extra_ratio")


def pictures(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """The cases of each picture, by its file's name without suffix; what cannot be drawn is in none."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        if not (name := _name(case)):
            continue
        if case.kind in SWEPT:
            # Two sweeps of one variable are two files.
            several = sum(x == name or x.startswith(f"{name}-again") for x in found)
            name += f"-again{several}" if several else ""
        found.setdefault(name, []).append(case)
    return found


def compared(case: Case) -> list[str]:
    """Competitors of which there is a ratio to the case's base, and that are no static product."""
    return [name for name, t in case.times.items() if name not in STATIC and "ratio" in t]


def _name(case: Case) -> str | None:
    variable = str(case.info.get("variable", "")).replace("·", "")
    kind = case.kind.replace(", ", "-").replace(" ", "-")
    name = None
    if case.kind == "growth":
        name = f"growth-{variable}" if series(case) else None
    elif case.kind in SWEPT:
        name = None if case.lacks(*SWEEP_OF_MEMORY) else f"{kind}-{variable}"
    elif case.kind == "border":
        name = ("border-model" if "name" in case.shape else "border") if steps(case) else None
    elif case.kind == "decode":
        name = "decode" if case.times and not case.lacks("shape") else None
    elif case.kind in RATIOS:
        name = f"ratios-{kind}" if compared(case) else None
    return f"{name}-tuned" if name and case.tuned else name
