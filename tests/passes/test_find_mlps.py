"""The detector on real families, on hand-written spellings, and on decoys."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from tests.passes.capture import capture, capture_lm, ids, names, reason
from tests.passes.families import FAMILIES, Family
from tests.passes.handmade import (
    FF,
    Adapter,
    Bilinear,
    CustomActivation,
    D,
    Einsum,
    GatedAttention,
    InPlace,
    Interleaved,
    Model,
    Plain,
    RawParameters,
    Routed,
    Square,
    SubNorm,
    SwiGLU,
    ThreeLayers,
    TokenMixer,
    WholeInAutograd,
    WithLoRA,
)
from ttt_compiler.passes.embeddings import token_embeddings
from ttt_compiler.passes.find_mlps import MLPSite, find_mlps
from ttt_compiler.passes.graph import source_fqn


def node_with_weight(gm: fx.GraphModule, fqn: str) -> fx.Node:
    weight = next(n for n in gm.graph.nodes if n.op == "placeholder" and source_fqn(n) == fqn)
    (user,) = weight.users
    return user


@functools.cache
def graph_of(name: str) -> tuple[nn.Module, fx.GraphModule]:
    """Model and inference graph of a family; shared between tests, so not to be changed."""
    model = FAMILIES[name].build()
    options = {} if name == "bert" else {"use_cache": False}
    return model, capture_lm(model, **options)


class TestFamilies:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_finds_exactly_the_down_projections(self, name: str) -> None:
        family = FAMILIES[name]
        model, gm = graph_of(name)
        report = find_mlps(gm)
        assert names(report) == family.expected(model)
        assert {s.kind for s in report.sites} == family.kinds
        assert report.matched_count == family.count
        assert all(r.reason for r in report.rejections)
        order = {n: i for i, n in enumerate(gm.graph.nodes)}
        places = [order[s.contraction] for s in report.sites]
        assert places == sorted(places)
        parameters = dict(model.named_parameters())
        for site in report.sites:
            shape = tuple(parameters[source_fqn(site.weight) or ""].shape[-2:])
            expected = (site.d_model, site.d_ff)
            assert shape == (expected[::-1] if site.transposed else expected)
            assert site.h in site.contraction.all_input_nodes
            assert site.weight_operand in site.contraction.all_input_nodes
            assert site.weight.op == "placeholder"

    @pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
    def test_training_graphs_with_dropout(self, name: str) -> None:
        family: Family = FAMILIES[name]
        model = family.build().train()
        assert names(find_mlps(capture_lm(model, use_cache=False))) == family.expected(model)

    def test_generation_graph_with_a_cache(self) -> None:
        model = FAMILIES["qwen3"].build()
        expected = FAMILIES["qwen3"].expected(model)
        assert names(find_mlps(capture_lm(model, use_cache=True))) == expected
        with torch.no_grad():
            cache = model(input_ids=ids(), use_cache=True).past_key_values
        gm = capture_lm(model, length=1, use_cache=True, past_key_values=cache)
        assert names(find_mlps(gm)) == expected

    def test_dynamic_shapes(self) -> None:
        model = FAMILIES["gpt2"].build()
        tokens = ids()
        torch._dynamo.mark_dynamic(tokens, 0)
        torch._dynamo.mark_dynamic(tokens, 1)
        with torch.no_grad():
            gm = capture(model, input_ids=tokens, use_cache=False)
        assert names(find_mlps(gm)) == FAMILIES["gpt2"].expected(model)
        assert len(token_embeddings(gm)) == 1

    @pytest.mark.parametrize(
        ("name", "activation", "gated", "transposed", "has_bias"),
        [
            ("llama", "silu", True, False, False),
            ("gpt2", "pow+tanh", False, True, True),
            ("phi3", "silu", True, False, False),
            ("gemma2", "gelu", True, False, False),
            ("opt", "relu", False, False, True),
        ],
    )
    def test_description(
        self, name: str, activation: str, gated: bool, transposed: bool, has_bias: bool
    ) -> None:
        report = find_mlps(graph_of(name)[1])
        for site in report.sites:
            assert (site.activation, site.gated) == (activation, gated)
            assert (site.transposed, site.bias is not None) == (transposed, has_bias)
            assert (site.d_model, site.d_ff) == (64, 160)

    def test_h_and_x_of_llama(self) -> None:
        gm = graph_of("llama")[1]
        for layer, site in enumerate(find_mlps(gm).sites):
            prefix = f"model.layers.{layer}.mlp"
            gate = node_with_weight(gm, f"{prefix}.gate_proj.weight")
            up = node_with_weight(gm, f"{prefix}.up_proj.weight")
            assert site.contraction is node_with_weight(gm, f"{prefix}.down_proj.weight")
            assert site.h is site.contraction.args[0]
            assert site.x is gate.args[0] is up.args[0]

    def test_x_behind_the_view_of_gpt2(self) -> None:
        gm = graph_of("gpt2")[1]
        for site in find_mlps(gm).sites:
            assert site.x.meta["example_value"].shape == (2, 8, 64)
            assert site.h.meta["example_value"].shape == (16, 160)

    @pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt_350m", "gptj", "mamba2"])
    def test_one_token_embedding(self, name: str) -> None:
        model, gm = graph_of(name)
        (node,) = token_embeddings(gm)
        table = model.get_submodule(model.base_model_prefix).get_input_embeddings()
        assert model.get_parameter(source_fqn(node.args[1]) or "") is table.weight

    def test_position_and_type_ids_are_no_tokens(self) -> None:
        extra = {"position_ids": torch.arange(8)[None], "token_type_ids": torch.ones(2, 8).long()}
        gm = capture_lm(FAMILIES["bert"].build(), **extra)
        assert len(token_embeddings(gm)) == 1


class TestSpellings:
    @pytest.mark.parametrize(
        ("make", "weight", "activation", "gated"),
        [
            (Plain, "down.weight", "gelu", False),
            (SwiGLU, "down.weight", "silu", True),
            (Bilinear, "down.weight", "bilinear", True),
            (Interleaved, "down.weight", "sigmoid", True),
            (InPlace, "down.weight", "silu", True),
            (SubNorm, "down.weight", "relu+square", False),
            (RawParameters, "down", "relu", False),
            (Einsum, "down", "gelu", False),
            (ThreeLayers, "down.weight", "gelu", False),
            (WithLoRA, "mlp.down.weight", "silu", True),
            (Routed, "mlp.down.weight", "silu", True),
            (Adapter, "mlp.down.weight", "silu", True),
        ],
    )
    def test_finds_the_mlp(self, make: type[nn.Module], weight: str, activation: str, gated: bool) -> None:
        model = Model(make)
        report = find_mlps(capture(model, ids()))
        assert names(report) == [f"mlp.{weight}"]
        (site,) = report.sites
        assert (site.activation, site.gated, site.kind) == (activation, gated, "dense")
        parameter = model.get_parameter(f"mlp.{weight}")
        assert tuple(parameter.shape) == ((FF, D) if site.transposed else (D, FF))

    @pytest.mark.parametrize("transposed", [True, False])
    def test_layout_of_a_square_weight(self, transposed: bool) -> None:
        (site,) = find_mlps(capture(Model(Square(transposed)), ids())).sites
        assert site.transposed is transposed

    def test_in_place_h_is_the_operand_as_passed(self) -> None:
        gm = capture(Model(InPlace), ids())
        (site,) = find_mlps(gm).sites
        assert site.h is site.contraction.args[0]
        assert source_fqn(site.x) is None

    def test_dropout_in_training(self) -> None:
        report = find_mlps(capture(Model(Plain(dropout=0.1)).train(), ids()))
        assert names(report) == ["mlp.down.weight"]

    @pytest.mark.parametrize("norm_first", [True, False])
    def test_encoder_layer_in_training(self, norm_first: bool) -> None:
        layer = nn.TransformerEncoderLayer(D, 4, FF, batch_first=True, norm_first=norm_first)
        report = find_mlps(capture(layer.train(), torch.randn(2, 8, D)))
        assert names(report) == ["linear2.weight"]

    def test_fused_encoder_layer_is_reported(self) -> None:
        layer = nn.TransformerEncoderLayer(D, 4, FF, batch_first=True).eval()
        with torch.no_grad():
            report = find_mlps(capture(layer, torch.randn(2, 8, D)))
        assert not report.sites
        assert "set_fastpath_enabled" in report.rejections[0].reason

    def test_without_residual_it_must_contract(self) -> None:
        assert names(find_mlps(capture(SwiGLU(), torch.randn(2, 8, D)))) == ["down.weight"]
        autoencoder = nn.Sequential(nn.Linear(FF, D), nn.ReLU(), nn.Linear(D, FF))
        assert not find_mlps(capture(autoencoder, torch.randn(2, 8, FF))).sites

    def test_shared_block_gives_one_site_per_call(self) -> None:
        class Looped(Model):
            def block(self, x: torch.Tensor) -> torch.Tensor:
                return super().block(super().block(x))

        report = find_mlps(capture(Looped(SwiGLU), ids()))
        assert names(report) == ["mlp.down.weight"] * 2
        assert len({s.contraction for s in report.sites}) == 2

    def test_weights_as_plain_inputs(self) -> None:
        def block(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
            h = torch.relu(nn.functional.linear(x, weights["up"]))
            return x + nn.functional.linear(h, weights["down"])

        weights = {"up": torch.randn(FF, D), "down": torch.randn(D, FF)}
        (site,) = find_mlps(capture(block, torch.randn(2, 8, D), weights)).sites
        assert site.weight.meta["example_value"].shape == (D, FF)

    def test_activation_in_an_autograd_function(self) -> None:
        (site,) = find_mlps(capture(Model(CustomActivation).train(), ids())).sites
        assert (site.activation, site.gated) == ("silu", True)

    def test_tokens_first_inside_of_the_mlp(self) -> None:
        """h then has the token axes in another order than x: a reader of both must be told."""

        class TokensFirst(SwiGLU):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x.transpose(0, 1)).transpose(0, 1)

        (site,) = find_mlps(capture(Model(TokensFirst), ids())).sites
        assert "permuted" in site.notes[0]
        assert site.x.meta["example_value"].shape[:2] == (2, 8)
        assert site.h.meta["example_value"].shape[:2] == (8, 2)

    def test_foreign_kernel_as_activation(self) -> None:
        @torch.library.custom_op("ttt_test::swiglu", mutates_args=())
        def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return nn.functional.silu(gate) * up

        swiglu.register_fake(lambda gate, up: torch.empty_like(gate))

        class Foreign(SwiGLU):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.down(torch.ops.ttt_test.swiglu(self.gate(x), self.up(x)))

        with torch.no_grad():
            (site,) = find_mlps(capture(Model(Foreign), ids())).sites
        assert site.gated
        assert "foreign kernel" in site.notes[0]

    def test_one_block_alone(self) -> None:
        """Regional compilation: the residual stream is the graph's input."""
        report = find_mlps(capture(Model(SwiGLU).block, torch.randn(2, 8, D)))
        assert names(report) == ["mlp.down.weight"]
        assert "graph input" in reason(capture(SwiGLU(), torch.randn(2, 8, D)), "up.weight")

    def test_bfloat16_autocast(self) -> None:
        model = Model(SwiGLU)

        def call(tokens: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return model(tokens)

        assert names(find_mlps(capture(call, ids()))) == ["mlp.down.weight"]

    def test_is_static_overrides_the_default(self) -> None:
        gm = capture(Model(SwiGLU), ids())
        assert not find_mlps(gm, lambda node: False).sites
        by_name = find_mlps(gm, lambda node: source_fqn(node) is not None)
        assert names(by_name) == ["mlp.down.weight"]


class TestCheckpointed:
    def test_nodes_belong_to_the_body(self) -> None:
        gm = capture(Model(SwiGLU, checkpointed=True).train(), ids())
        report = find_mlps(gm)
        assert names(report) == ["mlp.down.weight"]
        (site,) = report.sites
        assert site.graph_module is not gm
        for node in (site.contraction, site.h, site.x, site.weight, site.weight_operand):
            assert node.graph is site.graph_module.graph
        assert site.top_weight.graph is gm.graph

    def test_mlp_alone_in_the_body(self) -> None:
        model = Model(SwiGLU).train()
        inner = model.mlp.forward
        model.mlp.forward = lambda x: checkpoint(inner, x, use_reentrant=False)
        (site,) = find_mlps(capture(model, ids())).sites
        assert "no residual in this graph" in site.notes

    def test_body_of_an_autograd_function_is_not_ours(self) -> None:
        report = find_mlps(capture(Model(WholeInAutograd).train(), ids()))
        assert not report.sites
        assert any("autograd_function_apply" in r.reason for r in report.rejections)

    def test_family(self) -> None:
        family = FAMILIES["llama"]
        model = family.build().train()
        model.gradient_checkpointing_enable()
        report = find_mlps(capture_lm(model, use_cache=False))
        assert names(report) == family.expected(model)


class TestDecoys:
    @pytest.mark.parametrize("wide", [True, False])
    def test_gated_attention_output(self, wide: bool) -> None:
        model = Model(SwiGLU)
        model.attention = GatedAttention(wide)
        assert "attention" in reason(capture(model, ids()), "attention.out.weight")

    @pytest.mark.parametrize(
        ("make", "weight", "why"),
        [
            (WithLoRA, "mlp.b.down.weight", "nonlinearity"),
            (WithLoRA, "mlp.a.down.weight", "width"),
            (WithLoRA, "mlp.b.up.weight", "nonlinearity"),
            (Routed, "mlp.router_out.weight", "width"),
            (TokenMixer, "mlp.down.weight", "token"),
            (Adapter, "mlp.widen.weight", "bottleneck"),
            (SwiGLU, "head.weight", "residual stream"),
            (SwiGLU, "mlp.up.weight", "residual stream"),
        ],
    )
    def test_reason(self, make: type[nn.Module], weight: str, why: str) -> None:
        assert why in reason(capture(Model(make), ids()), weight)

    def test_token_mixer_is_refused_entirely(self) -> None:
        assert not find_mlps(capture(Model(TokenMixer), ids())).sites

    def test_low_rank_attention_and_router(self) -> None:
        gm = graph_of("deepseek_v3")[1]
        attention = "model.layers.0.self_attn"
        assert "nonlinearity" in reason(gm, f"{attention}.q_b_proj.weight")
        assert "scaled_dot_product_attention" in reason(gm, f"{attention}.o_proj.weight")
        refused = {source_fqn(r.weight) for r in find_mlps(gm).rejections if r.weight}
        assert {"lm_head.weight", "model.layers.1.mlp.gate.weight"} <= refused

    def test_opt_350m_projections(self) -> None:
        gm = graph_of("opt_350m")[1]
        refused = {source_fqn(r.weight) for r in find_mlps(gm).rejections if r.weight}
        decoder = "model.decoder"
        assert {f"{decoder}.project_in.weight", f"{decoder}.project_out.weight"} <= refused

    def test_mlm_head(self) -> None:
        gm = graph_of("bert")[1]
        assert reason(gm, "cls.predictions.transform.dense.weight")


class TestMarkers:
    """Our own ``ttt::site`` markers between h and the contraction change nothing."""

    @pytest.fixture
    def marker(self) -> Iterator[torch._ops.OpOverload]:
        if hasattr(torch.ops.ttt, "site"):
            yield getattr(torch.ops.ttt.site, torch.ops.ttt.site.overloads()[0])
            return
        library = torch.library.Library("ttt", "FRAGMENT")
        library.define("site(Tensor h, Tensor[] rest, str constants) -> Tensor")
        yield torch.ops.ttt.site.default
        library._destroy()

    @pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "deepseek_v3"])
    def test_same_answer(self, name: str, marker: torch._ops.OpOverload) -> None:
        gm = capture_lm(FAMILIES[name].build(), use_cache=False)
        before = find_mlps(gm)
        (tokens,) = token_embeddings(gm)
        for site in before.sites:
            self._mark(site, marker, tokens)
        after = find_mlps(gm)
        assert names(after) == names(before)
        for old, new in zip(before.sites, after.sites, strict=True):
            assert (new.contraction, new.x, new.activation) == (
                old.contraction,
                old.x,
                old.activation,
            )
            assert new.h.target is marker
            assert new.h.args[0] is old.h
        assert [r.reason for r in after.rejections] == [r.reason for r in before.rejections]

    @staticmethod
    def _mark(site: MLPSite, marker: torch._ops.OpOverload, tokens: fx.Node) -> None:
        graph = site.graph_module.graph
        with graph.inserting_before(site.contraction):
            node = graph.call_function(marker, (site.h, [tokens, site.x, site.weight], "{}"))
        node.meta["example_value"] = site.h.meta["example_value"]
        site.contraction.replace_input_with(site.h, node)
