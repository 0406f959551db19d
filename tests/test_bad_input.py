"""What users do to models before, during and after conversion: a clear error or the right numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops.scan import scan

import ttt_compiler as ttt
from tests import models, unusual
from tests.unusual import BACKEND, CONFIG, converted, inputs
from ttt_compiler.architectures.oracle import oracle_call
from ttt_compiler.errors import (
    CacheError,
    ConversionLostError,
    GraphRewriteError,
    LayerSelectionError,
    NoMLPFoundError,
    UnsupportedModelError,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def check(model, x):
    with torch.no_grad():
        torch.testing.assert_close(model(x), oracle_call(model, x), rtol=1e-4, atol=1e-4)


class Breaking(unusual.MLP):
    broken = True

    def forward(self, x):
        h = F.gelu(self.up(x))
        if self.broken:
            torch._dynamo.graph_break()
        return self.down(h)


def test_a_graph_break_inside_of_the_mlp_is_named():
    with pytest.raises(NoMLPFoundError, match=r"down.*without a projection"):
        ttt.convert(unusual.Stack(Breaking()), CONFIG, example_inputs=((inputs(),), {}))
    model = unusual.Stack(Breaking())
    model.mlps[0].broken = False
    converted(model)
    check(model, inputs())
    model.mlps[0].broken = True
    with pytest.raises(GraphRewriteError, match=r"mlps\.0\.down\.weight.*graph break"):
        model(inputs())


class Frozen(unusual.MLP):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


def test_an_mlp_under_no_grad_is_right_and_does_not_train():
    model = converted(unusual.Stack(Frozen(), unusual.MLP()))
    check(model, inputs())
    model(inputs()).square().mean().backward()
    frozen, other = (mlp.down.ttt_conv.grad for mlp in model.mlps)
    assert frozen is None or not frozen.any()
    assert other.any()


def test_weights_that_do_not_train_give_the_same_numbers():
    model = unusual.Stack(unusual.MLP(), unusual.MLP()).requires_grad_(False)
    converted(model)
    check(model, inputs())
    model(inputs()).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        f"mlps.{i}.down.ttt_{p}" for i in (0, 1) for p in ("conv", "proj")
    ]


@pytest.mark.parametrize("name", ["flat", "shared", "functional"])
def test_dynamic_shapes(name):
    from tests.test_unusual import build

    model = build(name)
    ttt.convert(model, CONFIG, example_inputs=((inputs(),), {}))
    models.randomize(model)
    model.compile(backend=BACKEND, dynamic=True)
    with torch.no_grad():
        for tokens in (11, 17, 5):
            x = inputs(tokens)
            torch.testing.assert_close(model(x), oracle_call(model, x), rtol=1e-4, atol=1e-4)


def test_a_parameter_that_was_replaced_is_the_one_that_counts():
    model = converted(unusual.Stack(unusual.MLP()))
    x = inputs()
    before = model(x)
    session = ttt.Session(model, 2)
    with torch.no_grad():
        model(x, ttt_state=session.state)
    down = model.mlps[0].down
    down.weight = nn.Parameter(down.weight.detach() * -1.0)
    check(model, x)
    assert (model(x) - before).abs().max() > 0.1
    with pytest.raises(CacheError, match="other slow weights"):
        model(x, ttt_state=session.state)
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()}, assign=True)
    check(model, x)


@pytest.mark.parametrize("when", ["before the first call", "after a call"])
def test_a_module_that_was_replaced_takes_its_fast_weights_along(when):
    model = converted(unusual.Stack(unusual.MLP()))
    if when == "after a call":
        model(inputs())
    model.mlps[0].down = nn.Linear(unusual.FF, unusual.D)
    with pytest.raises(ConversionLostError, match=r"mlps\.0\.down was replaced"):
        model(inputs())


class TwoInputs(nn.Module):
    """Gate and up read different tensors: there is no one MLP input to compute the target from."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(unusual.D)
        self.gate, self.up = (nn.Linear(unusual.D, unusual.FF) for _ in range(2))
        self.down = nn.Linear(unusual.FF, unusual.D)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(self.norm(x)))


def test_readers_that_disagree_about_the_input_are_refused_with_the_reason():
    with pytest.raises(NoMLPFoundError, match=r"down\.weight: its 2 projections read (2 )?different"):
        ttt.convert(TwoInputs(), CONFIG, example_inputs=((inputs(),), {}))


class TwoDowns(nn.Module):
    """One hidden activation, two projections: two sites."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(unusual.D, unusual.FF)
        self.left, self.right = (nn.Linear(unusual.FF, unusual.D, bias=False) for _ in range(2))

    def forward(self, x):
        h = F.gelu(self.up(x))
        return x + self.left(h) + 0.5 * self.right(h)


class TwoReaders(unusual.MLP):
    """The down-projection's weight is read again, as something that is no MLP."""

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.down.weight.t()), self.down.weight)


@pytest.mark.parametrize("make", [TwoDowns, lambda: unusual.Stack(TwoReaders())])
def test_a_weight_or_a_hidden_activation_with_two_readers(make):
    model = make()
    x = inputs()
    with torch.no_grad():
        base = torch.compile(model, backend="eager")(x)
        converted(model)
        fast = model(x)
        for p in (p for n, p in model.named_parameters() if "ttt_conv" in n):
            p.zero_()
        assert torch.equal(model(x), base)
    assert torch.equal(fast[:, :4], base[:, :4]), "the first chunk reads slow weights only"
    assert (fast[:, 4:] - base[:, 4:]).abs().max() > 0.05


class TokensFirst(nn.Module):
    """Takes ``[T, B, D]``, mixes over its first axis."""

    def __init__(self):
        super().__init__()
        self.mlp = unusual.MLP()

    def forward(self, x):
        return x + self.mlp(x.cumsum(0))


def test_inputs_with_tokens_first_are_recognised_by_their_rows():
    with pytest.raises(UnsupportedModelError, match=r"\[tokens, batch, \.\.\]"):
        ttt.convert(TokensFirst(), CONFIG, example_inputs=((torch.randn(9, 2, unusual.D),), {}))


class Prompted(unusual.Stack):
    """Puts learned prompt tokens in front: one hidden row too many per sequence."""

    def __init__(self):
        super().__init__(unusual.MLP())
        self.prompt = nn.Parameter(torch.randn(1, 3, unusual.D))

    def forward(self, x):
        return super().forward(torch.cat([self.prompt.expand(x.shape[0], -1, -1), x], 1))


class Encoded(nn.Module):
    """A tower over something else than the tokens, whose MLP nobody should touch."""

    def __init__(self):
        super().__init__()
        self.tower, self.text = unusual.Stack(unusual.MLP()), unusual.Stack(unusual.MLP())

    def forward(self, x, image):
        return self.text(x + self.tower(image).mean(1, keepdim=True))


def test_what_is_no_row_per_token_is_refused_with_the_reason():
    with pytest.raises(NoMLPFoundError, match="not one row of features per token"):
        ttt.convert(Prompted(), CONFIG, example_inputs=((inputs(),), {}))
    images = torch.randn(2, 11, unusual.D)
    example = ((inputs(), images), {})
    report = ttt.explain(Encoded(), CONFIG, example_inputs=example)
    assert {r.weight: r.chosen for r in report.rows} == {
        "tower.mlps.0.down.weight": False,
        "text.mlps.0.down.weight": True,
    }
    assert "does not depend on the tokens" in str(report).replace("\n", " ")
    with pytest.raises(LayerSelectionError, match="tower"):
        ttt.convert(Encoded(), ttt.TTTConfig(layers=["tower.*"]), example_inputs=example)
    model = ttt.convert(Encoded(), CONFIG, example_inputs=example)
    assert {n for n, _ in model.named_parameters() if "ttt_conv" in n} == {"text.mlps.0.down.ttt_conv"}
    models.randomize(model).compile(backend=BACKEND)
    with torch.no_grad():
        y = model(inputs(), images)
        torch.testing.assert_close(y, oracle_call(model, inputs(), images), rtol=1e-4, atol=1e-4)


def test_a_chosen_weight_applied_elsewhere_is_never_slow_in_silence():
    model = converted(unusual.Stack(unusual.MLP(), unusual.MLP()))
    mlp = model.mlps[0]

    @torch.compile(backend=BACKEND)
    def outside(x):
        return x + F.linear(F.gelu(mlp.up(x)), mlp.down.weight, mlp.down.bias)

    with pytest.raises((GraphRewriteError, torch._dynamo.exc.BackendCompilerFailed), match="outside of the"):
        outside(inputs())
    with ttt.disabled(model), torch.no_grad():
        torch.testing.assert_close(outside(inputs()), inputs() + mlp(inputs()))


def test_more_places_than_were_seen_at_conversion():
    class Looped(unusual.Stack):
        times = 2

        def forward(self, x):
            for _ in range(self.times):
                x = x + self.mlps[0](self.norms[0](unusual.causal_mix(x)))
            return x

    model = converted(Looped(unusual.MLP()))
    check(model, inputs())
    session = ttt.Session(model, 2)
    model.times = 3
    assert torch.isfinite(model(inputs())).all(), "without state, one place more is computed like the others"
    with pytest.raises(UnsupportedModelError, match="more often"):
        model(inputs(), ttt_state=session.state)


def test_an_experts_choice_that_does_not_exist_names_what_does():
    with pytest.raises(ValueError, match=r"'routed'.*'shared', 'none'.*experts\.md"):
        ttt.TTTConfig(experts="routed")


class Scanned(nn.Module):
    """Layers under one ``scan`` over stacked weights, as large models are compiled in little time."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, unusual.FF, unusual.D) * 0.2)
        self.down = nn.Parameter(torch.randn(3, unusual.D, unusual.FF) * 0.2)

    def forward(self, x):
        def layer(x, weights):
            up, down = weights
            y = x + F.linear(F.gelu(F.linear(F.rms_norm(x, (unusual.D,)), up)), down)
            return y, y.mean()

        return scan(layer, unusual.causal_mix(x), (self.up, self.down))[0]


def test_layers_in_a_scan_are_found_and_refused_with_the_reason():
    (site,) = ttt.find_sites(Scanned(), inputs())
    assert (site.weight, site.d_model, site.d_ff, site.activation) == ("down", 16, 40, "gelu")
    with pytest.raises(UnsupportedModelError, match=r"down: it lies in the body of a scan.*after another"):
        ttt.convert(Scanned(), CONFIG, example_inputs=((inputs(),), {}))
