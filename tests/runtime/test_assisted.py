"""Assisted decoding takes tokens back, across chunk borders too, and gives greedy's tokens all the same."""

from __future__ import annotations

import pytest
import torch

import ttt_compiler as ttt
from tests import models
from tests.runtime.generation import LENGTHS, NEW, fast, run
from tests.runtime.test_generation_modes import EVERYWHERE, STATIC_CROPS
from tests.tolerances import SEGMENTATION, relative_error
from ttt_compiler.errors import CacheError
from ttt_compiler.runtime.state import FastWeightState

ASSISTED = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prompt lookup, longer than chunks": {"prompt_lookup_num_tokens": 10},
    "prompt lookup, longer than what is kept at first": {"prompt_lookup_num_tokens": 40},
    "draft model": {"assistant_model": "base"},
    "draft model with fast weights": {"assistant_model": "fast"},
    "drafts that grow": {"assistant_model": "same", "schedule": "heuristic"},
}
if STATIC_CROPS:
    static = {"cache_implementation": "static", "max_cache_len": 64}
    ASSISTED["prompt lookup, static"] = {"prompt_lookup_num_tokens": 3} | static
    ASSISTED["draft model, compiled by generate"] = {
        "assistant_model": "base",
        "compile_config": EVERYWHERE,
    } | static


def draft():
    """A model with fast weights that is wrong at times."""
    model = fast()
    with torch.no_grad():
        model.lm_head.weight += 0.02 * torch.randn(model.lm_head.weight.shape)
    return model


def assisted(model, tokens, mode, **more):
    """:func:`run` with a draft model made from its name, and 5 tokens a draft."""
    mode = dict(mode)
    made = {"base": models.tiny, "same": lambda: model, "fast": draft}
    drafts = made[mode.pop("assistant_model")]() if "assistant_model" in mode else None
    config = (model if drafts is None else drafts).generation_config
    config.num_assistant_tokens = 5
    config.num_assistant_tokens_schedule = mode.pop("schedule", "constant")
    return run(model, tokens, assistant_model=drafts, **mode, **more)


def repeating(length):
    """A prompt that leads a look-up on, and wrong."""
    return torch.cat([models.ids(1, (length + 1) // 2)] * 2, 1)[:, :length]


@pytest.fixture
def crops(monkeypatch):
    """Per rollback, whether it reached into a complete chunk. None may exceed what is kept."""
    crossed = []
    original = FastWeightState.crop

    def crop(self, tokens):
        end = self.tokens_seen[0]
        crossed.append((end - tokens) // 4 < end // 4)
        assert tokens <= self.revocable < 128
        original(self, tokens)

    monkeypatch.setattr(FastWeightState, "crop", crop)
    return crossed


@pytest.mark.parametrize("mode", ASSISTED)
def test_assisted_decoding_is_greedy(model, truth, crops, mode):
    for length in LENGTHS if mode == "prompt lookup" else [11]:
        tokens = repeating(length)
        out = assisted(model, tokens, ASSISTED[mode])
        assert torch.equal(out, run(truth, tokens, use_cache=False)), length
    assert any(crops) or mode == "drafts that grow"


@pytest.mark.parametrize("mode", [m for m in ASSISTED if ASSISTED[m].get("assistant_model") != "fast"])
def test_assisted_decoding_of_the_base_model_is_greedy(base, mode):
    """The test above means something."""
    tokens = repeating(11)
    assert torch.equal(assisted(base, tokens, ASSISTED[mode]), run(base, tokens))


def test_early_exit_is_refused(model):
    with pytest.raises(CacheError, match="prompt_lookup_num_tokens"):
        model.generate(models.ids(1, 11), max_new_tokens=4, assistant_early_exit=1)


def test_assisted_sampling_follows_the_fast_weights(model, truth):
    out = run(
        model,
        models.ids(1, 11),
        do_sample=True,
        prompt_lookup_num_tokens=3,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = truth(out.sequences[:, :-1]).logits[:, 10:]
    assert relative_error(torch.stack(out.logits, 1), expected) < SEGMENTATION


def test_a_session_continues_after_assisted_decoding(model, greedy):
    session = ttt.Session(model)
    tokens, lookup = models.ids(1, 11), {"prompt_lookup_num_tokens": 2}
    first = run(model, tokens, past_key_values=session.cache, max_new_tokens=6, **lookup)
    kept = session.state.revocable
    assert 2 <= kept < 128
    with pytest.raises(CacheError, match="Continue this session with plain generate"):
        run(model, first, past_key_values=session.cache, **lookup)
    assert torch.equal(run(model, first, past_key_values=session.cache, max_new_tokens=NEW - 6), greedy(11))
    # Recording ended with assisted decoding: a long document does not become revocable as a whole.
    more = torch.cat([greedy(11), models.ids(1, 150)], 1)
    run(model, more, past_key_values=session.cache, max_new_tokens=1)
    assert session.state.revocable == kept


@pytest.mark.parametrize("how", ["session", "returned", "failed"])
def test_recording_ends_with_assisted_decoding(model, how):
    """Plain calls after it keep no more than it kept, and their chunks are written."""
    session, lookup = ttt.Session(model), {"prompt_lookup_num_tokens": 3}
    cache, given = session.cache, {"past_key_values": session.cache}
    if how == "returned":
        given = {"return_dict_in_generate": True}
        cache = run(model, models.ids(1, 11), **given, **lookup).past_key_values
    elif how == "failed":
        run(model, models.ids(1, 11), **given)
        with pytest.raises(CacheError, match="Continue this session"):
            run(model, models.ids(1, 11), **given, **lookup)
    else:
        run(model, models.ids(1, 11), **given, **lookup)
    kept = cache.ttt.revocable
    for i in range(3):
        model(models.ids(1, 64, seed=i), past_key_values=cache)
    assert cache.ttt.revocable == kept
    seen, (written,) = cache.ttt.tokens_seen[0], cache.ttt.chunks_written.values()
    assert written == [(seen - kept) // 4]


def test_a_refused_call_is_not_counted(model):
    """A pool's tail does not grow: what is refused for it stays refused for what it says, no more."""
    pool = ttt.Pool(model, sequences=1, revocable=32)
    with pool.use("a") as session:
        session.cache.activate_past_recording()
        for _ in range(2):
            with pytest.raises(CacheError, match="64 tokens must stay revocable"):
                model(**session.inputs(models.ids(1, 40)))
        model(**session.inputs(models.ids(1, 30)))
        session.cache.crop(-30)
        assert session.tokens_seen == [0]


def test_plain_generation_keeps_nothing_revocable(model):
    session = ttt.Session(model)
    run(model, models.ids(1, 11), past_key_values=session.cache)
    assert session.state.revocable == 0
