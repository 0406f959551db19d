"""Headings, sentences and tables, for a terminal and for a page. May be changed here: how they look."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.results import Case, load
from ttt_compiler.errors import TTTError


@dataclass
class Block:
    """A heading, sentences, and a table, any of which may be empty."""

    title: str
    lines: list[str] = field(default_factory=list)
    head: Sequence[str] = ()
    rows: list[Sequence[str]] = field(default_factory=list)


def text(blocks: Sequence[Block]) -> str:
    """For a terminal: columns side by side."""
    parts = []
    for block in blocks:
        parts.append("\n".join([block.title, *(f"  {line}" for line in block.lines)]))
        if block.rows:
            cells = [block.head, *_once(block.rows)]
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
            parts[-1] += "".join(f"\n  {line.rstrip()}" for line in lines)
    return "\n\n".join(parts) + "\n"


def markdown(blocks: Sequence[Block]) -> str:
    """For a page."""
    parts = [
        "# Benchmarks",
        "Written by `python -m bench.report FILE... --markdown FILE`; edit nothing here.",
    ]
    for block in blocks:
        parts.append(f"## {block.title}")
        if block.lines:
            parts.append(
                "\n".join(f"- {line}" for line in block.lines) if block.lines[1:] else block.lines[0]
            )
        if block.rows:
            cells = [block.head, ["---"] * len(block.head), *_once(block.rows)]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
    return "\n\n".join(parts) + "\n"


def _once(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Rows whose first cell says only what the one above does not."""
    before = [None, *(row[0] for row in rows)]
    return [("" if row[0] == b else row[0], *row[1:]) for row, b in zip(rows, before, strict=False)]


def command(description: str, blocks: Callable[[Sequence[Case]], Sequence[Block]]) -> None:
    """The command line of what makes ``blocks`` of the cases of files: prints them, or writes a page."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of pytest-benchmark, JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a page there, print nothing")
    a = parser.parse_args()
    try:
        made = blocks(load(a.files))
        if a.markdown:
            a.markdown.write_text(markdown(made))
        else:
            print(text(made), end="")
    except (TTTError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
