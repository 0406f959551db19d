"""``explain`` as one page: the blocks of the model, the dataflow that was matched, the cost.

The page needs nothing but itself. Weight names, reasons and operator names come from strangers: every
text passes ``escape``, and the page's own policy lets no script run but the one it is delivered with.
May be changed here: what the page says and its order. Numbers come from the report, never from here.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ttt_compiler.errors import TTTError
from ttt_compiler.passes.dataflow import Dataflow
from ttt_compiler.report import LEFT_OUT, Report, Row
from ttt_compiler.report_assets import SCRIPT, STYLE
from ttt_compiler.report_svg import draw, role_text

_NAMES_PER_REASON = 200
_BLOCK_NUMBER = re.compile(r"^(.*?(?:^|\.))(\d+)(?:\.|$)")
_STATUS = {
    "fast": ("\N{BLACK DIAMOND}", "fast weight"),
    "out": ("\N{WHITE DIAMOND}", "left out"),
    "refused": ("\N{MULTIPLICATION SIGN}", "refused"),
}


def save(report: Report, path: str | Path) -> Path:
    """Write the page and return its path.

    Raises:
        TTTError: the file cannot be written.
    """
    path = check_path(path)
    try:
        path.write_text(render(report), encoding="utf-8")
    except OSError as e:
        raise TTTError(f"{path}: the page cannot be written: {e.strerror or e}") from e
    return path


def check_path(path: str | Path) -> Path:
    """Where a page can be written, as a ``Path``; nothing is written yet.

    Raises:
        TTTError: the folder is missing, or the path is a folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise TTTError(f"{path}: there is no folder {path.parent}. Type: mkdir -p {path.parent}")
    if path.is_dir():
        raise TTTError(f"{path} is a folder; name a file in it, such as {path / 'explain.html'}")
    return path


def render(report: Report) -> str:
    """The report as the text of an HTML file."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    body = [
        f"<h1>{_text(report.headline)}</h1>",
        _problems(report.problems),
        _main(report),
        _costs(report),
        _configuration(report),
        _rejected(report),
    ]
    page = "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(report.model)}: fast weights</title>",
            f"<style>{STYLE}</style></head><body>",
            *(part for part in body if part),
            f"<script>{SCRIPT}</script></body></html>",
            "",
        ]
    )
    # Names may hold what no file can (lone surrogates).
    return page.encode("utf-8", "replace").decode("utf-8")


def _text(value: object) -> str:
    return escape(str(value))


def _main(report: Report) -> str:
    if not report.rows:
        return ""
    options = "".join(
        f'<option value="site={i}">{i}: {_text(row.weight)} ({_STATUS[_status(row)][1]})</option>'
        for i, row in enumerate(report.rows)
    )
    return "\n".join(
        [
            '<div class="main"><nav aria-labelledby="blocks"><h2 id="blocks">Blocks, top to bottom</h2>',
            '<ol class="blocks" tabindex="0">',
            *_blocks(report),
            "</ol></nav>",
            '<main><h2 id="matched">What was matched</h2>',
            f'<label class="picker">Site <select id="picker">{options}</select></label>',
            *_flows(report.rows),
            "</main></div>",
        ]
    )


def _blocks(report: Report) -> Iterable[str]:
    """Every block with its MLPs; one that is only known from other weights has none."""
    rows: dict[int, list[int]] = {}
    for i, row in enumerate(report.rows):
        rows.setdefault(row.block, []).append(i)
    for block in sorted({*rows, *_blocks_without_mlp(report)}):
        inner = "".join(_link(i, report.rows[i]) for i in rows.get(block, []))
        inner = inner or '<span class="none">no MLP was found</span>'
        yield f'<li class="block"><b title="block {block}">{block}</b><div>{inner}</div></li>'


def _blocks_without_mlp(report: Report) -> set[int]:
    """Numbers that other weights carry where the MLPs' weights carry the number of their block."""
    found = [_BLOCK_NUMBER.match(row.weight) for row in report.rows]
    if not all(found):
        return set()
    prefixes = {m[1] for m in found if m}
    others = (_BLOCK_NUMBER.match(name) for _, names in report.rejected for name in names)
    return {int(m[2]) for m in others if m and m[1] in prefixes and len(m[2]) < 9}


def _status(row: Row) -> str:
    if row.reason is None:
        return "fast"
    return "out" if row.reason.startswith(LEFT_OUT) else "refused"


def _why(row: Row) -> str:
    """The reason as it continues the word for the status."""
    if row.reason is None:
        return ""
    return f" by {row.reason[len(LEFT_OUT) - 7 :]}" if _status(row) == "out" else f": {row.reason}"


def _link(index: int, row: Row) -> str:
    status = _status(row)
    sign, word = _STATUS[status]
    details = f"{row.d_model} \N{RIGHTWARDS ARROW} {row.d_ff} \N{RIGHTWARDS ARROW} {row.d_model}"
    details += f", {row.activation}" if row.activation else ""
    return (
        f'<a class="mlp {status}" href="#site={index}"><span class="status">{sign} {word}</span>'
        f"{_text(_why(row))}"
        f'<small class="mono">{_text(row.weight)}</small><small>{_text(details)}</small></a>'
    )


def _flows(rows: Sequence[Row]) -> Iterable[str]:
    """Every distinct dataflow once, with the sites that have it."""
    groups: dict[Dataflow | None, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.dataflow, []).append(i)
    yield '<div class="flows">'
    for flow, members in groups.items():
        first = 0 in members
        marks = "flow" + (" first" if first else "") + (" first-fast" if rows[members[0]].chosen else "")
        yield f'<section class="{marks}">'
        yield from (_site(i, rows[i]) for i in members)
        yield from _drawing(flow, len(members), rows[members[0]])
        yield "</section>"
    yield "</div>"


def _site(index: int, row: Row) -> str:
    status = _status(row)
    facts = {
        "status": _STATUS[status][1] + _why(row),
        "block": row.block,
        "D, the model's width": row.d_model,
        "F, the hidden width": row.d_ff,
        "activation": row.activation or "not known",
        "gated": _yes_no(row.gated),
        "bias": _yes_no(row.bias),
        "input independent of later tokens": _yes_no(row.causal),
    }
    first = " first" if index == 0 else ""
    return (
        f'<div class="site {status}{first}" id="site={index}"><h3 class="mono">{_text(row.weight)}</h3>'
        f"{_facts(facts)}</div>"
    )


def _drawing(flow: Dataflow | None, count: int, row: Row) -> Iterable[str]:
    if flow is None:
        yield '<p class="soft">The model was not captured, so there is nothing to draw.</p>'
        return
    for note in flow.notes:
        yield f'<p class="note">Note: {_text(note)}</p>'
    if not flow.nodes:
        return
    title = f"Dataflow of an MLP of width {row.d_model}, {row.d_ff} hidden features; as text below"
    same = f" {count} sites have this structure." if count > 1 else ""
    yield f"<figure>{draw(flow, title)}"
    yield (
        f"<figcaption>Shapes as captured with a few example tokens; W is the weight as stored. Dotted wires: "
        f"operations that are not part of the MLP.{same}</figcaption></figure>"
    )
    yield '<details><summary>As text</summary><ol class="text" start="0">'
    for i, node in enumerate(flow.nodes):
        role = role_text(flow, i)
        weight = f", weight {node.weight}" if node.weight else ""
        sources = ", ".join(str(a) for a, b in flow.edges if b == i)
        yield (
            f"<li>{_text(role)}{': ' if role else ''}<code>{_text(node.op)}</code> "
            f"{_text(node.shape)}{_text(weight)}{f', reads {sources}' if sources else ''}</li>"
        )
    yield "</ol></details>"


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{_text(problem)}</li>" for problem in problems)
    return f'<section class="problems" role="alert"><h2>Problems</h2><ul>{items}</ul></section>'


def _costs(report: Report) -> str:
    return f"<section><h2>Cost</h2>{_table(report.costs)}</section>" if report.costs else ""


def _configuration(report: Report) -> str:
    if report.config is None:
        return ""
    options = {k: repr(v) for k, v in report.config.items() if k != "version"}
    return f"<section><h2>Configuration</h2>{_table(options)}</section>"


def _rejected(report: Report) -> str:
    if not report.rejected:
        return ""
    lines = []
    for reason, names in report.rejected:
        shown = ", ".join(f"<code>{_text(name)}</code>" for name in names[:_NAMES_PER_REASON])
        more = len(names) - _NAMES_PER_REASON
        rest = f", and {more} more" if more > 0 else ""
        listed = f"<details><summary>{_text(reason)}</summary>{shown}{rest}</details>"
        lines.append(f'<tr><td class="n">{len(names)}</td><td>{listed}</td></tr>')
    return (
        "<section><h2>Weighted contractions that are no MLP down-projection</h2><table><thead><tr>"
        '<th class="n">count</th><th>reason</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></section>"
    )


def _table(facts: dict[str, str]) -> str:
    rows = "".join(f'<tr><th scope="row">{_text(k)}</th><td>{_text(v)}</td></tr>' for k, v in facts.items())
    return f"<table><tbody>{rows}</tbody></table>"


def _facts(facts: dict[str, object]) -> str:
    return f"<dl>{''.join(f'<dt>{_text(k)}</dt><dd>{_text(v)}</dd>' for k, v in facts.items())}</dl>"


def _yes_no(value: bool | None) -> str:
    return "not known" if value is None else "yes" if value else "no"
