"""Capture the graph Dynamo hands to a backend, without compiling anything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn


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
