"""For which device a graph is being lowered. May be changed here: which devices run Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor import config
from torch._inductor.virtualized import V


def uses_triton(x: Any) -> bool:
    """Whether the operations on an IR node become Triton kernels.

    On CPU only when Inductor is told so, which is how the templates are interpreted in tests.
    """
    return x.get_device().type != "cpu" or config.cpu_backend == "triton"


def memoised(what: str, pos: Any, chunk: int, make: Callable[[], Any]) -> Any:
    """``make()``, once per graph for the same positions, which are realized: all sites share them.

    Views of one buffer have its name, so where they lie in it counts too.
    """
    graph: Any = V.graph
    found = graph.__dict__.setdefault("_ttt_memo", {})
    key = (what, pos.get_name(), str(pos.get_layout()), chunk)
    if key not in found:
        found[key] = make()
    return found[key]
