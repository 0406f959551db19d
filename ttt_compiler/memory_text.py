"""Plain text of a memory plan: one table, and the formulas with their numbers.

May be changed here: how it looks. What is planned belongs to ``memory.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ttt_compiler.report_text import wrapped

if TYPE_CHECKING:
    from ttt_compiler.memory import MemoryPlan


def render(plan: MemoryPlan) -> str:
    """The plan as text of at most ``report_text.WIDTH`` columns."""
    head = (
        f"{plan.model} in {plan.dtype}: batch {plan.batch:,}, context {plan.context:,}, {plan.cache} cache, "
        f"layers={plan.layers}"
    )
    kv, fast = plan.kv_bytes, plan.fast_weight_bytes
    rows = [("MiB", "layers", "one layer", "one sequence", f"batch of {plan.batch:,}")]
    for kind in plan.kv:
        one = kind.layer_bytes(plan.context)
        rows.append(_row(f"keys and values: {kind.name}", plan.batch, kind.layers, one))
    rows += [_row(f"fast weights: {s.name}", plan.batch, s.sites, s.nbytes) for s in plan.sites]
    rows += [
        ("together", "", "", _mib(plan.sequence_bytes), _mib(plan.batch_bytes)),
        ("weights of the model", "", "", "", _mib(plan.weight_bytes)),
        ("added conv and P", "", "", "", _mib(plan.added_bytes)),
        ("all", "", "", "", _mib(plan.total_bytes)),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [*wrapped(head, ""), ""]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    lines.append("")
    if kv:
        even = plan.even_context
        when = "never take as much" if even is None else f"take as much at {even:,} tokens"
        share = f"fast weights take {100 * fast / kv:.1f} % of what keys and values take, which {when}"
        lines += [*wrapped(share, ""), ""]
    lines.append("bytes of one layer and sequence:")
    for kind in plan.kv:
        value = f"{kind.formula(plan.context)} = {kind.layer_bytes(plan.context):,}"
        lines += wrapped(value, f"  {kind.name}: ")
    for site in plan.sites:
        where = " ".join(f"{name}={value}" for name, value in site.variables.items())
        lines += wrapped(f"{plan.formula} = {site.nbytes:,}  ({where})", f"  {site.name}: ")
    lines.append("")
    for note in plan.notes:
        lines += wrapped(note, "  - ")
    return "\n".join(lines)


def _row(name: str, batch: int, layers: int, one: int) -> tuple[str, str, str, str, str]:
    return name, str(layers), _mib(one), _mib(layers * one), _mib(batch * layers * one)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
