"""Plain text of a report: tables and wrapped lines of at most ``WIDTH`` columns.

May be changed here: how it looks. What is reported belongs to ``report.py``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ttt_compiler.report import Row

WIDTH = 110


def table(rows: Sequence[Row]) -> list[str]:
    """One line per MLP, then one per reason that they share."""
    letters: dict[str, str] = {}
    for row in rows:
        if row.reason is not None:
            letters.setdefault(row.reason, _letter(len(letters)))
    cells = [("block", "weight", "D", "F", "activation", "gated", "bias", "causal", "fast")]
    cells += [
        (
            str(row.block),
            _elided(row.weight, 48),
            str(row.d_model),
            str(row.d_ff),
            _elided(row.activation or "?", 14),
            _yes_no(row.gated),
            _yes_no(row.bias),
            _yes_no(row.causal),
            "yes" if row.reason is None else f"no ({letters[row.reason]})",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    right = {0, 2, 3}
    lines = [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    for reason, letter in letters.items():
        lines += wrapped(reason, f"  ({letter}) ")
    return lines


def _letter(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else str(index)


def _elided(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    head = (width - 3) // 2
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def _yes_no(value: bool | None) -> str:
    return "?" if value is None else "yes" if value else "no"


def mebibytes(size: int) -> str:
    """A number of bytes, exactly and in MiB."""
    return f"{size:,} bytes ({size / 2**20:.1f} MiB)"


def wrapped(text: str, head: str) -> Iterable[str]:
    """``text`` behind ``head``, in lines of at most ``WIDTH`` columns; its own line breaks stay."""
    indent = " " * len(head)
    out: list[str] = []
    for i, line in enumerate(text.splitlines() or [""]):
        out += textwrap.wrap(
            line.strip(),
            WIDTH,
            initial_indent=indent if i else head,
            subsequent_indent=indent,
            break_on_hyphens=False,
        ) or [head.rstrip()]
    return out
