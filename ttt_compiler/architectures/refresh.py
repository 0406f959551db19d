"""The sweep as a command: a bar while it runs, what came out, and the page rewritten.

May be changed here: what is shown. What is checked belongs to ``audit.py``, the page to ``table.py``.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ttt_compiler.architectures import table
from ttt_compiler.architectures.sweep import sweep
from ttt_compiler.architectures.tiny import causal_lm_types
from ttt_compiler.doctor import major_minor
from ttt_compiler.errors import ConfigError, TTTError


def versions() -> table.Versions:
    """Of the installed libraries."""
    return table.Versions(major_minor(torch.__version__), major_minor(transformers.__version__))


def chosen_types(text: str | None) -> tuple[str, ...]:
    """The types of a comma-separated list, or all.

    Raises:
        ConfigError: transformers does not know one of them.
    """
    known = causal_lm_types()
    if text is None:
        return known
    types = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [t for t in types if t not in known]
    if unknown or not types:
        wrong = unknown[0] if unknown else "nothing"
        near = difflib.get_close_matches(wrong, known, n=5, cutoff=0.5) or ["llama", "gpt2"]
        raise ConfigError(
            f"{wrong} is no causal language model type of the installed transformers. Type one of: "
            f"{', '.join(near)}, or leave --types out for all {len(known)}"
        )
    return types


def refresh(types: Sequence[str], *, jobs: int, write: Path | None, console: Console) -> list[table.Row]:
    """Audit these types, say what came out, and write their rows into the page.

    Rows of other types stay as the page has them.

    Raises:
        TTTError: the page cannot be read or written, or its other rows are of other versions.
    """
    kept = {} if write is None else _kept(write, types)
    rows = _audited(types, jobs, console)
    for line in [*table.totals(rows), *(f"  {line}" for line in table.wrongs(rows))]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if write is not None:
        _write(write, table.page({**kept, **{r.model_type: r for r in rows}}.values(), versions()))
    return rows


def _audited(types: Sequence[str], jobs: int, console: Console) -> list[table.Row]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("architectures", total=len(types))
        for audit in sweep(types, jobs=jobs):
            rows.append(table.row(audit))
            progress.update(bar, advance=1, description=audit.model_type)
    return sorted(rows, key=lambda r: r.model_type)


def _kept(path: Path, types: Sequence[str]) -> dict[str, table.Row]:
    """What the page says of other types that still exist, read before anything is audited for nothing."""
    if not path.parent.is_dir():
        raise TTTError(f"no such folder: {path.parent}. Type: mkdir -p {path.parent}")
    if not path.exists():
        return {}
    try:
        rows, written_on = table.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise TTTError(f"{path}: {e}") from e
    others = set(causal_lm_types()) - set(types)
    if others and written_on != versions():
        raise TTTError(
            f"{path} was written on torch {written_on.torch} and transformers {written_on.transformers}, and "
            f"these are torch {versions().torch} and transformers {versions().transformers}: leave --types "
            "out, so that all of it is written again"
        )
    return {name: row for name, row in rows.items() if name in others}


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise TTTError(f"{path} cannot be written: {e}") from e
