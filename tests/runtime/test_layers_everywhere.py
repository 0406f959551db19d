"""The caches of every causal language model of transformers go on bit for bit, stored or forked."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import StaticCache

from tests.tolerances import relative_error
from ttt_compiler.architectures import UnbuildableError, build, causal_lm_types, token_inputs
from ttt_compiler.compat.cache_names import own_name
from ttt_compiler.compat.looped_layers import complete
from ttt_compiler.conversion import cache_factory
from ttt_compiler.errors import SnapshotError
from ttt_compiler.runtime.layers import check_layers, export_layers, fill_layers, fork_cache, layer_bytes

ROWS, ROOM = 2, 24
CUTS = (9, 10, 13, 14)
# Models that cannot go on themselves, whatever is done to the cache.
BROKEN = {
    "blt": "its configuration names no layers",
    "cpmant": "it takes no second call of several tokens",
    "minimax": "it takes a cache of its own kind only",
    "openai-gpt": "it uses no cache",
    "prophetnet": "it takes no second call of several tokens",
    "recurrent_gemma": "it keeps its states in its modules, not in the cache",
    "reformer": "it takes a cache of its own kind only",
    "rwkv": "it takes its states by themselves",
    "xlm": "it uses no cache of transformers",
    "xlnet": "it uses no cache of transformers",
    "xlstm": "it takes a cache of its own kind only",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def goes_on(model, make, ids):
    """Run, store, restore, fork, go on with all three. What makes the model itself fail is a skip."""
    cache = make()
    first, *cuts = CUTS
    name = own_name(model.forward)

    def read(tokens, cache):
        with torch.no_grad():
            return model(input_ids=tokens, use_cache=True, **{name: cache}).logits

    read(ids[:, :first], cache)
    tensors, description = export_layers(cache)
    tensors = {k: v.clone() for k, v in tensors.items()}
    later, fork = make(), fork_cache(cache)
    description = json.loads(json.dumps(description))
    check_layers(description, tensors, later, ROWS, "x.ttt")
    with pytest.raises(SnapshotError):
        check_layers(description, tensors, later, ROWS + 1, "x.ttt")
    fill_layers(later, description, tensors)
    assert layer_bytes(later) == layer_bytes(cache) > 0
    for a, b in zip((first, *cuts), cuts, strict=False):
        want = read(ids[:, a:b], cache)
        for one in (later, fork):
            assert torch.equal(read(ids[:, a:b], one), want)


def tiny(model_type):
    try:
        return build(model_type)
    except UnbuildableError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("model_type", [t for t in causal_lm_types() if t not in BROKEN])
def test_dynamic(model_type):
    model = tiny(model_type)
    make = cache_factory(model)
    if make is None:
        pytest.skip("it has no cache")
    goes_on(model, make, token_inputs(model, ROWS, CUTS[-1])["input_ids"])


STATIC = (
    "llama",
    "qwen3",
    "gpt2",
    "gemma2",
    "gemma3_text",
    "mistral",
    "qwen3_next",
    "falcon_h1",
    "deepseek_v3",
    "dory",
)


@pytest.mark.parametrize("model_type", [t for t in STATIC if t in causal_lm_types()])
def test_static(model_type):
    model = tiny(model_type)
    config = model.config.get_text_config(decoder=True)
    ids = token_inputs(model, ROWS, CUTS[-1])["input_ids"]
    goes_on(model, lambda: complete(StaticCache(config=config, max_cache_len=ROOM), config), ids)


def test_why_recurrent_gemma_cannot():
    """When this fails, transformers keeps its states in the cache, and it leaves the list above."""
    model = tiny("recurrent_gemma")
    ids = token_inputs(model, ROWS, 10)["input_ids"]
    make = cache_factory(model)
    with torch.no_grad():
        caches = [make(), make()]
        for cache in caches:
            model(input_ids=ids[:, :9], past_key_values=cache, use_cache=True)
        out = [model(input_ids=ids[:, 9:], past_key_values=c, use_cache=True).logits for c in caches]
    assert relative_error(out[1], out[0]) > 1e-4
