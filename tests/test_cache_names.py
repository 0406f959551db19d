"""A call may name its cache as transformers does now or did before, and neither name is swallowed."""

from __future__ import annotations

import dataclasses
import inspect
import warnings

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    DynamicCache,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils.deprecation import deprecate_kwarg

import ttt_compiler as ttt
from tests import models
from tests.runtime.generation import compiled, fast, run
from tests.tolerances import SEGMENTATION, relative_error
from ttt_compiler.architectures.tiny import build
from ttt_compiler.compat import cache_names
from ttt_compiler.compat.cache_names import NEW, OLD, installed_name, own_name, under
from ttt_compiler.errors import CacheError
from ttt_compiler.runtime.root import require_root

NAMES = (OLD, NEW)
BEFORE = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24)


@pytest.fixture(scope="module")
def model():
    return fast()


def test_what_the_installed_version_calls_it():
    assert installed_name() == (OLD if BEFORE else NEW)
    assert [f.name for f in dataclasses.fields(GenerateDecoderOnlyOutput)][-1] == installed_name()
    for kind in (LlamaForCausalLM, GPT2LMHeadModel):
        assert own_name(kind.forward) == installed_name()
        assert installed_name() in inspect.signature(kind.forward).parameters
    assert own_name(MambaForCausalLM.forward) == ("cache_params" if BEFORE else NEW)
    assert RwkvForCausalLM._supports_default_dynamic_cache() is False
    assert LlamaForCausalLM._supports_default_dynamic_cache() is True


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_goes_on_under_either_name(model, name):
    tokens, session = models.ids(1, 11), ttt.Session(model)
    with warnings.catch_warnings():
        # What the user is told to rename is renamed already.
        warnings.simplefilter("error", FutureWarning)
        parts = [model(part, **{name: session.cache}).logits for part in tokens.split([6, 5], 1)]
    assert session.tokens_seen == [session.cache.get_seq_length()] == [11]
    assert relative_error(torch.cat(parts, 1), models.oracle(model, tokens)) < SEGMENTATION


@pytest.mark.parametrize("name", NAMES)
def test_generate_goes_on_under_either_name(model, name):
    tokens, session = models.ids(1, 7), ttt.Session(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        first = run(model, tokens, **{name: session.cache}, max_new_tokens=6)
        second = run(model, first, **{name: session.cache}, max_new_tokens=4)
    assert torch.equal(second, run(model, tokens, max_new_tokens=10))
    assert session.tokens_seen == [16]


@pytest.mark.parametrize("name", NAMES)
def test_the_base_model_reads_the_cache_that_it_is_given(model, name):
    cache, tokens = DynamicCache(), models.ids(1, 11)
    with torch.no_grad(), ttt.disabled(model):
        parts = [model(part, **{name: cache}).logits for part in tokens.split([6, 5], 1)]
        assert relative_error(torch.cat(parts, 1), model(tokens).logits) < SEGMENTATION
    assert cache.get_seq_length() == 11


def test_two_caches_are_one_too_many(model):
    one, other = ttt.Session(model).cache, ttt.Session(model).cache
    with pytest.raises(CacheError, match="two caches in one call"):
        model(models.ids(1, 5), **{OLD: one, NEW: other})
    model(models.ids(1, 5), **{OLD: one, NEW: one})
    model(models.ids(1, 5), **{OLD: None, NEW: one})
    assert one.ttt.tokens_seen == [10]


@pytest.mark.parametrize("value", [(), {"layers": []}], ids=["tuple", "dict"])
def test_what_is_no_cache_is_refused(model, value):
    for name in (OLD, installed_name()):
        with pytest.raises(CacheError, match="cannot carry fast weights"):
            model(models.ids(1, 5), **{name: value})


def test_a_model_that_takes_no_cache_refuses_one():
    """It swallowed it: a session that was read in pieces was wrong, and nobody said so."""
    model = models.randomize(ttt.convert(build("openai-gpt"), ttt.TTTConfig(layers="all", chunk_size=4)))
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    ids = models.ids(1, 9)
    for name in (OLD, NEW):
        with pytest.raises(CacheError, match="takes no cache"):
            model(ids, **{name: ttt.Session(model).cache})
    whole = model(ids).logits
    assert torch.equal(model.generate(ids, max_new_tokens=1, do_sample=False)[:, -1], whole[:, -1].argmax(-1))


def test_a_model_that_would_swallow_it_refuses_it():
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 80}
    config = RwkvConfig(vocab_size=models.VOCAB, num_hidden_layers=2, context_length=64, **sizes)
    model = RwkvForCausalLM(config).eval()
    compiled(ttt.convert(model, ttt.TTTConfig(layers="all", chunk_size=4)))
    for name in NAMES:
        with pytest.raises(CacheError, match="'state', which cannot carry"):
            model(models.ids(1, 5), **{name: ttt.Session(model).cache})


def test_code_from_the_hub_keeps_the_older_name():
    name = installed_name()

    class FromTheHub(LlamaForCausalLM):
        def forward(self, input_ids=None, past_key_values=None, **kwargs):
            return super().forward(input_ids=input_ids, **{name: past_key_values}, **kwargs)

    like = models.tiny(layers=1)
    config = ttt.TTTConfig(layers="all", chunk_size=4, lr=1.0)
    model = compiled(models.randomize(ttt.convert(FromTheHub(like.config).eval(), config), 0.6))
    assert require_root(model)[1].cache_name == OLD
    tokens, session = models.ids(1, 7), ttt.Session(model)
    out = run(model, tokens, cache=session.cache, max_new_tokens=6)
    assert session.tokens_seen == [12]
    logits = models.oracle(model, out[:, :-1])
    assert torch.equal(logits[:, 6:].argmax(-1), out[:, 7:])


def test_other_words_keep_their_meaning():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x, cache=None):
            x = x + self.down(torch.relu(self.up(x)))
            return x if cache is None else x + cache["shift"]

    x, config = torch.randn(2, 9, 8), ttt.TTTConfig(layers="all", chunk_size=4)
    model = compiled(ttt.convert(Own(), config, example_inputs=((x,), {})))
    shifted = model(x, cache={"shift": torch.ones(())})
    torch.testing.assert_close(shifted, model(x) + 1)
    assert under(OLD, {"cache": {"shift": 1}}) == {"cache": {"shift": 1}}


def test_graph_breaks_below_renaming_wrappers_spend_no_common_budget():
    """One code object is around the forwards of all classes, and they are more than Dynamo's limit."""

    def layer():
        class Layer(nn.Module):
            @deprecate_kwarg("old", "99.0.0", new_name="new")
            def forward(self, x, new=None):
                x = x + 1
                torch._dynamo.graph_break()
                return x * 2

        return Layer()

    layers = nn.ModuleList([layer() for _ in range(12)])
    assert len({type(m).forward.__code__ for m in layers}) == 1

    def whole(x):
        for m in layers:
            x = m(x)
        return x

    cache_names.see_through_renames()
    x = torch.ones(3)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert torch.equal(torch.compile(whole, backend="eager")(x), whole(x))
