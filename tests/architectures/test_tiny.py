"""Every causal language model type builds tiny and runs, or says why not; the names of its MLPs are known."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from ttt_compiler.architectures import (
    UnbuildableError,
    build,
    causal_lm_types,
    expected_down_projections,
    token_inputs,
    unbuildable_types,
)
from ttt_compiler.architectures.families import FAMILIES
from ttt_compiler.architectures.tiny import MAX_PARAMETERS

TYPES = causal_lm_types()
BUILDABLE = tuple(t for t in TYPES if t not in unbuildable_types())
WITHOUT_MLP = {"mamba", "mamba2", "falcon_mamba"}

_build = functools.lru_cache(maxsize=None)(build)


def _logits(model: nn.Module, seed: int) -> torch.Tensor:
    with torch.no_grad():
        result = model(**token_inputs(model, 2, 9, seed))
    logits = result["logits"]
    assert isinstance(logits, torch.Tensor)
    return logits


def test_there_are_types_and_few_cannot_be_built() -> None:
    assert {"llama", "gpt2", "mixtral"} <= set(TYPES)
    assert list(TYPES) == sorted(TYPES)
    assert len(BUILDABLE) >= 0.95 * len(TYPES)


@pytest.mark.parametrize("model_type", sorted(unbuildable_types()))
def test_the_reason_is_one_line(model_type: str) -> None:
    with pytest.raises(UnbuildableError) as raised:
        build(model_type)
    assert str(raised.value) == unbuildable_types()[model_type]
    assert "\n" not in str(raised.value)


def test_what_would_be_large_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "llama", {"intermediate_size": 10**12})
    with pytest.raises(UnbuildableError, match="parameters, more than 5,000,000"):
        build("llama")


def test_a_refused_configuration_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "llama", {"num_attention_heads": 5})
    with pytest.raises(UnbuildableError, match="not a multiple of the number of attention heads"):
        build("llama")


@pytest.mark.parametrize("model_type", BUILDABLE)
def test_is_tiny_and_reads_text(model_type: str) -> None:
    model = _build(model_type)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < MAX_PARAMETERS
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.isfinite().all(), name
        assert parameter.dim() < 2 or parameter.any(), f"{name} is all zero"
    logits = _logits(model, seed=0)
    assert logits.isfinite().all()
    assert not torch.equal(logits, _logits(model, seed=1)), "the output does not depend on the text"


@pytest.mark.parametrize("model_type", BUILDABLE)
def test_down_projections_are_known_by_name(model_type: str) -> None:
    model = _build(model_type)
    expected = expected_down_projections(model)
    assert bool(expected) == (model_type not in WITHOUT_MLP)
    parameters = dict(model.named_parameters())
    for name in expected:
        assert 64 in parameters[name].shape[-2:], name


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", {f"model.layers.{i}.mlp.down_proj.weight": "dense" for i in range(2)}),
        ("gpt2", {f"transformer.h.{i}.mlp.c_proj.weight": "dense" for i in range(2)}),
        ("opt", {f"model.decoder.layers.{i}.fc2.weight": "dense" for i in range(2)}),
        # Its attention ends in a layer called output.dense too.
        ("bert", {f"bert.encoder.layer.{i}.output.dense.weight": "dense" for i in range(2)}),
        ("ctrl", {f"transformer.h.{i}.ffn.2.weight": "dense" for i in range(2)}),
        ("rwkv", {f"rwkv.blocks.{i}.feed_forward.value.weight": "dense" for i in range(2)}),
        # Its attention has experts too.
        ("jetmoe", {f"model.layers.{i}.mlp.output_linear.weight": "moe" for i in range(2)}),
        # Its router has a down_proj too.
        ("zaya", {f"model.layers.{i}.mlp.experts.down_proj": "moe" for i in range(2)}),
        # Its norms have an mlp too.
        (
            "axk2",
            {
                "model.layers.0.mlp.down_proj.weight": "dense",
                "model.layers.1.mlp.experts.down_proj": "moe",
                "model.layers.1.mlp.shared_experts.down_proj.weight": "shared",
            },
        ),
        (
            "nemotron_h",
            {
                "model.layers.1.mixer.experts.down_proj": "moe",
                "model.layers.1.mixer.shared_experts.down_proj.weight": "shared",
                "model.layers.3.mixer.down_proj.weight": "dense",
            },
        ),
        # One block, used by two layers.
        ("zamba", {"model.layers.1.shared_transf.feed_forward.down_proj.weight": "dense"}),
        # Its image tower is no part of the text model.
        ("git", {f"git.encoder.layer.{i}.output.dense.weight": "dense" for i in range(2)}),
        ("mamba", {}),
    ],
)
def test_known_families(model_type: str, expected: dict[str, str]) -> None:
    assert expected_down_projections(_build(model_type)) == expected


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("axk1", {"dense", "sparse"}),
        ("qwen3_next", {"linear_attention", "full_attention"}),
        ("kimi_linear", {"linear_attention", "full_attention", "dense", "sparse"}),
        ("gemma3_text", {"sliding_attention", "full_attention"}),
        ("lfm3", {"conv", "full_attention", "sliding_attention"}),
        ("nemotron_h", {"linear_attention", "moe", "full_attention", "mlp"}),
    ],
)
def test_every_kind_of_layer_is_there(model_type: str, kinds: set[str]) -> None:
    config = _build(model_type).config
    lists = [getattr(config, name, None) or [] for name in ("layer_types", "mlp_layer_types")]
    assert kinds <= {kind for one in lists for kind in one}


def test_the_weights_are_fixed_and_the_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    first, second = build("gemma2").state_dict(), build("gemma2").state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_text_avoids_special_tokens() -> None:
    model = _build("llama")
    ids = token_inputs(model, 64, 64, seed=3)["input_ids"]
    assert ids.shape == (64, 64)
    assert int(ids.min()) >= 10
    assert int(ids.max()) < 80
    assert torch.equal(ids, token_inputs(model, 64, 64, seed=3)["input_ids"])
