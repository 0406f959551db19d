"""By which commit, when and on what the cases of a table were measured, in few words.

May be changed here: what is said once for a whole page, once a table, and at a single case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.results import Case

# Cases that differ in one of these stand in no table together.
MACHINE = ("cpu", "threads", "allocator")
_RUN = ("commit", "date")


def common(cases: Sequence[Case]) -> dict[str, Any]:
    """What all environments agree on, but commit and date, which every table says."""
    first, *rest = [case.environment for case in cases]
    return {
        name: value
        for name, value in first.items()
        if name not in _RUN and all(name in one and one[name] == value for one in rest)
    }


def lines(environment: dict[str, Any]) -> list[str]:
    """One a field."""
    return [f"{name}: {_value(value)}" for name, value in environment.items()]


def condition(case: Case, known: dict[str, Any]) -> str:
    """In brackets, what sets the tables of this machine apart from those of another.

    The usual allocator is not said, since a page has few tables with another.
    """
    said = {name: case.environment.get(name) for name in MACHINE if name not in known}
    found = lines({n: x for n, x in said.items() if x is not None and (n, x) != ("allocator", "default")})
    return f" ({', '.join(found)})" if found else ""


class Origins:
    """Of the cases of one table. Where there are several, each is numbered and each case has its number."""

    def __init__(self, cases: Sequence[Case], known: dict[str, Any]) -> None:
        self._known = known
        self._found = list(dict.fromkeys(map(self._said, cases)))

    def lines(self) -> list[str]:
        """A sentence per origin."""
        if len(self._found) == 1:
            return [f"Measured at {self._found[0]}."]
        return [f"[{i}] measured at {said}." for i, said in enumerate(self._found, 1)]

    def label(self, case: Case) -> str:
        """The case's label, with the number of its origin where there are several."""
        number = f" [{self._found.index(self._said(case)) + 1}]" if len(self._found) > 1 else ""
        return f"{case.label}{number}"

    def _said(self, case: Case) -> str:
        day = str(case.environment.get("date") or "").partition("T")[0]
        rest = {
            name: value
            for name, value in case.environment.items()
            if name not in (*_RUN, *MACHINE, *self._known)
        }
        return ", ".join(filter(None, (f"commit {case.commit}", day, *lines(rest))))


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (", ".join(map(str, value)) if isinstance(value, list) else str(value or "")) or "none"
