"""What the passes make of whole models, as text: ``python -m tests.goldens.structure --write`` refreshes it.

A golden is the rewritten graph as one operation per line, without names and shapes, so a review sees at once
what a change of a pass changes. May be changed here: which models, and what a line says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

from tests import unusual
from ttt_compiler import backend
from ttt_compiler.architectures import build, token_inputs
from ttt_compiler.config import TTTConfig
from ttt_compiler.conversion import convert

FOLDER = Path(__file__).parent / "structure"
COMMAND = "python -m tests.goldens.structure --write"
_CONFIG = TTTConfig(layers="all", chunk_size=4)


def _architecture(model_type: str, **more: Any) -> Callable[[], list[fx.GraphModule]]:
    def capture() -> list[fx.GraphModule]:
        model = convert(build(model_type), _CONFIG)
        return rewritten(model, **{**token_inputs(model, 2, 9), **more})

    return capture


def _checkpointed() -> list[fx.GraphModule]:
    torch.manual_seed(0)
    x = torch.randn(2, 9, unusual.D)
    model = unusual.Stack(unusual.Checkpointed(unusual.MLP()), unusual.MLP())
    return rewritten(convert(model, _CONFIG, example_inputs=((x,), {})), x)


_TYPES = ("llama", "gpt2", "phi3", "gptj", "opt", "deepseek_v3", "zamba2")

CASES: dict[str, Callable[[], list[fx.GraphModule]]] = {
    **{
        name: _architecture(name)
        for name in ("llama", "gpt2", "phi3", "gptj", "opt", "deepseek_v3", "zamba2")
    },
    "llama-step": _architecture("llama", use_cache=True),
    "checkpointed": _checkpointed,
}


def rewritten(model: nn.Module, *args: Any, **kwargs: Any) -> list[fx.GraphModule]:
    """The graphs of one call of a converted model after all passes."""
    graphs: list[fx.GraphModule] = []
    original = backend.run_pipeline

    def recording(gm: fx.GraphModule) -> Any:
        result = original(gm)
        graphs.append(result.gm)
        return result

    # Deterministic algorithms, which tests run with, leave other operations in the graph (of F.pad).
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    try:
        with mock.patch.object(backend, "run_pipeline", recording), torch.no_grad():
            torch.compile(model, backend="inplace_ttt_eager")(*args, **kwargs)
    finally:
        torch._dynamo.reset()
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    return graphs


def structure(graphs: list[fx.GraphModule]) -> str:
    """One operation per line; bodies of higher-order operators are indented below their first use."""
    lines = []
    for i, gm in enumerate(graphs):
        lines += [f"graph {i + 1} of {len(graphs)}", *_lines(gm, "  ")]
    return "\n".join(lines) + "\n"


def _lines(gm: fx.GraphModule, indent: str) -> list[str]:
    inputs = gm.graph.find_nodes(op="placeholder")
    lines = [f"{indent}{len(inputs)} placeholders"]
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            value = getattr(gm, node.target, None)
            body = isinstance(value, fx.GraphModule)
            lines.append(f"{indent}get_attr {'body' if body else 'constant'}")
            lines += _lines(value, indent + "  ") if body else []
        else:
            lines.append(f"{indent}{node.op} {_name(node.target)}")
    return [*lines, f"{indent}output"]


def _name(target: Any) -> str:
    if isinstance(target, (str, torch._ops.OpOverload)):
        return str(target)
    name = getattr(target, "__name__", type(target).__name__)
    return f"{(getattr(target, '__module__', None) or '').lstrip('_')}.{name}".lstrip(".")


def main() -> None:
    if "--write" not in sys.argv:
        raise SystemExit(f"Type: {COMMAND}")
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for name, capture in CASES.items():
        (FOLDER / f"{name}.txt").write_text(structure(capture()), encoding="utf-8")


if __name__ == "__main__":
    main()
