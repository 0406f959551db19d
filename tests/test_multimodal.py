"""Models that see more than text: only the MLPs of the tokens learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import ttt_compiler as ttt
from tests import models, unusual
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


class Listening(nn.Module):
    """A decoder that attends to a recording: an encoder with MLPs of its own, and cross-attention."""

    def __init__(self):
        super().__init__()
        d = unusual.D
        self.listen = nn.Conv1d(4, d, 3, padding=1)
        self.encoder, self.decoder = (unusual.Stack(unusual.MLP(), unusual.MLP()) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x, sound):
        heard = self.encoder(self.listen(sound).transpose(1, 2))
        q, k, v = (y[:, None] for y in (self.q(x), self.k(heard), self.v(heard)))
        return self.decoder(x + self.o(F.scaled_dot_product_attention(q, k, v)[:, 0]))


@pytest.mark.parametrize("frames", [7, 11], ids=["fewer frames than tokens", "as many"])
def test_an_audio_encoder_and_cross_attention_are_left_alone(frames):
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, sound = unusual.inputs(), torch.randn(2, 4, frames)
    found = {s.weight: s.kind for s in ttt.find_sites(Listening(), x, sound)}
    assert found == {
        f"{part}.mlps.{i}.down.weight": kind
        for part, kind in (("encoder", "other"), ("decoder", "dense"))
        for i in range(2)
    }
    model = ttt.convert(Listening(), CONFIG, example_inputs=((x, sound), {}))
    assert {n for n, _ in model.named_parameters() if "ttt_conv" in n} == {
        f"decoder.mlps.{i}.down.ttt_conv" for i in range(2)
    }
    models.randomize(model)
    model.compile(backend="inplace_ttt_eager")
    with torch.no_grad():
        torch.testing.assert_close(model(x, sound), oracle_call(model, x, sound), rtol=1e-4, atol=1e-4)
