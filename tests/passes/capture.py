"""Capture the graph Dynamo hands to a backend, without compiling anything; read the detector's answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from ttt_compiler.passes.find_mlps import MLPReport, find_mlps
from ttt_compiler.passes.graph import source_fqn


@contextlib.contextmanager
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()


def capture(fn: nn.Module | Callable[..., Any], *args: Any, **kwargs: Any) -> fx.GraphModule:
    """Return the one graph of ``fn(*args, **kwargs)``; fails if there is a graph break."""
    graphs: list[fx.GraphModule] = []

    def recorder(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    with fresh_dynamo():
        torch.compile(fn, backend=recorder, fullgraph=True)(*args, **kwargs)
    assert len(graphs) == 1
    return graphs[0]


def capture_lm(model: nn.Module, length: int = 8, **kwargs: Any) -> fx.GraphModule:
    """Return the graph of a language model called with random token ids ``[2, length]``."""
    ids = torch.randint(3, 90, (2, length))
    grad = torch.enable_grad() if model.training else torch.no_grad()
    with grad:
        return capture(model, input_ids=ids, **kwargs)


def exported(model: nn.Module, *args: Any) -> fx.GraphModule:
    """Return the module of ``torch.export``: ATen operations, weights as attributes."""
    module: fx.GraphModule = torch.export.export(model, args).module()
    return module


def ids(length: int = 8, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 101, (batch, length))


def name_of(weight: fx.Node) -> str:
    """Fully qualified name of a weight, for Dynamo's graphs and for exported ones."""
    return str(weight.target) if weight.op == "get_attr" else source_fqn(weight) or "?"


def names(report: MLPReport) -> list[str]:
    return sorted(name_of(s.top_weight) for s in report.sites)


def reasons(gm: fx.GraphModule, fqn: str) -> list[str]:
    return [r.reason for r in find_mlps(gm).rejections if r.weight and name_of(r.weight) == fqn]


def reason(gm: fx.GraphModule, fqn: str) -> str:
    found = reasons(gm, fqn)
    assert len(found) == 1
    return found[0]
