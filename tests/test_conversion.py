"""Converting, reverting, and the mistakes that are refused before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import ttt_compiler as ttt
from tests import models
from ttt_compiler.architectures import build, token_inputs
from ttt_compiler.errors import (
    AlreadyConvertedError,
    LayerSelectionError,
    NoMLPFoundError,
    NonCausalModelError,
    NotCompiledError,
    NotConvertedError,
    UnsupportedModelError,
)
from ttt_compiler.runtime.site import FastWeightSite

DOWN = {
    "llama": "model.layers.{}.mlp.down_proj",
    "qwen3": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_parameters_are_there_before_an_optimiser_is_built(family):
    model = ttt.convert(models.tiny(family), ttt.TTTConfig(layers="all"))
    added = {f"{DOWN[family].format(i)}.ttt_{p}" for i in (0, 1) for p in ("conv", "proj")}
    names = dict(model.named_parameters())
    assert added == {n for n in names if "ttt_" in n}
    assert added <= model.state_dict().keys()
    conv, proj = (names[f"{DOWN[family].format(0)}.ttt_{p}"] for p in ("conv", "proj"))
    assert conv.shape == (32, 1, 5)
    assert not conv.any()
    assert torch.equal(proj, torch.diag(proj.diagonal()))
    assert 0.005 < proj.diagonal().std() < 0.05
    assert all(p.requires_grad for p in (conv, proj))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_revert_restores_exactly(family):
    model = models.tiny(family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes = {n: type(m) for n, m in model.named_modules()}
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    tokens = models.ids(2, 9)
    out = model(tokens).logits
    ttt.convert(model, ttt.TTTConfig(layers="all"))
    assert any(isinstance(m, FastWeightSite) for m in model.modules())
    ttt.revert(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: set(vars(m)) - {"_compiled_call_impl"} for n, m in model.named_modules()} == attributes
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(tokens).logits, out)
    with pytest.raises(NotConvertedError):
        ttt.revert(model)
    ttt.convert(model, ttt.TTTConfig(layers=[1]))


def test_conversion_leaves_training_flags_and_random_state_alone():
    model = models.tiny().train()
    model.model.layers[0].eval()
    flags = {n: m.training for n, m in model.named_modules()}
    rng = torch.get_rng_state()
    ttt.convert(model, ttt.TTTConfig(layers="all", proj=False))
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_frozen_model_trains_its_adapter_and_nothing_else():
    model = models.tiny("gpt2").requires_grad_(False)
    model.transformer.h[0].mlp.c_proj.bias.requires_grad_(True)
    ttt.convert(model, ttt.TTTConfig(layers="all"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "ttt_" not in n} == {"transformer.h.0.mlp.c_proj.bias"}
    assert sum("ttt_" in n for n in trained) == 4
    ttt.revert(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["transformer.h.0.mlp.c_proj.bias"]


def test_modules_that_a_wrapper_moved_are_still_found(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.base_layer = inner

        def forward(self, x):
            return self.base_layer(x)

    model = models.converted()
    mlp = model.model.layers[0].mlp
    mlp.down_proj = Wrapper(mlp.down_proj)
    assert ttt.Session(model).drift()["model.layers.0.mlp.down_proj.weight"] == [0.0]
    ttt.save_adapter(model, tmp_path)
    ttt.load_adapter(models.tiny(), tmp_path)
    ttt.revert(model)
    assert type(mlp.down_proj.base_layer) is nn.Linear


def test_converted_but_not_compiled_says_what_to_type():
    model = models.converted()
    for call in (
        lambda: model(models.ids(1, 5)),
        lambda: model.generate(models.ids(1, 5), max_new_tokens=2),
        lambda: copy.deepcopy(model)(models.ids(1, 5)),
        lambda: torch.compile(model, backend="eager")(models.ids(1, 5)),
    ):
        with pytest.raises(NotCompiledError, match=r'model\.compile\(backend="inplace_ttt"\)'):
            call()


def test_disabled_is_the_base_model():
    base, model = models.tiny(), models.converted()
    tokens = models.ids(2, 9)
    with ttt.disabled(model):
        assert torch.equal(model(tokens).logits, base(tokens).logits)
        assert torch.equal(model.generate(tokens, max_new_tokens=5), base.generate(tokens, max_new_tokens=5))
    with pytest.raises(NotCompiledError):
        model(tokens)


def test_converting_twice():
    model = models.converted()
    config = model._ttt_root.config
    assert ttt.convert(model, config) is model
    with pytest.raises(AlreadyConvertedError, match="revert"):
        ttt.convert(model, ttt.TTTConfig())


def test_models_that_see_both_directions_are_refused_unchanged():
    small = {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    bert = BertForMaskedLM(BertConfig(vocab_size=97, max_position_embeddings=64, **small)).eval()
    with pytest.raises(NonCausalModelError, match=r"encoder\.layer\.0.*sees later tokens"):
        ttt.convert(bert, ttt.TTTConfig(layers="all"))
    assert not any("ttt" in n for n, _ in bert.named_parameters())
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=32, d_ff=80, num_layers=1, num_heads=4, d_kv=8)
    )
    with pytest.raises(NonCausalModelError, match="encoder-decoder"):
        ttt.convert(t5)


def test_no_mlp_lists_what_was_refused():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(NoMLPFoundError, match=r"(?s)Refused:.*mixer.*:"):
        ttt.convert(mamba.eval())


def test_routed_experts_are_left_alone():
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    with pytest.raises(NoMLPFoundError, match="routed experts"):
        ttt.convert(MixtralForCausalLM(config).eval())


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 40)
        self.down = nn.Linear(40, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def test_other_modules_need_example_inputs():
    with pytest.raises(UnsupportedModelError, match="example_inputs"):
        ttt.convert(Block())
    sites = ttt.find_sites(Block(), torch.randn(2, 9, 16))
    assert [(s.weight, s.d_model, s.d_ff, s.activation, s.bias) for s in sites] == [
        ("down.weight", 16, 40, "relu", True)
    ]


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=97,
                hidden_size=32,
                intermediate_size=80,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
        )
    with pytest.raises(UnsupportedModelError, match="Load them first"):
        ttt.convert(model, ttt.TTTConfig(layers="all"))
    assert not any("ttt_" in n for n, _ in model.named_parameters())
    assert "Load them first" in str(ttt.explain(model))


def test_a_function_chooses_layers_and_is_stored_as_names(tmp_path):
    def second(mlp):
        return mlp.block == 1 and mlp.d_ff == 80

    tokens = models.ids(2, 9)
    options = {"layers": second, "chunk_size": 4}
    model = models.tiny()
    assert "<function second>" in str(ttt.explain(model, ttt.TTTConfig(**options)))
    with torch.no_grad():
        torch.compile(model, backend="inplace_ttt_eager", options=options)(tokens)
        torch.compile(model, backend="inplace_ttt_eager", options=options)(tokens)
    added = {n for n, _ in model.named_parameters() if "ttt_" in n}
    assert added == {f"model.layers.1.mlp.down_proj.ttt_{p}" for p in ("conv", "proj")}
    assert ttt.convert(model, ttt.TTTConfig(**options)) is model
    ttt.save_adapter(model, tmp_path)
    other = ttt.load_adapter(models.tiny(), tmp_path)
    assert {n for n, _ in other.named_parameters() if "ttt_" in n} == added
    with pytest.raises(LayerSelectionError, match="selects none"):
        ttt.convert(models.tiny(), ttt.TTTConfig(layers=lambda mlp: False))


def test_experts_none_leaves_shared_experts_alone():
    model = build("deepseek_v3")
    names = {m.weight: m.kind for m in ttt.find_sites(model, **token_inputs(model, 2, 9))}
    assert sorted(names.values()) == ["dense", "moe", "shared"]
    for experts, kinds in (("shared", {"dense", "shared"}), ("none", {"dense"})):
        ttt.convert(model, ttt.TTTConfig(layers="all", experts=experts))
        chosen = {
            n.removesuffix("ttt_conv") + "weight" for n, _ in model.named_parameters() if "ttt_conv" in n
        }
        assert {names[n] for n in chosen} == kinds
        ttt.revert(model)
