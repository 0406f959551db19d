"""A training step of a whole model: static, ours, and the official training form in its place.

May be changed here: competitors, if their gradients are the same; :func:`training` says whether they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.competitors import stacked
from bench.model import BOUND, Models, twin
from bench.official import OfficialMLP, running
from ttt_compiler.spec import CONV, PROJ


class StackedMLP(nn.Module):
    """A gated MLP whose down-projection is the official training form of one that learns."""

    def __init__(self, published: OfficialMLP) -> None:
        super().__init__()
        self.mlp, self.chunk, self.lr = published.mlp, published.chunk, published.lr
        self.conv, self.proj = published.conv, published.proj

    def forward(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        h = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        return stacked(h, x, mlp.down_proj.weight, self.conv, self.proj, self.lr, self.chunk)


def training(models: Models) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """What makes gradients of every parameter, static first, and errors of those of fast layers.

    Raises:
        AssertionError: gradients of ours differ from the official form's.
    """
    trained = twin(models.published)
    for layer in trained.model.layers:
        if isinstance(layer.mlp, OfficialMLP):
            layer.mlp = StackedMLP(layer.mlp)
    models.static.compile(dynamic=False)
    models.fast.compile(backend="inplace_ttt", dynamic=False)
    forms = {
        "static": models.static,
        "ours": models.fast,
        "official training form": trained,
        "official training form, compiled": torch.compile(trained, dynamic=False),
    }

    def step(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=models.ids, labels=models.ids, use_cache=False).loss.backward()

    runs = {name: (lambda model=model: step(model)) for name, model in forms.items()}
    learn = {
        name: [getattr(m.down_proj, what) for m in layers for what in (CONV, PROJ, "weight")]
        for name, layers in (
            ("ours", [models.fast.model.layers[i].mlp for i in fast_layers(models)]),
            ("official training form", [m.mlp for m in running(models.published)]),
        )
    }
    learn["official training form, compiled"] = learn["official training form"]
    found = {}
    for name, parameters in learn.items():
        runs[name]()
        found[name] = [p.grad.clone() for p in parameters]
    exact, errors = found.pop("official training form"), {}
    for name, gradients in found.items():
        pairs = zip(gradients, exact, strict=True)
        errors[name] = max(float((got - want).norm() / want.norm()) for got, want in pairs)
        assert errors[name] <= BOUND, f"{models.shape}, {name}: gradients {errors[name]:.1e}: no timing"
    return runs, errors


def fast_layers(models: Models) -> list[int]:
    """Which layers learn."""
    layers = models.published.model.layers
    return [i for i, layer in enumerate(layers) if isinstance(layer.mlp, OfficialMLP)]
