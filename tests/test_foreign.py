"""Models that other libraries have changed: quantised by torchao, adapted by PEFT."""

from __future__ import annotations

import pytest
import torch

import ttt_compiler as ttt
from tests import models
from ttt_compiler.architectures.oracle import oracle_call
from ttt_compiler.errors import UnsupportedModelError
from ttt_compiler.runtime.root import require_root

CONFIG = ttt.TTTConfig(layers="all", chunk_size=4, lr=1.0)


def quantised(kind):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = {
        "int8": lambda: Int8WeightOnlyConfig(),
        "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
    }[kind]()
    model = models.tiny()
    quantize_(model, config)
    return model


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_base_stays_quantised_and_fast_weights_are_a_delta(kind):
    tokens = models.ids(2, 13)
    model = quantised(kind)
    with torch.no_grad():
        base = torch.compile(model, backend="eager")(tokens, use_cache=False).logits
        ttt.convert(model, CONFIG)
        assert len(require_root(model)[1].specs) == 2
        model.compile(backend="inplace_ttt_eager")
        assert torch.equal(model(tokens, use_cache=False).logits, base)
        models.randomize(model)
        fast = model(tokens, use_cache=False).logits
        truth = dequantised_twin(model)(tokens)
        torch.testing.assert_close(fast, truth, rtol=1e-3, atol=1e-3)
        assert (fast - base).abs().max() > 0.02
        session = ttt.Session(model, 2)
        parts = [model(p, past_key_values=session.cache).logits for p in tokens.split([3, 6, 1, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), fast, rtol=1e-4, atol=1e-4)
    down = model.model.layers[0].mlp.down_proj
    assert type(down.weight.data) is not torch.Tensor, "the base was dequantised for good"
    with pytest.raises(UnsupportedModelError, match="cannot be read from outside"):
        session.drift()


def dequantised_twin(model):
    """A plain model with the same numbers in its weights and the same adapter."""
    state = {
        k: v.dequantize() if type(v.data) is not torch.Tensor else v for k, v in model.state_dict().items()
    }
    twin = ttt.convert(models.tiny(), CONFIG)
    twin.load_state_dict(state)
    return lambda tokens: oracle_call(twin, tokens, kwargs={"use_cache": False}).logits


def test_lora_beside_a_fast_weight():
    from peft import LoraConfig, get_peft_model

    tokens = models.ids(2, 13)
    config = LoraConfig(r=4, target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(models.tiny(), config).eval()
    with torch.no_grad():
        base = torch.compile(model, backend="eager")(tokens, use_cache=False).logits
        ttt.convert(model, CONFIG)
        keys = [s.key for s in require_root(model)[1].specs]
        assert keys == [
            f"base_model.model.model.layers.{i}.mlp.down_proj.base_layer.weight" for i in range(2)
        ]
        model.compile(backend="inplace_ttt_eager")
        assert torch.equal(model(tokens, use_cache=False).logits, base)
        models.randomize(model)
        fast = model(tokens, use_cache=False).logits
        truth = oracle_call(model, tokens, kwargs={"use_cache": False}).logits
    torch.testing.assert_close(fast, truth, rtol=1e-4, atol=1e-4)
    assert (fast - base).abs().max() > 0.02
