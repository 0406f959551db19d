"""Generation on fast weights: right for every row, by both ways of compiling, without recompiling."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import ttt_compiler as ttt
from tests import models
from tests.tolerances import SEGMENTATION, relative_error
from ttt_compiler.errors import CacheError, CropError, PositionError

GREEDY = {"do_sample": False, "use_cache": True}


@pytest.fixture(scope="module")
def model():
    model = models.converted()
    model.compile(backend="inplace_ttt", fullgraph=True)
    return model


def greedy(model, tokens, steps, **kwargs):
    """Greedy continuation by whole forwards of the oracle: no cache, no state."""
    for _ in range(steps):
        logits = models.oracle(model, tokens, **kwargs)[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens


def test_greedy_is_the_oracles_and_not_the_base_models(model):
    tokens = models.ids(2, 11)
    out = model.generate(tokens, max_new_tokens=12, **GREEDY)
    assert torch.equal(out, greedy(model, tokens, 12))
    base = models.tiny().generate(tokens, max_new_tokens=12, **GREEDY)
    assert not torch.equal(out, base), "the adapter is too weak for this test to mean anything"


def test_left_padded_rows_continue_as_if_alone(model):
    lengths = (9, 4, 13)
    prompts = [models.ids(1, n, seed=n) for n in lengths]
    width = max(lengths)
    tokens = torch.zeros(3, width, dtype=torch.int64)
    mask = torch.zeros(3, width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, width - prompt.shape[1] :] = prompt
        mask[row, width - prompt.shape[1] :] = 1
    out = model.generate(tokens, attention_mask=mask, max_new_tokens=9, **GREEDY)
    for row, prompt in enumerate(prompts):
        assert torch.equal(out[row, width:], greedy(model, prompt, 9)[0, prompt.shape[1] :]), row


def test_sampling_is_reproducible(model):
    tokens = models.ids(2, 6)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(
            model.generate(tokens, max_new_tokens=8, do_sample=True, top_k=20, num_return_sequences=2)
        )
    assert runs[0].shape == (4, 14)
    assert torch.equal(*runs)
    assert not torch.equal(runs[0][0], runs[0][1])


def test_sampled_rows_follow_the_fast_weights(model):
    torch.manual_seed(5)
    tokens = models.ids(2, 6)
    out = model.generate(
        tokens,
        max_new_tokens=8,
        do_sample=True,
        num_return_sequences=2,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits, 1)
    expected = models.oracle(model, out.sequences[:, :-1])[:, 5:]
    assert relative_error(logits, expected) < SEGMENTATION


def test_beams_reorder_fast_weights(model):
    tokens = models.ids(1, 7)
    out = model.generate(
        tokens, max_new_tokens=9, num_beams=3, output_scores=True, return_dict_in_generate=True
    )
    logits = models.oracle(model, out.sequences[:, :-1]).log_softmax(-1)
    score = logits.gather(-1, out.sequences[:, 1:, None])[0, 6:, 0].sum() / 9
    assert abs(float(score - out.sequences_scores[0])) < 1e-4


def test_torch_compile_generates_on_fast_weights_too(compiles):
    """Plain torch runs the original, uncompiled module here, in silence."""
    base = models.tiny()
    compiled = torch.compile(
        base, backend="inplace_ttt", options={"layers": "all", "chunk_size": 4, "lr": 1.0}
    )
    tokens = models.ids(2, 11)
    first = compiled.generate(tokens, max_new_tokens=4, **GREEDY)
    assert compiles.count > 0
    assert torch.equal(first, models.tiny().generate(tokens, max_new_tokens=4, **GREEDY))
    models.randomize(base)
    out = compiled.generate(tokens, max_new_tokens=12, **GREEDY)
    assert torch.equal(out, greedy(base, tokens, 12))


@pytest.mark.slow
def test_no_recompile_after_warm_up(compiles):
    """Law 11: chunk borders, new sequences and new lengths compile nothing once shapes are known to vary."""
    model = models.converted(chunk_size=16)
    model.compile(backend="inplace_ttt", fullgraph=True)
    counts = []
    for length in (9, 10, 11):
        model.generate(models.ids(2, length, seed=length), max_new_tokens=200, min_new_tokens=200, **GREEDY)
        counts.append(compiles.count)
    assert counts[0] <= 3, "prefill, first step, steps of growing length"
    # The prompt length becomes dynamic, and Inductor lays out the keys that leave that graph otherwise.
    assert counts[1] - counts[0] <= 2
    assert counts[2] == counts[1]


def test_a_document_in_slices_compiles_nothing_again():
    model = models.converted(chunk_size=16)
    model.compile(backend="inplace_ttt_eager", fullgraph=True, dynamic=True)
    tokens = models.ids(2, 60)
    session = ttt.Session(model, batch_size=2)
    with torch._dynamo.config.patch(recompile_limit=2):
        out = [model(tokens[:, i : i + 5], past_key_values=session.cache).logits for i in range(0, 60, 5)]
    assert relative_error(torch.cat(out, 1), models.oracle(model, tokens)) < SEGMENTATION


@pytest.mark.parametrize("split", [[11, 1, 1, 1, 1, 8], [4, 4, 4, 4, 7], [1] * 23, [3, 16, 4]], ids=str)
def test_prefill_chunked_prefill_and_decode_agree(model, split):
    """Law 2, chunk borders anywhere."""
    tokens = models.ids(3, 23)
    cache, out, start = DynamicCache(config=model.config), [], 0
    for size in split:
        out.append(model(tokens[:, start : start + size], past_key_values=cache).logits)
        start += size
    assert relative_error(torch.cat(out, 1), models.oracle(model, tokens)) < SEGMENTATION
    assert cache.ttt.tokens_seen == [23] * 3
    assert set(map(tuple, cache.ttt.chunks_written.values())) == {(5, 5, 5)}


def test_a_stateful_call_records_no_graph(model):
    out = model(models.ids(1, 5), use_cache=True)
    assert torch.is_grad_enabled()
    assert not out.logits.requires_grad
    assert out.past_key_values.ttt.tokens_seen == [5]
    assert model(models.ids(1, 5), use_cache=False).logits.requires_grad


class TestRefusals:
    def test_a_cache_made_before_conversion(self, model):
        base = models.tiny()
        cache = base(models.ids(1, 5), use_cache=True).past_key_values
        with pytest.raises(CacheError, match="holds 5 tokens but no fast weights"):
            model(models.ids(1, 1), past_key_values=cache)

    def test_a_cache_with_fast_weights_inside_of_disabled(self, model):
        session = ttt.Session(model)
        with ttt.disabled(model), pytest.raises(CacheError, match="DynamicCache"):
            model(models.ids(1, 5), past_key_values=session.cache)
        assert session.cache.get_seq_length() == 0

    def test_a_cache_of_another_configuration(self, model):
        other = ttt.Session(models.converted(chunk_size=8)).cache
        with pytest.raises(CacheError, match="another model or configuration"):
            model(models.ids(1, 5), past_key_values=other)

    def test_a_cache_of_another_batch_size(self, model):
        with pytest.raises(CacheError, match="2 sequences, but the call has 3"):
            model(models.ids(3, 5), past_key_values=ttt.Session(model, 2).cache)

    def test_rollback_is_exact_inside_of_the_tail_and_refused_beyond(self, model):
        tokens = models.ids(1, 12)
        session = ttt.Session(model)
        model(tokens[:, :7], past_key_values=session.cache)
        session.cache.crop(-2)
        out = model(tokens[:, 5:], past_key_values=session.cache).logits
        assert relative_error(out, models.oracle(model, tokens)[:, 5:]) < SEGMENTATION
        assert session.tokens_seen == [12]
        with pytest.raises(CropError, match="only 0 stand after"):
            session.cache.crop(-1)
        assert session.cache.get_seq_length() == 12, "a refused rollback changes nothing"

    def test_rollback_does_not_take_padding_for_tokens(self, model):
        """A crop counts places of the cache; the second row's last ones are padding."""
        session = ttt.Session(model, 2, revocable=8)
        tokens = models.ids(2, 17)
        model(tokens[:, :10], past_key_values=session.cache)
        mask = torch.ones(2, 13, dtype=torch.int64)
        mask[1, 11:] = 0
        pos = torch.tensor([[10, 11, 12], [10, 0, 0]])
        model(tokens[:, 10:13], attention_mask=mask, position_ids=pos, past_key_values=session.cache)
        with pytest.raises(CropError, match="some of them are padding in a row"):
            session.cache.crop(-2)
        assert (session.tokens_seen, session.cache.get_seq_length()) == ([13, 11], 13)
        # What comes behind padding can be taken back, up to it.
        mask, pos = (
            torch.cat([mask, torch.ones(2, 4)], 1).long(),
            torch.arange(4) + torch.tensor([[13], [11]]),
        )
        given = {"attention_mask": mask, "position_ids": pos, "past_key_values": session.cache}
        model(models.ids(2, 4, seed=9), **given)
        with pytest.raises(CropError, match="some of them are padding in a row"):
            session.cache.crop(-5)
        session.cache.crop(-4)
        out = model(tokens[:, 13:], **given).logits
        assert relative_error(out[:1], models.oracle(model, tokens[:1])[:, 13:]) < SEGMENTATION
        second = torch.cat([tokens[1:, :11], tokens[1:, 13:]], 1)
        assert relative_error(out[1:], models.oracle(model, second)[:, 11:]) < SEGMENTATION

    def test_rollback_of_a_whole_document_does_not_bring_the_one_before_back(self, model):
        session = ttt.Session(model, revocable=4)
        tokens = models.ids(1, 12)
        model(tokens[:, :10], past_key_values=session.cache)
        model(tokens[:, 10:], past_key_values=session.cache, position_ids=torch.tensor([[0, 1]]))
        with pytest.raises(CropError, match="a document begins among them"):
            session.cache.crop(-2)
        assert (session.tokens_seen, session.cache.get_seq_length()) == ([2], 12)
        session.cache.crop(-1)
        assert session.tokens_seen == [1]

    def test_rollback_of_the_first_document(self, model):
        session = ttt.Session(model, revocable=4)
        tokens = models.ids(1, 9)
        model(models.ids(1, 3, seed=9), past_key_values=session.cache)
        session.cache.crop(-3)
        out = model(tokens, past_key_values=session.cache).logits
        assert relative_error(out, models.oracle(model, tokens)) < SEGMENTATION

    def test_positions_of_three_dimensions(self, model):
        with pytest.raises(PositionError, match="3 dimensions"):
            model(models.ids(1, 5), position_ids=torch.arange(5).expand(3, 1, 5), use_cache=False)
