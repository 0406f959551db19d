"""The source of an Inductor template, derived from a Triton kernel's own source.

A kernel marks what Inductor may replace::

    # template: begin at = t0 + r_m
    # template: {{load_q}}
    x = tl.load(...)
    # template: end

Between the marks the kernel's lines are its own when it is launched; in the template they are what stands
behind the marks. The signature becomes ``def_kernel`` and the lines of a header. May be changed here: the
marks.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

_MARK = "# template:"
_BEGIN, _END = f"{_MARK} begin", f"{_MARK} end"


def template_source(kernel: Any, header: str) -> str:
    """Jinja source.

    Args:
        kernel: a function under ``triton.jit``.
        header: what stands before the body: ``def_kernel``, sizes, strides, and the marked expressions.

    Raises:
        ValueError: marks that do not match.
    """
    lines: list[str] = []
    inside = False
    for line in _body(kernel):
        stripped = line.strip()
        if stripped.startswith(_BEGIN) or stripped == _END:
            if inside == stripped.startswith(_BEGIN):
                raise ValueError(f"{kernel.fn.__name__}: a mark does not match: {line}")
            inside = not inside
        if stripped.startswith(_MARK):
            expression = stripped.removeprefix(_MARK).strip().removeprefix("begin").strip()
            if inside and expression:
                lines.append(line[: len(line) - len(line.lstrip())] + expression)
        elif not inside:
            lines.append(line)
    if inside:
        raise ValueError(f"{kernel.fn.__name__}: the last mark is not closed")
    return header.strip("\n") + "\n" + "\n".join(lines) + "\n"


def _body(kernel: Any) -> list[str]:
    """Lines of the function's body without its docstring, indented by four."""
    text = textwrap.dedent(inspect.getsource(kernel.fn))
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    first = function.body[1 if ast.get_docstring(function) else 0]
    lines = text.splitlines()
    start = function.body[0].end_lineno if first is not function.body[0] else first.lineno - 1
    return lines[start:]
