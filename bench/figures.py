"""Figures of a case that a goal bounds: ours against a competitor, a floor, or itself.

May be changed here: how a figure is made of what a run left. What it should be is in ``bench/goals.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.results import AT, OURS, Case

# So many digits say that 1.0503 is above 1.05; more are not kept.
_DIGITS = range(3, 7)


@dataclass(frozen=True)
class Figure:
    """A value, quartiles of it where the rounds have them, and the point of a sweep where it was found."""

    value: float
    low: float | None = None
    high: float | None = None
    where: str = ""

    def said(self, bound: float) -> str:
        """In as many digits as show on which side of the bound it is."""
        sides = (self.value < bound, self.value > bound)
        texts = [f"{self.value:.{digits}g}" for digits in _DIGITS]
        text = next((t for t in texts if (float(t) < bound, float(t) > bound) == sides), texts[-1])
        return text if self.low is None or self.high is None else f"{text} [{self.low:.3g}, {self.high:.3g}]"


Figured = Callable[[Case], Figure | None]


def over(name: str) -> Figured:
    """Ours by a competitor."""

    def figure(case: Case) -> Figure | None:
        found = (case.info.get("ours_over") or {}).get(name)
        return Figure(found["ratio"], found["low"], found["high"]) if found else None

    return figure


def gain(name: str) -> Figured:
    """How many times as fast as a competitor ours is."""

    def figure(case: Case) -> Figure | None:
        found = over(name)(case)
        return Figure(1 / found.value, 1 / (found.high or 1), 1 / (found.low or 1)) if found else None

    return figure


def along(name: str) -> Figured:
    """Of a sweep, ours by a competitor at the point where it is slowest."""

    def figure(case: Case) -> Figure | None:
        points = {
            x: found
            for x in case.info.get("values") or []
            if (found := (case.info.get("ours_over") or {}).get(f"{name}{AT}{x}"))
        }
        if not points:
            return None
        at = max(points, key=lambda x: points[x]["ratio"])
        worst = points[at]
        return Figure(worst["ratio"], worst["low"], worst["high"], f"{case.info.get('variable')}={at}")

    return figure


def over_floor(case: Case) -> Figure | None:
    """Ours by the case's floor."""
    ours, floor = case.times.get(OURS), case.floor()
    if not ours or not floor:
        return None
    scale = ours["seconds"] / floor / ours["ratio"]
    return Figure(ours["seconds"] / floor, ours["low"] * scale, ours["high"] * scale)


def host(case: Case) -> Figure | None:
    """Microseconds of a step beside those of a product of the same tiny size."""
    if OURS not in case.times:
        return None
    return Figure((case.times[OURS]["seconds"] - case.times["static"]["seconds"]) * 1e6)


def longest(case: Case) -> Figure | None:
    """The longest step by the median step."""
    return Figure(case.info["worst"]) if "worst" in case.info else None


def extra_memory(tokens: int) -> Figured:
    """Memory beyond the static layer's at so many tokens, ours by the official form's."""

    def figure(case: Case) -> Figure | None:
        points = zip(case.info.get("values") or [], case.info.get("extra_ratio") or [], strict=True)
        return next((Figure(ratio) for at, ratio in points if at == tokens), None)

    return figure


def growth_with_chunks(case: Case) -> Figure | None:
    """Of a sweep of C, the exponent of ours in the number of chunks T/C."""
    fitted = (case.info.get("fit_extra") or {}).get(OURS)
    return Figure(-fitted["exponent"]) if fitted else None
