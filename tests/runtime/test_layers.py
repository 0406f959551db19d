"""Every kind of cache layer goes on bit for bit after it was stored, and a fork goes on by itself."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache, cache_utils

from ttt_compiler.errors import CacheError, SnapshotError
from ttt_compiler.runtime.cache import attach_state
from ttt_compiler.runtime.layers import (
    KINDS,
    check_layers,
    export_layers,
    fill_layers,
    fork_cache,
    layer_bytes,
)

B, H, D, WINDOW, ROOM = 2, 2, 4, 6, 24
ARGUMENTS = {"sliding_window": WINDOW, "max_cache_len": ROOM, "number_of_states": 2}
# Those of a single model are tested with it.
GENERAL = [kind for kind in KINDS if hasattr(cache_utils, kind)]
QUANTISED = {"QuantizedLayer", "QuantoQuantizedLayer", "HQQQuantizedLayer", "Fp8QuantizedLayer"}
ABSTRACT = {"CacheLayerMixin", "BaseQuantizedLayer", "LinearAttentionCacheLayerMixin"}


def layer_of(kind):
    cls = getattr(cache_utils, kind)
    wanted = inspect.signature(cls.__init__).parameters
    return cls(**{k: v for k, v in ARGUMENTS.items() if k in wanted})


def cache_with(kind, layers=2):
    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = [layer_of(kind) for _ in range(layers)], None
    return cache


def advance(cache, tokens, seed):
    """What a model does to its cache in one call; returns all that the layers gave back."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i, layer in enumerate(cache.layers):
        if hasattr(layer, "lazy_initialization") and hasattr(layer, "get_mask_sizes"):
            out.append(torch.tensor(layer.get_mask_sizes(tokens)))
            k, v = (torch.randn(B, H, tokens, D + n, generator=g) for n in (0, 1))
            out += [x.clone() for x in cache.update(k, v, i)]
        if hasattr(layer, "update_indexer"):
            out.append(cache.update_indexer(torch.randn(B, tokens, 3, generator=g), i).clone())
            new = torch.arange(tokens).expand(1, B, tokens)
            old = layer.indexer_position_ids
            layer.indexer_position_ids = new if old is None else torch.cat([old, new], -1)
            out.append(layer.indexer_position_ids.clone())
        for state in range(getattr(layer, "number_of_states", 0)):
            before = cache.get_recurrent_state(i, state) if state else None
            x = torch.randn(B, 5, tokens, generator=g)
            out.append(cache.update_conv_state(x, i, state, conv_kernel_size=4).clone())
            if state:  # the first has a convolution alone, as in lfm2
                new = torch.randn(B, H, 3, generator=g)
                out.append(
                    cache.update_recurrent_state(new if before is None else before * 0.5 + new, i, state)
                )
    return [x.clone() for x in out]


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True)
    )


def through_disk(cache, empty, batch=B):
    tensors, description = export_layers(cache)
    tensors = {k: v.clone() for k, v in tensors.items()}
    description = json.loads(json.dumps(description))
    check_layers(description, tensors, empty, batch, "x.ttt")
    fill_layers(empty, description, tensors)
    return empty


def test_every_kind_of_transformers_is_known():
    """A kind that transformers adds must be decided on."""
    base = (cache_utils.CacheLayerMixin, cache_utils.LinearAttentionCacheLayerMixin, cache_utils.DummyLayer)
    there = {n for n, c in vars(cache_utils).items() if inspect.isclass(c) and issubclass(c, base)}
    assert there == set(GENERAL) | QUANTISED | ABSTRACT


@pytest.mark.parametrize("lengths", [(), (3,), (1,), (9,), (4, 1, 1, 1, 1, 1), (2, 7, 3)], ids=str)
@pytest.mark.parametrize("kind", GENERAL)
def test_stored_goes_on_bit_for_bit(kind, lengths):
    cache = cache_with(kind)
    for seed, n in enumerate(lengths):
        advance(cache, n, seed)
    later = through_disk(cache, cache_with(kind))
    assert equal(list(export_layers(cache)[0].values()), list(export_layers(later)[0].values()))
    assert export_layers(cache)[1] == export_layers(later)[1]
    assert layer_bytes(cache) == layer_bytes(later)
    for seed, n in enumerate((1, 1, 4, 1)):
        assert equal(advance(cache, n, 50 + seed), advance(later, n, 50 + seed)), f"step {seed}"


def touch(cache, operation):
    if operation == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
    elif operation == "reset":
        cache.reset()
    elif operation == "crop":
        cache.crop(-1)
    elif operation == "repeat":
        cache.batch_repeat_interleave(2)
    elif operation == "select":
        cache.batch_select_indices(torch.tensor([1]))
    elif operation == "offload":
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
    else:
        advance(cache, int(operation), 70)


@pytest.mark.parametrize("kind", GENERAL)
@pytest.mark.parametrize(
    "operation", ["1", "5", "9", "reorder", "reset", "crop", "repeat", "select", "offload"]
)
@pytest.mark.parametrize("past", [False, True])
def test_a_fork_and_its_original_go_on_by_themselves(kind, operation, past):
    for swap in (False, True):
        cache, twin = cache_with(kind), cache_with(kind)
        for c in (cache, twin):
            if past:
                c.activate_past_recording()
            advance(c, 4, 0)
            advance(c, 3, 1)
        other = fork_cache(cache)
        moved, kept = (other, cache) if swap else (cache, other)
        try:
            touch(moved, operation)
        except (AttributeError, RuntimeError):  # transformers does not have this operation for this kind
            assert operation in ("crop", "repeat", "select")
        advance_both = [(1, 80), (2, 81)]
        for n, seed in advance_both:
            assert equal(advance(kept, n, seed), advance(twin, n, seed))


def test_a_fork_shares_what_no_layer_writes_in_place():
    cache = DynamicCache()
    cache.layers = [layer_of("DynamicLayer"), layer_of("DynamicSlidingWindowLayer")]
    cache.layer_class_to_replicate = None
    advance(cache, 5, 0)
    for a, b in zip(cache.layers, fork_cache(cache).layers, strict=True):
        assert a is not b
        assert a.keys is b.keys
        assert a.values is b.values


def test_a_fork_keeps_the_class_of_a_carrier_and_leaves_its_state_to_the_caller():
    state = object()
    cache = attach_state(DynamicCache(), state)
    fork = fork_cache(cache)
    assert type(fork) is type(cache)
    assert fork.ttt is state
    assert fork.layers is not cache.layers
    assert fork_cache(None) is None


def test_a_fork_copies_unknown_caches():
    class Other(DynamicCache):
        pass

    cache = attach_state(Other(), object())
    cache.update(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), 0)
    fork = fork_cache(cache)
    assert fork.ttt is cache.ttt
    fork.layers[0].keys.zero_()
    assert cache.layers[0].keys.all()


def test_a_forked_static_layer_keeps_its_static_addresses():
    cache = cache_with("StaticLayer")
    advance(cache, 3, 0)
    for layer in fork_cache(cache).layers:
        assert all(hasattr(x, "_dynamo_static_input_type") for x in (layer.keys, layer.values))


def test_lazily_made_layers_and_uninitialised_ones():
    cache = DynamicCache()
    later = through_disk(cache, DynamicCache())
    assert later.layers == []
    cache.update(torch.ones(B, 1, 2, 2), torch.ones(B, 1, 2, 2), 2)
    later = through_disk(cache, DynamicCache())
    assert [x.is_initialized for x in later.layers] == [False, False, True]
    assert equal([later.layers[2].keys], [cache.layers[2].keys])
    assert export_layers(None) == ({}, [])
    assert layer_bytes(None) == 0


def test_layers_beside_each_other_of_many_kinds():
    kinds = [
        "DynamicLayer",
        "DummyLayer",
        "LinearAttentionLayer",
        "DynamicSlidingWindowLayer",
        "DynamicLayer",
    ]

    def make():
        cache = DynamicCache()
        cache.layers, cache.layer_class_to_replicate = [layer_of(k) for k in kinds], None
        return cache

    cache = make()
    advance(cache, 9, 0)
    later = through_disk(cache, make())
    assert equal(advance(cache, 2, 1), advance(later, 2, 1))


def test_only_the_used_part_of_a_static_layer_is_stored():
    cache = cache_with("StaticLayer", 1)
    advance(cache, 3, 0)
    tensors, _ = export_layers(cache)
    assert tensors["cache.0.keys"].shape == (B, H, 3, D)
    assert layer_bytes(cache) == B * H * ROOM * (D + D + 1) * 4


def test_a_static_layer_may_get_more_room_but_not_less():
    cache = cache_with("StaticLayer", 1)
    advance(cache, 9, 0)
    for room in (9, 40):
        empty = cache_with("StaticLayer", 1)
        empty.layers[0].max_cache_len = room
        assert int(through_disk(cache, empty).get_seq_length()) == 9
    empty.layers = [cache_utils.StaticLayer(8)]
    with pytest.raises(SnapshotError, match="larger max_cache_len; nothing was changed"):
        through_disk(cache, empty)


@pytest.mark.parametrize("kind", ["Fp8QuantizedLayer", "SomethingNew"])
def test_unknown_kinds_are_named(kind):
    cache = DynamicCache()
    known = getattr(cache_utils, kind, None)
    cache.layers = [known() if known else type(kind, (cache_utils.DynamicLayer,), {})()]
    with pytest.raises(CacheError, match=f"type {kind} .* use a DynamicCache"):
        export_layers(cache, CacheError)


def test_caches_that_hold_more_than_layers_are_refused():
    cache = cache_utils.EncoderDecoderCache(DynamicCache(), DynamicCache())
    with pytest.raises(SnapshotError, match="EncoderDecoderCache"):
        export_layers(cache)


class TestHostile:
    """Whatever a file says about its layers: our error, and nothing is built."""

    @staticmethod
    def stored(kind, lengths=(4, 3)):
        cache = cache_with(kind)
        for seed, n in enumerate(lengths):
            advance(cache, n, seed)
        tensors, description = export_layers(cache)
        return dict(tensors), copy.deepcopy(description)

    @staticmethod
    def refused(kind, tensors, description, match=None, batch=B):
        empty = cache_with(kind)
        before = json.dumps(export_layers(empty)[1])
        with pytest.raises(SnapshotError, match=match) as e:
            check_layers(description, tensors, empty, batch, "x.ttt")
        assert str(e.value).startswith("x.ttt: ")
        assert str(e.value).endswith("; nothing was changed")
        assert json.dumps(export_layers(empty)[1]) == before

    @pytest.mark.parametrize("kind", [k for k in GENERAL if k != "DummyLayer"])
    def test_every_value_of_a_description_matters(self, kind):
        bad = [None, -1, 2**70, True, False, 3, 7.0, "7", [], {}, float("nan"), ["keys"], {"a": 1}]
        tensors, description = self.stored(kind)
        accepted = []

        def places(value, path=()):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, x in items:
                yield (*path, key)
                if isinstance(x, (dict, list)):
                    yield from places(x, (*path, key))

        for place in places(description):
            for value in bad:
                changed = copy.deepcopy(description)
                target = changed
                for key in place[:-1]:
                    target = target[key]
                if target[place[-1]] == value and type(target[place[-1]]) is type(value):
                    continue
                target[place[-1]] = value
                empty = cache_with(kind)
                try:
                    check_layers(changed, dict(tensors), empty, B, "x.ttt")
                except SnapshotError:
                    continue
                accepted.append((place, value))
                fill_layers(empty, changed, dict(tensors))  # accepted: then it must work
                advance(empty, 1, 9)
        # Room may differ, a full window's first counter is not read again, the rest are true or false.
        allowed = {"previous", "record_past", "record_conv", "reserved", "written"}
        assert {place[-1] for place, _ in accepted} <= allowed, accepted

    @pytest.mark.parametrize("kind", [k for k in GENERAL if k != "DummyLayer"])
    def test_every_tensor_matters(self, kind):
        tensors, description = self.stored(kind)
        assert tensors
        for name, x in tensors.items():
            rest = {k: v for k, v in tensors.items() if k != name}
            self.refused(kind, rest, description)
            self.refused(kind, {**rest, "cache.0.evil": x}, description)
            self.refused(kind, {**rest, "cache.7.keys": x}, description)
            rows = 1 if name.endswith("position_ids") else 0
            self.refused(kind, {**rest, name: x.narrow(rows, 0, 1)}, description)
            self.refused(kind, {**rest, name: x.flatten()}, description)
            if ".conv." not in name:
                other = torch.int32 if x.is_floating_point() else torch.float32
                self.refused(kind, {**rest, name: x.to(other)}, description)
        self.refused(kind, {**tensors, "cache.0.evil": x}, description, "unknown 'evil'")
        self.refused(kind, {**tensors, "cache.-1.keys": x}, description, "of no layer")
        self.refused(kind, tensors, description, batch=B + 1)

    @pytest.mark.parametrize(
        ("description", "match"),
        [
            (None, "does not describe"),
            ({"0": {}}, "does not describe"),
            ([1, 2], "does not describe"),
            ([{"kind": "DynamicLayer", "filled": False}] * 3, "3 layers, this model's cache 2"),
            ([{"kind": "os.system"}] * 2, "'os.system'"),
            ([{"kind": ["x"]}] * 2, "kind that it was saved with"),
            ([{}] * 2, "kind that it was saved with"),
            ([{"kind": "StaticLayer"}] * 2, "'StaticLayer'.* has a DynamicLayer"),
            ([{"kind": "DynamicLayer", "filled": False, "__class__": 1}] * 2, "unknown '__class__'"),
        ],
    )
    def test_descriptions_of_something_else(self, description, match):
        self.refused("DynamicLayer", {}, description, match)

    def test_millions_of_layers_are_not_made(self):
        said = {"kind": "DynamicLayer", "filled": False}
        with pytest.raises(SnapshotError, match="100000 layers"):
            check_layers([said] * 100000, {}, DynamicCache(), 1, "x.ttt")

    def test_the_dtype_of_keys(self):
        tensors, description = self.stored("DynamicLayer")
        with pytest.raises(SnapshotError, match="do not fit this model"):
            check_layers(description, tensors, cache_with("DynamicLayer"), B, "x.ttt", dtype=torch.bfloat16)


COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GEMMA = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6}
LINEAR = {f"linear_{x}": n for x, n in (("num_key_heads", 2), ("num_value_heads", 2))}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
MODELS = {
    "llama": {"num_hidden_layers": 2},
    "mistral": {"num_hidden_layers": 2, "sliding_window": 6},
    "gemma3_text": {"num_hidden_layers": 3, "query_pre_attn_scalar": 8, **GEMMA},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, **LINEAR},
    "falcon_h1": {"num_hidden_layers": 2, "mamba_chunk_size": 4, **MAMBA},
}


@pytest.mark.parametrize(
    ("name", "static"),
    [(n, False) for n in MODELS] + [(n, True) for n in ("llama", "mistral", "gemma3_text")],
)
def test_models_go_on_bit_for_bit(name, static, tmp_path):
    from ttt_compiler.runtime.files import read_tensors, write_tensors

    config = transformers.AutoConfig.for_model(name, **COMMON, **MODELS[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()

    def fresh():
        return StaticCache(config=config, max_cache_len=40) if static else DynamicCache(config=config)

    tokens = torch.randint(0, 61, (B, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = fresh()
        model(tokens[:, :11], past_key_values=cache, use_cache=True)
        tensors, description = export_layers(cache)
        write_tensors(tmp_path / "s.ttt", tensors, {"layers": description}, SnapshotError)
        fork = fork_cache(cache)
        read, header = read_tensors(tmp_path / "s.ttt", SnapshotError)
        later = fresh()
        check_layers(header["layers"], read, later, B, tmp_path / "s.ttt")
        fill_layers(later, header["layers"], read)
        steps = [(11, 12), (12, 13), (13, 18), (18, 19)]
        for a, b in steps:
            want = model(tokens[:, a:b], past_key_values=cache, use_cache=True).logits
            for one in (later, fork):
                assert torch.equal(model(tokens[:, a:b], past_key_values=one, use_cache=True).logits, want)
