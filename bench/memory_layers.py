"""Layers with a linear memory out of a public package: neighbours of the fast weights, not the same function.

``titans-pytorch``'s NeuralMemory runs on a CPU. Like a fast-weight layer it keeps a matrix that a chunk of
tokens writes and the next chunk reads; unlike it, it has projections for queries, keys and values, learned
rates and a decay of its own. So a figure beside ours says what such a layer costs, and there is nothing to
agree on but that what comes out is finite and does not depend on later tokens. May be changed here: which
layers there are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_INSTALL = "memory layers need the package titans-pytorch. Type: pip install 'ttt_compiler[competitors]'"


def memory_layers(d: int, chunk: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Layers that read ``[B, T, D]`` and write once per chunk.

    One is linear, a ``[D, D]`` matrix without momentum; one is the package's default, two layers with it.

    Raises:
        ImportError: the package is missing; says what to type.
    """
    try:
        from titans_pytorch import MemoryMLP, NeuralMemory
    except ModuleNotFoundError as e:
        raise ImportError(_INSTALL) from e
    torch.manual_seed(0)
    found = {
        "linear memory": NeuralMemory(d, chunk, model=MemoryMLP(d, depth=1), momentum=False),
        "two-layer memory": NeuralMemory(d, chunk),
    }
    return {f"titans-pytorch, {name}": _output(layer.eval()) for name, layer in found.items()}


def gate(layers: dict[str, Callable[[Tensor], Tensor]], x: Tensor) -> None:
    """Finite, of the input's shape, and causal: with another second half, the first half stays.

    Raises:
        AssertionError: a layer is not.
    """
    half = x.shape[1] // 2
    other = torch.cat([x[:, :half], x[:, half:].flip(1)], 1)
    for name, layer in layers.items():
        y, changed = layer(x), layer(other)
        assert y.shape == x.shape, f"{name}: {tuple(y.shape)}"
        assert bool(y.isfinite().all()), f"{name}: NaN or Inf"
        apart = float((y - changed)[:, :half].abs().max() / y.abs().max())
        assert apart < 1e-5, f"{name}: earlier outputs depend on later tokens by {apart:.1e}"
        assert not torch.equal(y, changed), f"{name}: reads nothing"


def _output(layer: Callable[[Tensor], tuple[Tensor, object]]) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x)[0]
