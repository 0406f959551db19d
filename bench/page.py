"""Headings, sentences and tables, for a terminal and for a page. May be changed here: how they look."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.record import keep, refuse_unclean
from bench.results import Case, load
from ttt_compiler.errors import TTTError


@dataclass
class Block:
    """A heading, sentences, a table, and names of pictures, any of which may be empty."""

    title: str
    lines: list[str] = field(default_factory=list)
    head: Sequence[str] = ()
    rows: list[Sequence[str]] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)


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


def markdown(blocks: Sequence[Block], pictures: Path | None = None) -> str:
    """For a page, with those pictures that the folder beside it has."""
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
        for name in block.pictures if pictures else ():
            if (pictures / f"{name}.svg").exists():
                parts.append(f"![{name}]({pictures.name}/{name}.svg)")
    return "\n\n".join(parts) + "\n"


def _once(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Rows whose first cell says only what the one above does not."""
    before = [None, *(row[0] for row in rows)]
    return [("" if row[0] == b else row[0], *row[1:]) for row, b in zip(rows, before, strict=False)]


def command(
    description: str, blocks: Callable[[Sequence[Case]], Sequence[Block]], *, keeps: bool = False
) -> None:
    """The command line of what makes ``blocks`` of the cases of files: prints them, or writes a page.

    Pictures are looked for in the folder that is called like the page. With ``keeps`` it can put the cases
    into a record, and a page is of all that is there then.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of pytest-benchmark, JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a page there, print nothing")
    parser.add_argument("--unclean", action="store_true", help="write what a tree with changes gave, too")
    if keeps:
        parser.add_argument("--keep", type=Path, metavar="FOLDER", help="put the figures into this record")
    a = parser.parse_args()
    kept = a.keep if keeps else None
    try:
        cases = load(a.files)
        if (a.markdown or kept) and not a.unclean:
            refuse_unclean(cases)
        if kept:
            cases = load(keep(cases, kept))
        if a.markdown:
            a.markdown.write_text(markdown(blocks(cases), a.markdown.with_suffix("")))
        elif not kept:
            print(text(blocks(cases)), end="")
    except (TTTError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
