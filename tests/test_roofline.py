"""The plan of whole models: counts against torch's counter and the memory plan, the page, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import ttt_compiler as ttt
from ttt_compiler.architectures.presets import PRESETS
from ttt_compiler.cli import app
from ttt_compiler.codegen.devices import A100, DEVICES, H100, H800
from ttt_compiler.errors import ConfigError
from ttt_compiler.memory import memory_plan
from ttt_compiler.model_cost import (
    ModelShape,
    Sites,
    decode,
    prefill,
    static_decode,
    static_prefill,
    static_training,
    training,
)
from ttt_compiler.planned import planned_model
from ttt_compiler.published import FOLLOW_UP, PAPER, compare
from ttt_compiler.roofline import CONTEXTS, Roofline, roofline
from ttt_compiler.roofline_text import COMMAND, PAGE

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def plan() -> Roofline:
    return roofline()


@pytest.fixture(scope="module")
def small() -> nn.Module:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def flops(phases, *names: str) -> float:
    return sum(p.flops for p in phases if not names or p.name in names)


def test_prefill_flops_are_torchs(small):
    tokens, shape = 40, ModelShape.of(small)
    with FlopCounterMode(display=False) as counter:
        small(torch.zeros(2, tokens, dtype=torch.int64, device="meta"), logits_to_keep=1)
    phases = static_prefill(shape, tokens, H100, batch=2)
    # The eager attention multiplies the whole square; ours counts the pairs that causality leaves.
    square = 4 * 2 * shape.layers * shape.attention_width * tokens**2
    # The rotary embedding is counted as a product of one column.
    rotary = counter.get_total_flops() - flops(phases, "linear", "head") - square
    assert 0 <= rotary <= 2 * 2 * tokens * 16
    assert flops(phases, "attention") == square * (tokens + 1) / (2 * tokens)


def test_shape_of_a_module(small):
    shape = ModelShape.of(small)
    attention = 3 * (32 * 64 + 2 * 32 * 32 + 64 * 32)
    assert (shape.linear, shape.head) == (attention + 3 * 3 * 32 * 48, 64 * 32)
    assert (shape.attention_width, shape.kv_width, shape.layers) == (64, 32, 3)
    assert shape.cached(100) == 2 * 3 * 100 * 32 * 4
    bare = ModelShape.of(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), mlp=(4, 8))
    assert (bare.linear, bare.head, bare.attention_width, bare.d_ff) == (64, 0, 0, 8)
    assert flops(static_prefill(bare, 10, H100), "attention") == 0


def test_windows_and_pairs(small):
    shape = ModelShape.of(small)
    assert shape.pairs(4) == 1 + 2 + 3 + 4
    assert replace(shape, window=2).pairs(4) == 1 + 2 + 2 + 2
    assert replace(shape, window=8).pairs(4) == shape.pairs(4)
    assert replace(shape, window=8).cached(100) == shape.cached(8)


def test_decode_and_training_of_the_static_model(small):
    shape = ModelShape.of(small)
    weights, attention = static_decode(shape, 100, H100, batch=4)
    assert weights.hbm == (shape.linear + shape.head) * 4
    assert attention.hbm == 4 * shape.cached(100)
    once = flops(static_prefill(shape, 50, H100), "linear", "attention")
    whole = static_training(shape, 50, H100)
    assert flops(whole, "linear") == 3 * flops(static_prefill(shape, 50, H100), "linear")
    assert flops(whole, "attention", "attention backward") == 3.5 * flops(
        static_prefill(shape, 50, H100), "attention"
    )
    assert flops(whole, "head") == 3 * 2 * 50 * shape.head
    assert once < flops(whole)


def test_a_planned_model_is_what_the_memory_plan_finds():
    config = ttt.TTTConfig(layers="every:5+1", chunk_size=512)
    planned = planned_model("Qwen3-0.6B", config)
    looked = memory_plan("Qwen3-0.6B", 1, 4096, config, device="cuda")
    assert [(s.count, s.d_model, s.d_ff, s.d_target, s.chunk) for s in planned.sites] == [
        (k.sites, k.d_model, k.d_ff, k.d_target, k.chunk) for k in looked.sites
    ]
    assert planned.state_bytes == looked.fast_weight_bytes
    assert planned.shape.cached(4096) == looked.kv_bytes


def test_any_folder_can_be_planned(tmp_path, small):
    small.config.save_pretrained(tmp_path)
    config = ttt.TTTConfig(layers="all", chunk_size=16)
    planned = planned_model(str(tmp_path), config)
    assert planned.sites == (Sites(3, 32, 48, 32, 16, True),)
    assert planned.shape.linear == ModelShape.of(small).linear


def test_plan_covers_every_model_length_and_device(plan):
    assert {(r.model, r.tokens, r.device) for r in plan.rows} == {
        (model, tokens, device.name) for model in PRESETS for tokens in CONTEXTS for device in DEVICES
    }
    for row in plan.rows:
        # Tiles for running sequences are small there, and re-read h for every one of them.
        assert 0 < row.prefill.percent < (100 if row.device in ("B200", "MI300X") else 20)
        assert 0 < row.decode.percent < 10
        assert 0 < row.training.percent < 20
        # Memory is what the stacked form pays with, whatever its time.
        assert row.training.stacks > row.training.workspace
        assert row.kv_bytes > 0 < row.state_bytes


def test_the_share_of_fast_weights_falls_as_attention_grows(plan):
    for device in DEVICES:
        for model in PRESETS:
            rows = [r for r in plan.rows if (r.model, r.device) == (model, device.name)]
            for part in ("prefill", "decode", "training"):
                percents = [getattr(row, part).percent for row in rows]
                assert percents == sorted(percents, reverse=True)


def test_more_sites_cost_more_and_none_cost_nothing():
    config = ttt.TTTConfig()
    few, many = (planned_model("Qwen3-4B", replace(config, layers=n)) for n in ("every:6", "every:2"))
    for part in (prefill, decode, training):
        costs = [part(few.shape, sites, 8192, A100).seconds for sites in ((), few.sites, many.sites)]
        assert costs[0] == 0 < costs[1] < costs[2]
        assert costs[2] == pytest.approx(3 * costs[1])


def test_the_papers_rows_carry_what_was_measured():
    assert [round(m.change, 1) for m in PAPER.measured] == [-8.7, -8.5, -8.5, -6.7, -4.2, -1.1]
    rows = compare(PAPER)
    for row in rows:
        # Throughput falls; what is measured lies further from the roofline than what is predicted.
        assert all(change < 0 for _, change in row.predicted_changes)
        assert 0 < row.added_reached < row.base_reached < 1
    full = [dict(row.predicted_changes)[4096] for row in rows if row.measured.window is None]
    assert full == sorted(full)


def test_a_follow_up_measured_four_layers_of_another_model():
    (site,) = planned_model(FOLLOW_UP.model, ttt.TTTConfig(layers=FOLLOW_UP.layers)).sites
    assert site.count == 4
    rows = compare(FOLLOW_UP)
    milliseconds = [1000 * row.measured.added * row.measured.tokens for row in rows]
    assert milliseconds == pytest.approx([1.0, 2.5, 7.0, 28.0, 44.1, 22.3])
    assert all(0 < row.added_reached < 1 for row in rows)
    # With the attention that the prediction takes for granted, the static model is where it should be.
    assert rows[-1].base_reached == pytest.approx(1, abs=0.1)


def test_an_h800_is_an_h100_here(plan):
    by = {d: [r for r in plan.rows if r.device == d.name] for d in (H100, H800)}
    assert [replace(r, device="") for r in by[H100]] == [replace(r, device="") for r in by[H800]]
    assert "Every number is the H100's, above." in str(plan)


def test_the_page_is_what_the_code_prints(plan):
    page = (REPOSITORY / PAGE).read_text()
    assert page == str(plan), f"{PAGE} is out of date. Type: {COMMAND}"


def test_wrong_lengths_and_models():
    with pytest.raises(ConfigError, match="at least 1"):
        roofline(["Qwen3-4B"], contexts=[0])
    with pytest.raises(ttt.errors.TTTError):
        roofline(["no-such-model-anywhere"])


def run(*arguments: object):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_command_writes_what_it_says(tmp_path):
    page, numbers = tmp_path / "page.md", tmp_path / "numbers.json"
    result = run("--plan", "--model", "Qwen3-4B", "--device", "h200", "--json", numbers, "--markdown", page)
    assert result.exit_code == 0, result.output
    assert "### H200" in page.read_text()
    data = json.loads(numbers.read_text())
    assert len(data["rows"]) == len(CONTEXTS)
    row = data["rows"][0]
    assert (row["model"], row["device"], row["tokens"]) == ("Qwen3-4B", "H200", CONTEXTS[0])
    assert row["prefill"]["overhead_percent"] > 0
    assert row["decode"]["stacked_overhead_percent"] is None
    assert data["studies"][0]["rows"][0]["measured_change_percent"] == pytest.approx(-8.68, abs=0.01)


def test_command_on_this_processor():
    result = run("--plan", "--model", "Qwen3-0.6B", "--device", "cpu", "--chunk-size", 512)
    assert result.exit_code == 0, result.output
    assert "### cpu" in result.output
    assert "recurrent" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "Qwen3-4B"), "type --plan"),
        (("--plan", "--device", "tpu"), "Known: A100"),
        (("--plan", "--model", "Qwen3-4B", "--device", "H100", "--json", "/nowhere/x"), "cannot be written"),
    ],
    ids=["no plan", "device", "file"],
)
def test_command_refuses_in_one_line(arguments, says: str):
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in result.output
    assert "Traceback" not in result.output
