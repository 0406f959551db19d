"""Tokens are chosen as ``generate`` chooses them with the same generation config."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

import ttt_compiler as ttt
from tests.serve.loopback import END, Server, turn, user, words
from ttt_compiler.errors import UnsupportedModelError
from ttt_compiler.serve.engine import Engine
from ttt_compiler.serve.sampling import REFUSED, Sampling

TEXT, TOKENS = "w1 w2 w3", 10


@pytest.fixture
def configured(model, monkeypatch):
    """Sets the model's generation config."""

    def set_to(**settings):
        monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=END, **settings))

    return set_to


def served(model, tokenizer, text=TEXT, engine=None, **asked):
    engine = engine or Engine(model, tokenizer)
    steps = engine.steps(engine.new_session(), turn(text), Sampling(seed=3, **asked), TOKENS)
    return list(steps)[-1].text


def generated(model, text=TEXT, **asked):
    prompt = torch.tensor([turn(text)])
    torch.manual_seed(3)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=ttt.Session(model).cache,
        max_new_tokens=TOKENS,
        pad_token_id=0,
        **asked,
    )
    return words([i for i in out[0, prompt.shape[1] :].tolist() if i != END])


SETTINGS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 0},
    "temperature": {"do_sample": True, "top_k": 0, "temperature": 0.3},
    "top_k": {"do_sample": True, "top_k": 2},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 0.2},
    "min_p": {"do_sample": True, "top_k": 0, "min_p": 0.9},
    "typical_p": {"do_sample": True, "top_k": 0, "typical_p": 0.2},
    "penalty": {"do_sample": True, "top_k": 0, "repetition_penalty": 50.0},
    "greedy penalty": {"do_sample": False, "repetition_penalty": 50.0},
    "ngrams": {"do_sample": False, "no_repeat_ngram_size": 1},
    "bad words": {"do_sample": False, "bad_words_ids": [[i] for i in range(40, 96)]},
    "suppress": {"do_sample": False, "suppress_tokens": list(range(50))},
    "begin": {"do_sample": False, "begin_suppress_tokens": list(range(6, 96))},
    "bias": {"do_sample": False, "sequence_bias": [[[9], 100.0]]},
    "forced end": {"do_sample": False, "forced_eos_token_id": END},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_generation_config_is_honoured(model, tokenizer, configured, settings):
    configured(do_sample=settings["do_sample"], top_k=0)
    plain = served(model, tokenizer)
    configured(**settings)
    assert served(model, tokenizer) == generated(model)
    if len(settings.keys() - {"do_sample", "top_k"}) or settings.get("top_k"):
        assert served(model, tokenizer) != plain, "the setting shows"


def test_a_request_comes_first(model, tokenizer, configured):
    configured(do_sample=False)
    greedy = served(model, tokenizer)
    warm = generated(model, do_sample=True, top_k=0)
    assert served(model, tokenizer, temperature=1.0) == warm != greedy
    assert (
        served(model, tokenizer, top_p=0.5) == generated(model, do_sample=True, top_k=0, top_p=0.5) != greedy
    )
    assert served(model, tokenizer, temperature=0, top_p=0.5) == greedy
    configured(do_sample=True, temperature=2.0, top_k=0, top_p=0.3)
    assert served(model, tokenizer, temperature=0) == greedy
    assert served(model, tokenizer, temperature=1.0, top_p=1.0) == warm
    configured()
    assert served(model, tokenizer) == warm, "OpenAI's default"


def test_requests_change_nothing_for_others(model, tokenizer, configured):
    configured(do_sample=True, temperature=0.5, repetition_penalty=2.0)
    engine = Engine(model, tokenizer)
    first = served(model, tokenizer, engine=engine)
    served(model, tokenizer, engine=engine, temperature=2.0, top_p=0.1)
    assert served(model, tokenizer, engine=engine) == first
    assert model.generation_config.temperature == 0.5


def test_penalties_are_over_all_that_was_read(model, tokenizer, configured):
    configured(do_sample=False, no_repeat_ngram_size=1)
    with Server(model, tokenizer) as server:
        said = [server.say(user(text), session="s", temperature=None) for text in ("w1 w2", "w3")]
        (info,) = [server.get("/sessions/s")]
    tokens = " ".join(said).split()
    assert len(set(tokens)) == len(tokens) > 10
    assert not {"w1", "w2", "w3"} & set(tokens)
    assert info["tokens_seen"]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"guidance_scale": 2.0},
        {"stop_strings": ["x"]},
        {"penalty_alpha": 0.5},
        {"encoder_repetition_penalty": 2.0},
        {"max_time": 1.0},
    ],
    ids=str,
)
def test_what_would_be_ignored_is_refused(model, tokenizer, configured, settings):
    configured(**settings)
    with pytest.raises(UnsupportedModelError, match=f"{next(iter(settings))}=.*generation_config.json"):
        Engine(model, tokenizer)


def test_what_is_wrong_is_refused_at_the_start(model, tokenizer, configured):
    configured()
    model.generation_config.min_p = 5.0
    with pytest.raises(UnsupportedModelError, match="min_p"):
        Engine(model, tokenizer)


def test_defaults_of_transformers_are_not_refused():
    config, filled = GenerationConfig(), GenerationConfig()
    filled.update(**GenerationConfig._get_default_generation_params())
    for name, nothing in REFUSED.items():
        assert getattr(config, name, None) in nothing
        assert getattr(filled, name, None) in nothing
