"""Models that see more than text: only the MLPs of the tokens learn."""

from __future__ import annotations

import pytest
import torch
import transformers

import ttt_compiler as ttt
from tests import models
from ttt_compiler.architectures.oracle import oracle_call

CONFIG = ttt.TTTConfig(layers="all", chunk_size=4, lr=1.0)
IMAGE = 100


def llava():
    torch.manual_seed(0)
    text = {
        "model_type": "llama",
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, image_seq_length=4
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.fixture
def call():
    torch._dynamo.reset()
    ids = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(1))
    ids[:, 2:6] = IMAGE
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "pixel_values": pixels, "use_cache": False}


def test_towers_are_found_refused_and_left_alone(call):
    found = {s.weight: s for s in ttt.find_sites(llava(), **call)}
    tower = [s for name, s in found.items() if "vision_tower" in name]
    assert {s.kind for s in tower} == {"other"}
    assert all("not one row of features per token" in s.problem for s in tower)
    model = ttt.convert(llava(), CONFIG, example_inputs=((), call))
    added = {n for n, _ in model.named_parameters() if "ttt_conv" in n}
    assert added == {f"model.language_model.layers.{i}.mlp.down_proj.ttt_conv" for i in range(2)}
    models.randomize(model)
    model.compile(backend="inplace_ttt_eager")
    with torch.no_grad():
        truth = oracle_call(model, kwargs=call).logits
        torch.testing.assert_close(model(**call).logits, truth, rtol=1e-4, atol=1e-4)
        with ttt.disabled(model):
            assert (model(**call).logits - truth).abs().max() > 0.05


def test_text_alone_is_enough_to_convert():
    model = ttt.convert(llava(), CONFIG)
    assert sum("ttt_conv" in n for n, _ in model.named_parameters()) == 2
