"""MLPs in the bodies of higher-order operators: run once, in several calls, in loops and in branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.passes.capture import capture, exported, ids, name_of, names
from tests.passes.handmade import FF, D, Model, SwiGLU, WholeInAutograd
from ttt_compiler.passes.find_mlps import find_mlps
from ttt_compiler.passes.op_classes import higher_order_name

scan: Any = torch._higher_order_ops.scan


@torch.compiler.nested_compile_region
def region(mlp: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    return x + mlp(norm(x))


class Layers(nn.Module):
    """Three layers of one shape, in one region that Dynamo compiles once (``nested_compile_region``)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SwiGLU() for _ in range(3))
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = region(layer, self.norm, x)
        return x


class Scanned(nn.Module):
    """A scan over layers whose weights are stacked ``[L, out, in]``, and one plain MLP behind it."""

    def __init__(self, length: int = 3) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(length, FF, D))
        self.down = nn.Parameter(torch.randn(length, D, FF))
        self.shared_bias = nn.Parameter(torch.randn(D))
        self.last = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        def layer(x: Tensor, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            up, down = weights
            y = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (D,)), up)), down, self.shared_bias)
            return y, y.sum()

        x, _ = scan(layer, x, (self.up, self.down))
        return x + self.last(F.layer_norm(x, (D,)))


class Branching(nn.Module):
    """``torch.cond`` picks one of two MLPs, or skips."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.first, self.second, self.both = SwiGLU(), SwiGLU(), both

    def forward(self, x: Tensor) -> Tensor:
        other = self.second if self.both else nn.Identity()
        return torch.cond(x.sum() > 0, lambda x: x + self.first(x), lambda x: x + other(x), (x,))


class Mapped(nn.Module):
    """A ``while_loop`` that applies one MLP until a counter ends."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        def step(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, x + self.mlp(x)

        loop: Any = torch._higher_order_ops.while_loop
        return loop(lambda i, x: i < 3, step, (torch.zeros((), dtype=torch.long), x))[1]


class TestCalls:
    def test_outside_of_bodies(self) -> None:
        (site,) = find_mlps(capture(Model(SwiGLU), ids())).sites
        assert (site.call, site.calls, site.body) == (None, (), None)

    def test_one_body_called_several_times(self) -> None:
        """Same nodes, three sites: the call and the weight in the outer graph tell them apart."""
        with torch.no_grad():
            gm = capture(Layers(), torch.randn(2, 8, D))
        report = find_mlps(gm)
        assert names(report) == [f"layers.{i}.down.weight" for i in range(3)]
        assert len({s.contraction for s in report.sites}) == 1
        assert len({s.call for s in report.sites}) == 3
        for site in report.sites:
            assert site.call is not None
            assert higher_order_name(site.call) == "invoke_subgraph"
            assert site.call.graph is gm.graph
            # The weight's placeholder in the body stands for an operand of this very call.
            assert site.top_weight in site.call.all_input_nodes
            assert site.body is None
        order = list(gm.graph.nodes)
        assert [order.index(s.call) for s in report.sites] == sorted(
            order.index(s.call) for s in report.sites
        )

    def test_nested_bodies(self) -> None:
        """A checkpoint in a checkpoint: the path leads from the outermost call inwards."""

        class Nested(Model):
            def block(self, x: Tensor) -> Tensor:
                return checkpoint(super().block, x, use_reentrant=False)

        gm = capture(Nested(SwiGLU, checkpointed=True).train(), ids())
        (site,) = find_mlps(gm).sites
        outer, inner = site.calls
        assert outer.graph is gm.graph
        assert inner.graph is not gm.graph
        assert inner.graph is not site.graph_module.graph
        assert site.call is outer
        assert name_of(site.top_weight) == "mlp.down.weight"

    def test_one_checkpoint_per_layer(self) -> None:
        class Two(Model):
            def forward(self, tokens: Tensor) -> Tensor:
                x = self.embed(tokens)
                for _ in range(2):
                    x = checkpoint(self.block, x, use_reentrant=False)
                return self.head(x)

        report = find_mlps(capture(Two(SwiGLU).train(), ids()))
        assert len({s.calls for s in report.sites}) == len(report.sites) == 2


class TestLoopsAndBranches:
    def test_scan_over_layers(self) -> None:
        model = Scanned()
        with torch.no_grad():
            gm = capture(model, torch.randn(2, 8, D))
        report = find_mlps(gm)
        assert names(report) == ["last.down.weight"]
        (site,) = report.nested
        assert (site.body, site.kind, site.d_ff, site.d_model) == ("scan", "dense", FF, D)
        # In the body the weight is a slice, outside it is the stack.
        assert tuple(site.weight.meta["example_value"].shape) == (D, FF)
        assert site.weight.graph is site.graph_module.graph
        assert site.top_weight.graph is gm.graph
        assert name_of(site.top_weight) == "down"
        assert tuple(site.top_weight.meta["example_value"].shape) == (3, D, FF)
        assert not site.transposed
        assert site.call in gm.graph.nodes

    def test_the_carry_of_a_scan_is_data(self) -> None:
        """Even if it starts from a parameter: from the second step on it is the layer's output."""

        class FromParameter(Scanned):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(self.start) + x

        model = FromParameter()
        model.start = nn.Parameter(torch.randn(2, 8, D))
        with torch.no_grad():
            report = find_mlps(capture(model, torch.randn(2, 8, D)))
        assert [s.body for s in report.nested] == ["scan"]

    @pytest.mark.parametrize("both", [True, False])
    def test_cond(self, both: bool) -> None:
        with torch.no_grad():
            report = find_mlps(capture(Branching(both), torch.randn(2, 8, D)))
        assert not report.sites
        expected = ["first.down.weight", "second.down.weight"][: 1 + both]
        assert sorted(name_of(s.top_weight) for s in report.nested) == expected
        assert {s.body for s in report.nested} == {"cond"}
        assert len({s.call for s in report.nested}) == 1

    def test_while_loop(self) -> None:
        with torch.no_grad():
            report = find_mlps(capture(Mapped(), torch.randn(2, 8, D)))
        assert [(s.body, name_of(s.top_weight)) for s in report.nested] == [("while_loop", "mlp.down.weight")]

    def test_checkpoint_in_a_branch(self) -> None:
        """What runs once inside of a body that may not run at all may not run at all."""

        class Inside(Branching):
            def forward(self, x: Tensor) -> Tensor:
                def yes(x: Tensor) -> Tensor:
                    return checkpoint(lambda x: x + self.first(x), x, use_reentrant=False)

                return torch.cond(x.sum() > 0, yes, lambda x: x.clone(), (x,))

        with torch.no_grad():
            report = find_mlps(capture(Inside(both=False), torch.randn(2, 8, D)))
        (site,) = report.nested
        assert site.body == "cond"
        assert len(site.calls) == 2

    @pytest.mark.parametrize("model", [Scanned(), Branching(both=True)], ids=["scan", "cond"])
    def test_exported(self, model: nn.Module) -> None:
        report = find_mlps(exported(model, torch.randn(2, 8, D)))
        assert len(report.nested) == (1 if isinstance(model, Scanned) else 2)

    def test_backward_written_by_hand_stays_a_rejection(self) -> None:
        report = find_mlps(capture(Model(WholeInAutograd).train(), ids()))
        assert not report.sites
        assert not report.nested
        assert any("autograd_function_apply" in r.reason for r in report.rejections)
