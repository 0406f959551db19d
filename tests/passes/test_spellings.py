"""Every spelling of an MLP gives exactly its down-projections, whoever captured the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.capture import capture, capture_lm, exported, ids, names, reasons
from tests.passes.families import FAMILIES
from tests.passes.handmade import FF, D, GatedAttention, Model, SwiGLU
from tests.passes.spellings import SPELLINGS
from ttt_compiler.passes.find_mlps import MLPReport, find_mlps


def only(report: MLPReport, expected: list[str]) -> None:
    assert names(report) == sorted(expected)
    assert {s.kind for s in report.sites} == {"dense"}
    assert not report.nested


@pytest.mark.parametrize("level", ["eval", "train", "export"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str, level: str) -> None:
    make, expected = SPELLINGS[name]
    model = Model(make()).train(level == "train")
    gm = exported(model.eval(), ids()) if level == "export" else capture(model, ids())
    only(find_mlps(gm), [f"mlp.{w}" for w in expected])


@pytest.mark.parametrize(
    ("name", "transposed"),
    [("matmul_fd", True), ("matmul_df", False), ("einsum_fd", True), ("einsum_df", False), ("gpt2", True)],
)
def test_layout_of_the_weight(name: str, transposed: bool) -> None:
    (site,) = find_mlps(capture(Model(SPELLINGS[name][0]()), ids())).sites
    assert site.transposed is transposed


@contextlib.contextmanager
def fast_path(enabled: bool) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class TestEncoderLayer:
    """``nn.TransformerEncoderLayer`` with a causal mask; without ``batch_first`` tokens come first."""

    @staticmethod
    def graph(layer: nn.Module, fast: bool) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(8)
        grad = torch.enable_grad() if layer.training else torch.no_grad()
        with grad, fast_path(fast):
            return capture(layer, torch.randn(2 if layer.batch else 8, 8, D), src_mask=mask, is_causal=True)

    @staticmethod
    def layer(batch_first: bool, training: bool, norm_first: bool = False) -> nn.Module:
        layer = nn.TransformerEncoderLayer(D, 4, FF, batch_first=batch_first, norm_first=norm_first)
        layer.batch = batch_first
        return layer.train(training)

    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    def test_found(self, batch_first: bool, training: bool) -> None:
        gm = self.graph(self.layer(batch_first, training, norm_first=batch_first), fast=False)
        only(find_mlps(gm), ["linear2.weight"])

    def test_fast_path_is_named(self) -> None:
        report = find_mlps(self.graph(self.layer(batch_first=True, training=False), fast=True))
        assert not report.sites
        assert any("set_fastpath_enabled" in r.reason for r in report.rejections)


class TestWrapped:
    @pytest.mark.parametrize("training", [True, False])
    def test_peft_lora(self, training: bool) -> None:
        peft = pytest.importorskip("peft")
        projections = ["gate_proj", "up_proj", "down_proj", "q_proj", "o_proj"]
        config = peft.LoraConfig(r=8, target_modules=projections, lora_dropout=0.1, init_lora_weights=False)
        model = peft.get_peft_model(FAMILIES["llama"].build(), config).train(training)
        report = find_mlps(capture_lm(model, use_cache=False))
        found = "model.layers.{}.mlp.down_proj.base_layer.weight"
        only(report, [found.format(i) for i in range(2)])

    @pytest.mark.parametrize(
        "config", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Float8WeightOnlyConfig"]
    )
    def test_torchao_weight_only(self, config: str) -> None:
        quantization = pytest.importorskip("torchao.quantization")
        model = FAMILIES["llama"].build()
        expected = FAMILIES["llama"].expected(model)
        options = {"weight_dtype": torch.int4} if config.startswith("Intx") else {}
        quantization.quantize_(model, getattr(quantization, config)(**options))
        weight = model.get_parameter(expected[0])
        assert type(weight) is not nn.Parameter
        only(find_mlps(capture_lm(model, use_cache=False)), expected)


class TestSharedLayers:
    """One weight, several sites: each use is one, with nodes of its own."""

    def test_albert(self) -> None:
        import transformers

        config = transformers.AlbertConfig(
            vocab_size=101,
            hidden_size=64,
            embedding_size=32,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
        )
        model = transformers.AlbertModel(config).eval()
        report = find_mlps(capture_lm(model))
        only(report, ["encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight"] * 3)
        assert len({s.contraction for s in report.sites}) == 3
        assert len({s.weight for s in report.sites}) == 1

    @pytest.mark.parametrize("loops", [1, 4])
    def test_universal_transformer(self, loops: int) -> None:
        class Universal(Model):
            def forward(self, tokens: Tensor) -> Tensor:
                x = self.embed(tokens)
                for step in range(loops):
                    x = self.block(x + 0.01 * step)
                return self.head(x)

        report = find_mlps(capture(Universal(SwiGLU), ids()))
        only(report, ["mlp.down.weight"] * loops)
        assert len({s.x for s in report.sites}) == loops


class TestFunctional:
    """No modules: weights are tensors in a dict, as inputs of the compiled function."""

    @pytest.mark.parametrize("einsum", [True, False])
    def test_dict_of_tensors(self, einsum: bool) -> None:
        def block(x: Tensor, w: dict[str, Tensor]) -> Tensor:
            n = F.layer_norm(x, (D,))
            if einsum:
                return x + torch.einsum(
                    "btf,fd->btd", torch.einsum("btd,df->btf", n, w["up"]).relu(), w["out"]
                )
            return x + F.silu(n @ w["up"]) @ w["out"]

        weights = {"up": torch.randn(D, FF), "out": torch.randn(FF, D)}
        (site,) = find_mlps(capture(block, torch.randn(2, 8, D), weights)).sites
        assert (site.d_ff, site.d_model, site.transposed) == (FF, D, True)

    @pytest.mark.parametrize("spelling", ["mul", "masked_fill", "where"])
    def test_padding_mask(self, spelling: str) -> None:
        """A mask per token, given to the model, does not say what h is made of."""
        up, down = nn.Linear(D, FF), nn.Linear(FF, D)

        def block(x: Tensor, mask: Tensor) -> Tensor:
            h = F.gelu(up(F.layer_norm(x, (D,))))
            if spelling == "mul":
                h = h * mask[..., None]
            elif spelling == "where":
                h = torch.where(mask[..., None], h, 0.0)
            else:
                h = h.masked_fill(~mask[..., None], 0.0)
            return x + down(h)

        report = find_mlps(capture(block, torch.randn(2, 8, D), torch.ones(2, 8, dtype=torch.bool)))
        assert len(report.sites) == 1

    def test_memories_are_no_weights(self) -> None:
        """A batch of keys that is only multiplied by is data, as static as it looks."""

        def read(x: Tensor, memory: Tensor, up: Tensor) -> Tensor:
            return x + torch.matmul(F.gelu(torch.matmul(x, up)), memory)

        inputs = torch.randn(2, 8, D), torch.randn(2, FF, D), torch.randn(D, FF)
        assert not find_mlps(capture(read, *inputs)).sites


class FusedOutput(nn.Module):
    """ViT-22B, Flux: attention and MLP share one output projection over their concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up, self.out = GatedAttention(), nn.Linear(D, FF), nn.Linear(D + FF, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.attention(x), F.gelu(self.up(x))], dim=-1))


class ConvolutionMLP(nn.Module):
    """ConvNeXt's ``conv_mlp``, SqueezeBERT: the projections are convolutions of kernel 1."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(D, FF, 1), nn.Conv1d(FF, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class WeightedEinsum(nn.Module):
    """All experts at once, weighted in the contraction itself."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, D, FF)), nn.Parameter(torch.randn(3, FF, D))

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(torch.einsum("btd,edf->btef", x, self.up))
        return torch.einsum("btef,efd,bte->btd", h, self.down, self.router(x).softmax(-1))


@pytest.mark.parametrize(
    ("make", "weight", "why"),
    [
        (FusedOutput, "out.weight", r"follows cat of 2 values (64 + 160 features)"),
        (ConvolutionMLP, "down.weight", "features are on axis 1"),
        (WeightedEinsum, "down", "an einsum of 3 operands"),
    ],
)
def test_known_misses_are_named(make: type[nn.Module], weight: str, why: str) -> None:
    gm = capture(Model(make), ids())
    assert not find_mlps(gm).sites
    (found,) = reasons(gm, f"mlp.{weight}")
    assert why in found


def test_other_convolutions_are_not_mentioned() -> None:
    class Stem(ConvolutionMLP):
        def forward(self, x: Tensor) -> Tensor:
            return x + F.conv1d(x.transpose(1, 2), self.up.weight[:D]).transpose(1, 2)

    report = find_mlps(capture(Model(Stem), ids()))
    assert not any("axis 1" in r.reason for r in report.rejections)
