"""For which device a graph is being lowered, and how a kernel of ours is called on CPU.

May be changed here: which devices run Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor import config, ir
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


def on_cpu(
    kernel: Any, fallback: Callable[..., Any], operands: tuple[Any, ...], chunk: int, width: Any
) -> Any:
    """An extern kernel whose result ``[B, T, width]`` lies in the graph's planned memory.

    Args:
        kernel: takes the operands that exist, ``chunk`` and ``out``.
        fallback: the op itself.
        operands: tokens ``[B, T, .]``, what is applied to them in turn, and positions or None.
        chunk: C.
        width: of the result.
    """
    if V.graph.cpp_wrapper:
        # A graph without Python (AOTInductor) finds the op by its name.
        return fallback(*operands, chunk)
    tokens: Any = ir.ExternKernel.require_contiguous(operands[0])
    inputs = [ir.ExternKernel.realize_input(x) for x in (tokens, *operands[1:]) if x is not None]
    layout = ir.FixedLayout(tokens.get_device(), tokens.get_dtype(), [*tokens.get_size()[:2], width])
    return kernel.bind(inputs, layout, chunk=chunk).output_node()
