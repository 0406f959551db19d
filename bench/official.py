"""The official inference algorithm, written from its description: the competitor of the benchmarks.

One sequence at a time. Per fast layer: the weight is cloned at every call until the first write, inputs and
targets of the incomplete chunk grow by concatenation, and a chunk that fills is computed again as a whole
before it is written. Eager, as it is published.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttt_compiler.spec import CONV, PROJ


class OfficialMLP(nn.Module):
    """A gated MLP whose down-projection learns while it reads; holds the state of one sequence."""

    def __init__(self, mlp: nn.Module, chunk: int, lr: float) -> None:
        super().__init__()
        self.mlp, self.chunk, self.lr = mlp, chunk, lr
        self.conv, self.proj = getattr(mlp.down_proj, CONV), getattr(mlp.down_proj, PROJ)
        self.reset()

    def reset(self) -> None:
        self.past: Tensor | None = None
        self.weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.mlp.down_proj.weight.clone() if self.weight is None else self.weight
        xs = x if self.past is None else torch.cat([self.past, x], 1)
        old = 0 if self.past is None else self.past.shape[1]
        out = []
        while xs.shape[1] >= self.chunk:
            part, xs = xs[:, : self.chunk], xs[:, self.chunk :]
            h = self.hidden(part)
            out.append((h @ weight.t())[:, old:])
            conv = functional.conv1d(
                part.transpose(1, 2), self.conv, padding=self.conv.shape[-1] // 2, groups=part.shape[-1]
            )
            weight = weight + self.lr * (conv.transpose(1, 2)[0] @ self.proj).t() @ h[0]
            self.weight, old = weight, 0
        if xs.shape[1] > old:
            out.append(self.hidden(xs[:, old:]) @ weight.t())
        self.past = xs
        return torch.cat(out, 1)

    def hidden(self, x: Tensor) -> Tensor:
        return self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)


def official(converted: nn.Module, layers: list[int], chunk: int, lr: float) -> nn.Module:
    """A copy of a converted llama-like model that runs the official algorithm, uncompiled."""
    import ttt_compiler as ttt

    parameters = {n: p for n, p in converted.named_parameters() if n.endswith((CONV, PROJ))}
    model = ttt.revert(copy.deepcopy(converted))
    for i in layers:
        mlp = model.model.layers[i].mlp
        for name in (CONV, PROJ):
            setattr(mlp.down_proj, name, parameters[f"model.layers.{i}.mlp.down_proj.{name}"])
        model.model.layers[i].mlp = OfficialMLP(mlp, chunk, lr)
    return model


def running(model: nn.Module) -> list[OfficialMLP]:
    """The fast layers."""
    return [module for module in model.modules() if isinstance(module, OfficialMLP)]


def reset(model: nn.Module) -> None:
    """Begin another sequence."""
    for module in running(model):
        module.reset()
