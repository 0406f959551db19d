"""Every mode and every cache of ``generate``: the tokens of the oracle, or a refusal that says what to type.

The oracle is ``Truth``: the same ``generate`` over a model that reads every sequence alone and whole by the
reference, without any cache. What transformers itself cannot do keeps transformers' own error. Assisted
decoding has a file of its own.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    Lfm2Config,
    Lfm2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    StaticCache,
    TextIteratorStreamer,
)
from transformers.cache_utils import LinearAttentionAndStaticFullAttentionLayer, StaticLayer

import ttt_compiler as ttt
from tests import models
from tests.runtime.generation import LENGTHS, NEW, compiled, fast, run
from tests.tolerances import SEGMENTATION, relative_error
from ttt_compiler.compat.cache_names import installed_name
from ttt_compiler.errors import CacheError, CropError
from ttt_compiler.runtime.cache import attach_state

# Since transformers 5.24.
STATIC_CROPS = hasattr(StaticLayer, "crop")
EVERYWHERE = CompileConfig()
EVERYWHERE._compile_all_devices = True


def padded(*lengths):
    prompts = [models.ids(1, n, seed=n) for n in lengths]
    tokens, mask = torch.zeros(2, len(lengths), max(lengths), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, -prompt.shape[1] :] = prompt
        mask[row, -prompt.shape[1] :] = 1
    return tokens, mask


def test_the_oracle_is_not_the_base_model(base, greedy):
    for length in LENGTHS:
        assert not torch.equal(run(base, models.ids(1, length)), greedy(length))


CACHES = {
    "dynamic": {},
    "prefill beside chunk borders": {"prefill_chunk_size": 3},
    "prefill on chunk borders": {"prefill_chunk_size": 4},
    "static": {"cache_implementation": "static"},
    "static, larger": {"cache_implementation": "static", "max_cache_len": 64},
    "static, chunked prefill": {"cache_implementation": "static", "prefill_chunk_size": 3},
    "static, compiled by generate": {"cache_implementation": "static", "compile_config": EVERYWHERE},
    "static, not compiled by generate": {"cache_implementation": "static", "disable_compile": True},
    "quantized": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
}


@pytest.mark.parametrize("mode", CACHES)
def test_caches(model, greedy, mode):
    for length in LENGTHS:
        assert torch.equal(run(model, models.ids(1, length), **CACHES[mode]), greedy(length)), length


def test_left_padded_rows(model, truth):
    tokens, mask = padded(9, 4, 13)
    out = run(model, tokens, attention_mask=mask, **CACHES["static, chunked prefill"])
    assert torch.equal(out, run(truth, tokens, attention_mask=mask, use_cache=False))


SEARCHES = {
    "several samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 9},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling, static": {"num_beams": 3, "do_sample": True, "cache_implementation": "static"},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("mode", SEARCHES)
def test_searches(model, truth, base, mode):
    tokens = models.ids(2, 7)
    mode = SEARCHES[mode]
    out = run(model, tokens, **mode)
    mode = {k: v for k, v in mode.items() if k != "cache_implementation"}
    assert torch.equal(out, run(truth, tokens, use_cache=False, **mode))
    assert not torch.equal(out, run(base, tokens, **mode))


def test_without_a_cache(model, greedy):
    assert torch.equal(run(model, models.ids(1, 3), use_cache=False), greedy(3))


def test_from_embeddings(model, greedy):
    embeddings = model.get_input_embeddings()(models.ids(1, 11)).detach()
    out = model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, greedy(11)[:, 11:])


def test_raw_streamer(model, greedy):
    class Streamer:
        seen, ended = [], False

        def put(self, value):
            self.seen.append(value.reshape(-1))

        def end(self):
            self.ended = True

    streamer = Streamer()
    run(model, models.ids(1, 11), streamer=streamer)
    assert torch.equal(torch.cat(streamer.seen)[None], greedy(11))
    assert streamer.ended


def test_text_streamer_in_a_thread(model, greedy):
    class Tokenizer:
        def decode(self, tokens, **kwargs):
            return "".join(f"{t} " for t in tokens)

    streamer = TextIteratorStreamer(Tokenizer(), skip_prompt=True, timeout=60)
    thread = threading.Thread(target=run, args=(model, models.ids(1, 11)), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert [int(t) for t in text.split()] == greedy(11)[0, 11:].tolist()


def widest(model, input_ids, generation_config, step, **kwargs):
    """A decoding loop of a user's own: of the 3 likeliest tokens, the one that is surest of what follows."""
    cache = kwargs.get(installed_name())
    logits = step(input_ids, cache)
    while input_ids.shape[1] < generation_config.max_length:
        tokens = logits[0, -1].topk(3).indices[:, None]
        if cache is not None:
            cache.batch_repeat_interleave(3)
        logits = step(torch.cat([input_ids.expand(3, -1), tokens], 1), cache)
        best = logits[:, -1].amax(-1).argmax()[None]
        if cache is not None:
            cache.batch_select_indices(best)
        input_ids, logits = torch.cat([input_ids, tokens[best]], 1), logits[best]
    return input_ids


def test_a_custom_loop_that_repeats_and_selects_rows(model, truth):
    def through_cache(tokens, cache):
        return model(tokens[:, cache.get_seq_length() :], past_key_values=cache).logits

    def whole(tokens, cache):
        return truth(tokens).logits

    tokens = models.ids(1, 6)
    out = run(model, tokens, custom_generate=widest, step=through_cache)
    settings = type("", (), {"max_length": 6 + NEW})
    assert torch.equal(out, widest(truth, tokens, settings, whole))


class TestStaticCaches:
    def test_turns_reset_and_early_initialisation(self, model, greedy):
        cache = StaticCache(model.config, max_cache_len=64)
        cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
        for _ in range(2):
            first = run(model, models.ids(1, 11), past_key_values=cache, max_new_tokens=6)
            assert cache.ttt.tokens_seen == [16]
            second = run(model, first, past_key_values=cache, max_new_tokens=NEW - 6)
            assert torch.equal(second, greedy(11))
            cache.reset()
            assert cache.ttt.tokens_seen == [0]

    def test_nothing_is_compiled_again(self, model):
        def graphs():
            return torch._dynamo.utils.counters["stats"]["unique_graphs"]

        for _ in range(2):
            before = graphs()
            run(model, models.ids(1, 11), cache_implementation="static", max_cache_len=64)
        assert graphs() == before

    def test_tokens_without_fast_weights_are_counted_in_the_message(self, model, base):
        cache = StaticCache(model.config, max_cache_len=64)
        run(base, models.ids(1, 5), past_key_values=cache, max_new_tokens=2)
        with pytest.raises(CacheError, match="holds 6 tokens but no fast weights"):
            run(model, models.ids(1, 8), past_key_values=cache)

    @pytest.mark.skipif(not STATIC_CROPS, reason="this version's static layers cannot be cropped")
    def test_tokens_are_taken_back(self, model):
        tokens, cache = models.ids(1, 14), StaticCache(model.config, max_cache_len=64)
        parts = [model(tokens[:, :6], past_key_values=cache).logits]
        model(models.ids(1, 1, seed=9), past_key_values=cache)
        with pytest.raises(CropError, match="only 3 stand after the last written chunk"):
            cache.crop(-4)
        assert cache.ttt.tokens_seen == [int(cache.get_seq_length())] == [7]
        cache.crop(-1)
        assert cache.ttt.tokens_seen == [int(cache.get_seq_length())] == [6]
        parts.append(model(tokens[:, 6:], past_key_values=cache).logits)
        assert relative_error(torch.cat(parts, 1), models.oracle(model, tokens)) < SEGMENTATION

    @pytest.mark.skipif(STATIC_CROPS, reason="this version's static layers can be cropped")
    def test_tokens_cannot_be_taken_back(self, model):
        cache = StaticCache(model.config, max_cache_len=64)
        model(models.ids(1, 7), past_key_values=cache)
        with pytest.raises(CropError, match="StaticLayer cannot be cropped"):
            cache.crop(-1)
        assert cache.ttt.tokens_seen == [7]
        with pytest.raises(ValueError, match="not supported with Static"):
            run(model, models.ids(1, 11), prompt_lookup_num_tokens=3, cache_implementation="static")


def family(kind, config, **kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
    no_tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    plain = kind(config(vocab_size=models.VOCAB, **sizes, **heads, **no_tokens, **kwargs)).eval()
    model = ttt.convert(plain, ttt.TTTConfig(layers="all", chunk_size=4, lr=1.0))
    return compiled(models.randomize(model, 1.0))


@pytest.fixture(scope="module")
def hybrid():
    kinds = ["sliding_attention", "full_attention"]
    window = {"use_sliding_window": True, "sliding_window": 6}
    return family(Qwen2ForCausalLM, Qwen2Config, num_hidden_layers=2, layer_types=kinds, **window)


@pytest.fixture(scope="module")
def convolution():
    return family(Lfm2ForCausalLM, Lfm2Config, num_hidden_layers=2, layer_types=["conv", "full_attention"])


@pytest.mark.parametrize(("kind", "modes"), [("hybrid", ["dynamic", "static"]), ("convolution", ["dynamic"])])
def test_caches_of_several_kinds_of_layers(kind, modes, request):
    model = request.getfixturevalue(kind)
    expected = tokens = models.ids(1, 11)
    for _ in range(NEW):
        expected = torch.cat([expected, models.oracle(model, expected)[:, -1:].argmax(-1)], 1)
    for mode in modes:
        assert torch.equal(run(model, tokens, **CACHES[mode]), expected), mode
    base = ttt.revert(copy.deepcopy(model))
    assert not torch.equal(run(base, tokens), expected)


def test_a_sliding_window_takes_back_what_it_recorded_only(hybrid):
    tokens = models.ids(1, 14)
    session = ttt.Session(hybrid)
    first = hybrid(tokens[:, :7], past_key_values=session.cache).logits
    with pytest.raises(CropError, match="window of 6 tokens is full"):
        session.cache.crop(-1)
    assert session.tokens_seen == [7]
    session.cache.activate_past_recording()
    hybrid(tokens[:, 7:13], past_key_values=session.cache)
    session.cache.crop(-6)
    out = torch.cat([first, hybrid(tokens[:, 7:], past_key_values=session.cache).logits], 1)
    assert relative_error(out, models.oracle(hybrid, tokens)) < SEGMENTATION


def test_a_convolution_takes_back_what_it_recorded_only(convolution):
    tokens = models.ids(1, 14)
    session = ttt.Session(convolution)
    first = convolution(tokens[:, :7], past_key_values=session.cache).logits
    with pytest.raises(CropError, match="a convolution keeps its last tokens alone"):
        session.cache.crop(-1)
    assert session.tokens_seen == [7]
    session.cache.activate_past_recording()
    convolution(models.ids(1, 4, seed=9), past_key_values=session.cache)
    session.cache.crop(-4)
    out = torch.cat([first, convolution(tokens[:, 7:], past_key_values=session.cache).logits], 1)
    assert relative_error(out, models.oracle(convolution, tokens)) < SEGMENTATION


def test_static_keys_beside_a_convolution_are_not_left_behind(convolution):
    """When this fails, transformers crops both, and the rule in ``runtime/cache.py`` may go."""
    layer = LinearAttentionAndStaticFullAttentionLayer(max_cache_len=8)
    cache = DynamicCache()
    cache.layers = [layer]
    cache.activate_past_recording()
    layer.update_conv_state(torch.ones(1, 2, 4), conv_kernel_size=4)
    layer.update(*torch.ones(2, 1, 1, 4, 2))
    assert cache.is_croppable
    with pytest.raises(CropError, match="LinearAttentionAndStaticFullAttentionLayer cannot be cropped"):
        attach_state(cache, ttt.Session(convolution).state).crop(-1)
    layer.crop(-1)
    assert layer.conv_states[0].shape[-1] == 3
    assert int(layer.get_seq_length()) == 4


def test_encoder_decoder_caches_of_a_decoder():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 80}
    config = BartConfig(vocab_size=models.VOCAB, is_decoder=True, forced_eos_token_id=None, **sizes)
    plain = BartForCausalLM(config).eval()
    model = compiled(models.randomize(ttt.convert(plain, ttt.TTTConfig(layers="all", chunk_size=4, lr=1.0))))
    tokens = models.ids(1, 11)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    parts = [model(tokens[:, i:j], past_key_values=cache).logits for i, j in ((0, 6), (6, 11))]
    assert relative_error(torch.cat(parts, 1), models.oracle(model, tokens)) < SEGMENTATION
    cache.activate_past_recording()
    model(models.ids(1, 5, seed=7), past_key_values=cache)
    cache.crop(-5)
    again = model(tokens, past_key_values=cache).logits
    assert relative_error(again, models.oracle(model, tokens.repeat(1, 2))[:, 11:]) < SEGMENTATION


def test_models_that_keep_what_they_read_in_their_modules():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "lru_width": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "attention_window_size": 16}
    plain = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(vocab_size=models.VOCAB, **sizes, **heads)).eval()
    model = compiled(models.randomize(ttt.convert(plain, ttt.TTTConfig(layers="all", chunk_size=4, lr=1.0))))
    with pytest.raises(CacheError, match="recurrent_states, inside of its modules"):
        model.generate(models.ids(1, 5), max_new_tokens=3)


@pytest.mark.parametrize(
    "mode",
    [
        {"penalty_alpha": 0.5, "top_k": 4},
        {"dola_layers": "low"},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.1},
        {"num_beams": 4, "force_words_ids": [[5]]},
    ],
    ids=["contrastive", "dola", "diverse beams", "constrained beams"],
)
def test_modes_that_live_on_the_hub(model, mode):
    with pytest.raises(ValueError, match="trust_remote_code"):
        run(model, models.ids(1, 5), **mode)


def test_extra_prediction_layers_are_the_models_own(model):
    with pytest.raises(ValueError, match="num_mtp_layers"):
        run(model, models.ids(1, 5), use_mtp=True)


class TestRefusals:
    def test_continuous_batching(self, model):
        prompts = models.ids(2, 5)
        for start in (
            lambda: model.generate_batch(prompts.tolist(), max_new_tokens=3),
            lambda: run(model, prompts, cache_implementation="paged"),
            lambda: model.init_continuous_batching(),
            lambda: model.continuous_batching_context_manager().__enter__(),
        ):
            with pytest.raises(CacheError, match="left-padded batch"):
                start()
        with pytest.raises(CacheError, match="left-padded batch"):
            model(prompts, use_cache=False, read_index=[prompts[0]], write_index=[prompts[0]])

    def test_continuous_batching_of_the_base_model(self, model):
        with ttt.disabled(model):
            manager = model.init_continuous_batching()
        assert type(manager).__name__ == "ContinuousBatchingManager"
        manager.destroy()

    @pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
    def test_offloaded(self, model, kind):
        with pytest.raises(CacheError, match="this model runs there"):
            run(model, models.ids(1, 5), cache_implementation=kind)

    def test_models_that_keep_their_past_elsewhere(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 80}
        config = RwkvConfig(vocab_size=models.VOCAB, num_hidden_layers=2, context_length=64, **sizes)
        model = ttt.convert(RwkvForCausalLM(config).eval(), ttt.TTTConfig(layers="all", chunk_size=4))
        compiled(model)
        tokens = models.ids(1, 5)
        with pytest.raises(CacheError, match="'state', which cannot carry"):
            run(model, tokens)
        out = model(tokens, use_cache=False)
        with pytest.raises(CacheError, match="use_cache=False"):
            model(tokens, state=[out.logits], use_cache=False)

    def test_more_rows_than_the_session_has(self, model):
        with pytest.raises(CacheError, match="1 sequences, but the call has 3"):
            run(model, models.ids(1, 5), num_beams=3, past_key_values=ttt.Session(model).cache)


def test_revert_gives_generate_back(base):
    model = ttt.revert(fast())
    assert vars(model).keys() - vars(base).keys() == {"_compiled_call_impl"}
