"""Models and uses that would give wrong numbers in silence if a rule were a little weaker."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ttt_compiler as ttt
from tests import models, unusual
from tests.unusual import BACKEND, CONFIG, converted, inputs
from ttt_compiler.architectures.oracle import oracle_call
from ttt_compiler.errors import (
    GraphRewriteError,
    NoMLPFoundError,
    NonCausalModelError,
    PositionError,
    TTTError,
    UnsupportedModelError,
)
from ttt_compiler.runtime.root import require_root

D, FF = unusual.D, unusual.FF


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Scaled(nn.Module):
    """``addmm`` does more than project."""

    def __init__(self, beta=2.0):
        super().__init__()
        self.up = nn.Linear(D, FF)
        self.w, self.b = nn.Parameter(torch.randn(FF, D) * 0.2), nn.Parameter(torch.randn(D))
        self.beta = beta

    def forward(self, x):
        h = F.gelu(self.up(x))
        y = torch.addmm(self.b, h.reshape(-1, FF), self.w, alpha=0.5, beta=self.beta)
        return y.view(x.shape)


def test_alpha_and_beta_are_kept():
    model = unusual.Stack(Scaled())
    x = inputs()
    with torch.no_grad():
        base = model(x)
        assert torch.equal(converted(model, scale=0)(x), base)
        fast = models.randomize(model)(x)
    # The same with the factors folded into the weights.
    plain = unusual.Stack(unusual.Raw(True))
    # A copy: parameters of a converted model cannot be in another one.
    mine = copy.deepcopy(model.mlps[0])

    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.w, self.b = copy.deepcopy((mine.up, mine.w, mine.b))

        def forward(self, x):
            return F.gelu(self.up(x)) @ self.w * 0.5 + 2.0 * self.b

    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "norm" in k}, strict=False)
    plain.mlps[0] = Folded()
    ttt.convert(plain, CONFIG, example_inputs=((x,), {}))
    with torch.no_grad():
        for name in ("ttt_conv_w", "ttt_proj_w"):
            getattr(plain.mlps[0], name).copy_(getattr(mine, name))
        torch.testing.assert_close(fast, oracle_call(plain, x), rtol=1e-4, atol=1e-4)


class TiedInside(nn.Module):
    """An outer module applies a weight after the inner one that shares it has."""

    def __init__(self):
        super().__init__()
        self.inner = unusual.Stack(unusual.Raw(False))
        self.norm = nn.LayerNorm(D)
        self.w1 = nn.Parameter(torch.randn(FF, D) * 0.2)
        self.w2 = self.inner.mlps[0].w2

    def forward(self, x):
        x = self.inner(x)
        return x + F.linear(F.gelu(F.linear(self.norm(x), self.w1)), self.w2)


class Holding(nn.Module):
    def __init__(self):
        super().__init__()
        self.held = TiedInside()

    def forward(self, x):
        return self.held(x)


def test_modules_that_share_a_weight_keep_their_own_conv():
    model = converted(Holding())
    convs = {n: p for n, p in model.named_parameters() if "ttt_conv" in n}
    assert sorted(convs) == ["held.inner.mlps.0.ttt_conv_w2", "held.ttt_conv_w2"]
    x = inputs()
    with torch.no_grad():
        # Only the outer place writes: the inner part computes what it did.
        convs["held.inner.mlps.0.ttt_conv_w2"].zero_()
        inner = model.held.inner
        with ttt.disabled(model):
            middle, base = inner(x), model(x)
        y = model(x)
        assert (y - base).abs().max() > 0.05
        t = model.held.norm(middle)
        h = F.gelu(F.linear(t, model.held.w1))
        from ttt_compiler.codegen import reference

        truth = middle + reference.batched(
            h, t, model.held.w2, model.held.ttt_conv_w2, model.held.ttt_proj_w2, 1.0, 4
        )
        torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4)


class Looped(unusual.Stack):
    times = 1

    def forward(self, x):
        for i in range(self.times):
            if i not in getattr(self, "skipped", ()):
                x = x + self.mlps[0](self.norms[0](x))
        return x


@pytest.mark.parametrize(("seen", "then"), [(1, 2), (2, 1), (2, 3)])
def test_a_running_state_never_serves_two_places(seen, then):
    model = Looped(unusual.MLP())
    model.times = seen
    converted(model)
    session = ttt.Session(model, 2)
    with torch.no_grad():
        model(inputs(5), ttt_state=session.state)
        model.times = then
        with pytest.raises(TTTError, match=r"places|more often"):
            model(inputs(5), ttt_state=session.state)


def test_a_fused_encoder_layer_is_never_slow_in_silence():
    model = ttt.convert(unusual.Encoder().eval(), CONFIG, example_inputs=((inputs(),), {}))
    models.randomize(model)
    x = inputs()
    with torch.no_grad():
        truth = oracle_call(model, x)

        @torch.compile(backend=BACKEND)
        def function(x):
            return model(x)

        with pytest.raises((GraphRewriteError, torch._dynamo.exc.BackendCompilerFailed), match="fast-weight"):
            function(x)
        model.layer.compile(backend=BACKEND)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        part = model.layer(x, src_mask=mask, is_causal=True)
        torch.testing.assert_close(part, truth, rtol=1e-4, atol=1e-4)


class Changing(unusual.MLP):
    """Applies its weight in a form that is no MLP when asked to."""

    flag = False

    def forward(self, x):
        if self.flag:
            return F.linear(F.relu(self.up(x)).cumsum(1), self.down.weight, self.down.bias)
        return super().forward(x)


def test_a_chosen_weight_in_another_form_raises():
    model = converted(unusual.Stack(Changing(), unusual.MLP()))
    model(inputs())
    model.mlps[0].flag = True
    with pytest.raises(GraphRewriteError, match=r"form that is not recognised|not recognised as"):
        model(inputs())


class OneRow(unusual.MLP):
    """All rows of the batch in one: with a single row nobody can tell."""

    def forward(self, x):
        return super().forward(x.reshape(1, -1, D)).view(x.shape)


class Windows(unusual.MLP):
    """Sequences longer than a window are cut into rows of their own."""

    def forward(self, x):
        b, t, _ = x.shape
        if t <= 16:
            return super().forward(x)
        return super().forward(x.reshape(b * (t // 16), 16, D)).view(b, t, D)


def test_a_layout_that_was_not_seen_raises():
    model = converted(unusual.Stack(Windows()))
    model(inputs(9))
    with pytest.raises(GraphRewriteError, match="another layout"):
        model(inputs(32))


@pytest.mark.parametrize("mlp", [OneRow, unusual.FlatTimeMajor, unusual.TimeMajor, unusual.Flattening])
def test_one_row_is_looked_at_twice(mlp):
    """Converted with a single row, called with two: right, or refused at conversion."""
    model = unusual.Stack(mlp())
    try:
        converted(model, inputs(rows=1))
    except TTTError:
        assert mlp is OneRow
        return
    assert mlp is not OneRow
    x = inputs()
    with torch.no_grad():
        torch.testing.assert_close(model(x), oracle_call(model, x), rtol=1e-4, atol=1e-4)


class OneAtATime(unusual.Stack):
    """Finds out that it cannot take two rows when its first part has run."""

    def forward(self, x):
        y = super().forward(x)
        torch._dynamo.graph_break()
        if x.shape[0] != 1:
            raise ValueError("one row at a time")
        return y


def test_a_model_for_one_row_is_looked_at_with_one():
    model = ttt.convert(OneAtATime(unusual.MLP()), CONFIG, example_inputs=((inputs(rows=1),), {}))
    assert [s.key for s in require_root(model)[1].specs] == ["mlps.0.down.weight"]


class Mixing(nn.Module):
    """A whole block in one module, so that checkpointing hides its mixing too."""

    def __init__(self, mode):
        super().__init__()
        self.norm, self.mlp, self.mode = nn.LayerNorm(D), unusual.MLP(), mode

    def forward(self, x):
        if self.mode == "bidirectional":
            mixed = x.mean(1, keepdim=True)
        else:
            blocks = torch.arange(x.shape[1]) // 8
            mixed = (blocks[:, None] == blocks[None, :]).to(x.dtype) @ x
        return x + self.mlp(self.norm(x + mixed))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("mode", ["bidirectional", "in blocks of 8"])
def test_what_sees_later_tokens_is_refused_wherever_it_stands(mode, checkpointed):
    model = Mixing(mode)
    model = unusual.Checkpointed(model) if checkpointed else model
    with pytest.raises(NonCausalModelError, match="later tokens"):
        ttt.convert(nn.Sequential(model), CONFIG, example_inputs=((inputs(9),), {}))


def test_checkpointed_layers_may_put_tokens_first():
    model = converted(unusual.Stack(unusual.Checkpointed(unusual.TimeMajor())))
    x = inputs()
    with torch.no_grad():
        torch.testing.assert_close(model(x), oracle_call(model, x), rtol=1e-4, atol=1e-4)


class Masked(unusual.Stack):
    def forward(self, x, attention_mask=None):
        return super().forward(x)


@pytest.mark.parametrize(
    "mask",
    [torch.zeros(2, 11), torch.ones(11, 11, dtype=torch.bool).tril(), torch.ones(2, 5, dtype=torch.long)],
    ids=["additive", "causal", "short"],
)
def test_a_mask_of_another_meaning_raises(mask):
    model = Masked(unusual.MLP())
    converted(model)
    with pytest.raises(PositionError, match="which tokens are padding"):
        model(inputs(), attention_mask=mask)


class Transposing(unusual.Einsum):
    def forward(self, x):
        h = F.silu(torch.einsum("btd,df->btf", x, self.w1))
        return torch.einsum("btf,fd->tbd", h, self.w2).transpose(0, 1)


def test_an_einsum_that_moves_axes_is_no_site():
    with pytest.raises(NoMLPFoundError):
        ttt.convert(unusual.Stack(Transposing()), CONFIG, example_inputs=((inputs(),), {}))


class Colliding(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.ParameterDict({"down": nn.Parameter(torch.randn(D, FF))})
        self.p_down = nn.Parameter(torch.randn(D, FF))
        self.up = nn.Parameter(torch.randn(FF, D))

    def forward(self, x):
        for w in (self.p["down"], self.p_down):
            x = x + F.linear(F.gelu(F.linear(F.rms_norm(x, (D,)), self.up)), w)
        return x


def test_names_in_the_way_are_refused_before_anything_changes():
    model = Colliding()
    with pytest.raises(UnsupportedModelError, match=r"p_down and p\.down|p\.down and p_down"):
        ttt.convert(model, CONFIG, example_inputs=((inputs(),), {}))
    stack = unusual.Stack(unusual.MLP(), unusual.MLP())
    stack.mlps[1].down.ttt_conv = nn.Parameter(torch.zeros(1))
    with pytest.raises(UnsupportedModelError, match=r"mlps\.1\.down\.ttt_conv exists already"):
        ttt.convert(stack, CONFIG, example_inputs=((inputs(),), {}))
    for m in (model, stack):
        assert not [n for n, _ in m.named_parameters() if "ttt_proj" in n]
        assert not any("FastWeight" in type(c).__name__ for c in m.modules())


class Mixed(unusual.Stack):
    """One weight, applied by its layer and by a function of another module."""

    def __init__(self):
        super().__init__(unusual.MLP(), unusual.MLP())

    def forward(self, x):
        x = super().forward(x)
        mlp = self.mlps[0]
        return x + F.linear(F.gelu(mlp.up(self.norms[0](x))), mlp.down.weight)


def test_a_layer_and_a_function_may_apply_one_weight():
    model = converted(nn.Sequential(Mixed()))
    x = inputs()
    with torch.no_grad():
        with ttt.disabled(model):
            base = model(x)
        fast = model(x)
        assert (fast - base).abs().max() > 0.05
        torch.testing.assert_close(fast[:, :4], base[:, :4])
        for name, p in model.named_parameters():
            if "ttt_conv" in name:
                p.zero_()
        torch.testing.assert_close(model(x), base, rtol=0, atol=1e-6)


class Counting(unusual.Stack):
    """Keeps a memory in a buffer, and reads it."""

    def __init__(self):
        super().__init__(unusual.MLP())
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += x.shape[1]
        return super().forward(x * (1 + 0.1 * self.seen))


def test_looking_at_a_model_leaves_its_memory_alone():
    model = Counting()
    ttt.convert(model, CONFIG, example_inputs=((inputs(),), {}))
    assert model.seen == 0


def test_rewrite_keeps_buffers_and_control_flow_of_an_exported_graph():
    class Module(unusual.Stack):
        def __init__(self):
            super().__init__(unusual.MLP())
            self.register_buffer("scale", torch.zeros(()))

        def forward(self, x):
            y = super().forward(x) * self.scale.exp()
            return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (y,))

    model, x = Module().eval(), inputs()
    program = torch.export.export(model, (x,))
    graph = ttt.rewrite(program, CONFIG)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=0, atol=1e-5)
        before = graph(x)
        dict(graph.named_buffers())["scale"].fill_(1.0)
        assert (graph(x) - before).abs().max() > 0.5, "the buffer was frozen into the graph"
        graph(-x)
    assert model.scale == 0 or dict(graph.named_buffers())["scale"] is model.scale


def test_parts_that_backward_runs_again_miss_their_positions():
    from torch.utils.checkpoint import checkpoint

    class Packed(nn.Module):
        reentrant = False

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(unusual.Stack(unusual.MLP()) for _ in range(2))

        def forward(self, x, position_ids=None):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=True) if self.reentrant else block(x)
            return x

    x, pos = inputs().requires_grad_(), torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]])
    model = Packed()
    ttt.convert(model, CONFIG, example_inputs=((inputs(),), {}))
    models.randomize(model)
    for block in model.blocks:
        block.compile(backend=BACKEND)
    model(x, position_ids=pos).sum().backward()
    model.reentrant = True
    with pytest.raises(UnsupportedModelError, match="Compile the whole model"):
        model(x, position_ids=pos).sum().backward()
    model(x).sum().backward()
