"""Figures that the repository keeps: what ``python -m bench.report FILE... --keep FOLDER`` writes.

A file per kind of case, in which every case names the environment it was measured in. Kept is what a page or
a picture needs, to five digits, and no time of a single round. A case that is there already is replaced, so
that a part of the suite can be measured again; to drop cases that the suite no longer has, remove the file
first. May be changed here: the format; :func:`bench.results.load` reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import WHOLE_CHUNK, Case, load
from ttt_compiler.errors import TTTError

_DIGITS = 5
# Thousands of single steps, of which a page has the mean and the median.
_LEFT_OUT = {WHOLE_CHUNK: ("steps",)}


def refuse_unclean(cases: Sequence[Case]) -> None:
    """A figure that is published names a commit that whoever doubts it can check out.

    Raises:
        TTTError: one was measured in a tree with changes.
    """
    for case in cases:
        if case.commit.endswith("+changes"):
            raise TTTError(
                f"{case.source}: {case.name} was measured in a tree with changes ({case.commit}), which no "
                "commit has. Commit and measure again, or add --unclean, which the page then says"
            )


def keep(cases: Sequence[Case], folder: Path) -> list[Path]:
    """Put the cases into the record, whose files are returned.

    Of one name, machine and allocator the last one stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = sorted(folder.glob("*.json"))
    last = {_identity(case): case for case in (*(load(before) if before else ()), *cases)}
    kinds: dict[str, list[Case]] = {}
    for _, case in sorted(last.items(), key=lambda pair: _in_order(pair[0])):
        kinds.setdefault(re.sub(r"\W+", "-", case.kind), []).append(case)
    written = []
    for kind, alike in sorted(kinds.items()):
        written.append(folder / f"{kind}.json")
        written[-1].write_text(_file(alike))
    return written


def _identity(case: Case) -> tuple[str, ...]:
    return (case.name, str(case.tuned), *(str(case.environment.get(name)) for name in ("cpu", "threads")))


def _in_order(names: tuple[str, ...]) -> list[list[Any]]:
    """Numbers within a name by their size. Every second part is one."""
    return [[int(x) if i % 2 else x for i, x in enumerate(re.split(r"(\d+)", name))] for name in names]


def _file(cases: Sequence[Case]) -> str:
    """A line per environment and per case, so that a change of one shows as one."""
    environments: list[dict[str, Any]] = []
    lines = []
    for case in cases:
        if case.environment not in environments:
            environments.append(case.environment)
        at = environments.index(case.environment)
        left_out = _LEFT_OUT.get(case.kind, ())
        info = {name: _rounded(value) for name, value in case.info.items() if name not in left_out}
        lines.append(_line({"name": case.name, "environment": at, "extra_info": info}))
    head, body = ",\n".join(map(_line, environments)), ",\n".join(lines)
    return f'{{"environments": [\n{head}\n],\n"benchmarks": [\n{body}\n]}}\n'


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
