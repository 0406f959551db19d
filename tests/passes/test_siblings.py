"""MLPs side by side: shared experts, routed experts, dense MLPs beside them, adapters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.capture import capture, capture_lm, ids, name_of, reason
from tests.passes.families import FAMILIES, SHARED
from tests.passes.handmade import D, Model
from ttt_compiler.passes.find_mlps import find_mlps

E, K, WIDE = 4, 2, 48


class Expert(nn.Module):
    def __init__(self, width: int = WIDE) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, width, False), nn.Linear(D, width, False)
        self.down = nn.Linear(width, D, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Routed(nn.Module):
    """Every token multiplied by the weights of its experts."""

    def __init__(self, width: int = WIDE) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.up, self.down = nn.Parameter(torch.randn(E, width, D)), nn.Parameter(torch.randn(E, D, width))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weight, chosen = self.router(rows).softmax(-1).topk(K)
        repeated = rows.repeat_interleave(K, 0).unsqueeze(-1)
        h = F.relu(torch.bmm(self.up[chosen.reshape(-1)], repeated))
        y = torch.bmm(self.down[chosen.reshape(-1)], h).squeeze(-1)
        return (y.view(-1, K, D) * weight[..., None]).sum(1).view_as(x)


class WithShared(nn.Module):
    """``way``: how the shared expert's output joins that of the routed ones."""

    def __init__(self, way: str = "sum", width: int = WIDE) -> None:
        super().__init__()
        self.routed, self.shared, self.way = Routed(), Expert(width), way
        self.gate = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "in_place":
            out = self.shared(x)
            return out.add_(self.routed(x))
        if self.way == "gated":
            return self.routed(x) + torch.sigmoid(self.gate(x)) * self.shared(x)
        if self.way == "scaled":
            return 0.5 * (2.5 * self.routed(x) + self.shared(x))
        return self.routed(x) + self.shared(x)


class Beside(Model):
    """A dense MLP and routed experts side by side, each with an input of its own."""

    def __init__(self, way: str) -> None:
        super().__init__(Expert(160))
        self.routed, self.norm3, self.way = Routed(), nn.LayerNorm(D), way

    def block(self, x: Tensor) -> Tensor:
        y = x + self.attention(self.norm1(x))
        if self.way == "arctic":  # the experts read the stream before attention
            return y + self.mlp(self.norm2(y)) + self.routed(self.norm3(x))
        if self.way == "gemma4":  # both read this point, through norms of their own
            return y + self.norm1(self.mlp(self.norm2(y)) + self.routed(self.norm3(y)))
        if self.way == "separate_adds":  # one input, added one after the other: a shared expert
            n = self.norm2(y)
            return (y + self.routed(n)) + self.mlp(n)
        y = y + self.routed(self.norm3(y))  # one after the other
        return y + self.mlp(self.norm2(y))


def kinds(model: nn.Module) -> dict[str, str]:
    with torch.no_grad():
        report = find_mlps(capture(model, ids()))
    return {name_of(s.top_weight): s.kind for s in report.sites}


@pytest.mark.parametrize("name", SHARED)
def test_families(name: str) -> None:
    family = SHARED[name]
    model = family.build()
    sites = find_mlps(capture_lm(model, use_cache=False)).sites
    assert sorted(name_of(s.top_weight) for s in sites) == family.expected(model)
    found = {name_of(s.top_weight) for s in sites if s.kind == "shared"}
    assert found == {n for n in family.expected(model) if "shared" in n}
    assert {s.kind for s in sites} == family.kinds


def test_families_without_shared_experts() -> None:
    for name in ("mixtral", "qwen3_moe", "llama"):
        assert "shared" not in FAMILIES[name].kinds


@pytest.mark.parametrize("way", ["sum", "in_place", "gated", "scaled"])
def test_shared_expert(way: str) -> None:
    assert kinds(Model(WithShared(way))) == {"mlp.routed.down": "moe", "mlp.shared.down.weight": "shared"}


def test_wide_shared_expert() -> None:
    """qwen2-moe's is four times as wide as a routed one, and wider than the model."""
    assert kinds(Model(WithShared(width=160)))["mlp.shared.down.weight"] == "shared"


def test_adapter_beside_routed_experts() -> None:
    """Far narrower than an expert: an adapter."""
    model = Model(WithShared(width=8))
    assert kinds(model) == {"mlp.routed.down": "moe"}
    with torch.no_grad():
        assert "an adapter" in reason(capture(model, ids()), "mlp.shared.down.weight")


@pytest.mark.parametrize(
    ("way", "kind"),
    [("arctic", "dense"), ("gemma4", "dense"), ("separate_adds", "shared"), ("one_after_the_other", "dense")],
)
def test_dense_mlp_beside_routed_experts(way: str, kind: str) -> None:
    assert kinds(Beside(way)) == {"mlp.down.weight": kind, "routed.down": "moe"}


def test_block_without_its_residual() -> None:
    """The experts' module alone, as after a graph break."""
    experts = WithShared("sum", width=160)
    experts.routed = Routed(width=160)
    with torch.no_grad():
        report = find_mlps(capture(experts, torch.randn(2, 8, D)))
    assert {name_of(s.top_weight): s.kind for s in report.sites}["shared.down.weight"] == "shared"


def test_equal_experts_that_see_every_token() -> None:
    """Experts computed densely are narrow MLPs side by side: as wide as each other, so no adapters."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Expert() for _ in range(3))
            self.router = nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.router(x).softmax(-1)
            return sum(weight[..., i : i + 1] * e(x) for i, e in enumerate(self.experts))

    assert kinds(Model(Dense())) == {f"mlp.experts.{i}.down.weight": "dense" for i in range(3)}
