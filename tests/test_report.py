"""``explain`` says what is there and what it costs, disturbs nothing and never raises."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import ttt_compiler as ttt
from ttt_compiler.codegen.cost_model import (
    call_bytes,
    call_flops,
    linear_parameters,
    lowering_name,
    overhead_percent,
    site_flops,
)
from ttt_compiler.report import explain
from ttt_compiler.report_text import WIDTH
from ttt_compiler.spec import SiteSpec

CONFIG = ttt.TTTConfig(layers="every:2", chunk_size=16)


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 256,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


@pytest.fixture(scope="module")
def spec() -> SiteSpec:
    return SiteSpec("w", 8, 24, 6, 16, 0.3, "input_embed", True, 5, module="")


def test_flops_of_a_site(spec):
    flops = site_flops(spec)
    assert flops.apply == 2 * 8 * 24
    assert flops.added == 2 * 8 * 24 + 2 * 6 * 8 + 2 * 5 * 6


def test_a_call_writes_only_full_chunks(spec):
    flops = site_flops(spec)
    assert call_flops(spec, 15) == 15 * flops.apply
    assert call_flops(spec, 1, seen=15) == flops.apply + 16 * flops.added
    assert call_flops(spec, 40) == 40 * flops.apply + 32 * flops.added


def test_decoding_reads_the_state_once(spec):
    rows = (24 + 6 + 8) * 4
    assert call_bytes(spec, 1, torch.float32) == 8 * 24 * 4 + rows
    written = call_bytes(spec, 1, torch.float32, seen=15) - call_bytes(spec, 1, torch.float32)
    assert written == 16 * (24 + 6) * 4 + 2 * 8 * 24 * 4


def test_linear_parameters_count_an_embedding_only_as_a_head():
    tied, untied = llama(tie_word_embeddings=True), llama(tie_word_embeddings=False)
    assert linear_parameters(tied) == linear_parameters(untied)
    norms = sum(p.numel() for p in tied.parameters() if p.dim() == 1)
    assert linear_parameters(tied) == sum(p.numel() for p in tied.parameters()) - norms
    before = linear_parameters(tied)
    ttt.convert(tied, CONFIG)
    assert linear_parameters(tied) == before


def test_overhead_of_nothing_is_zero(spec):
    assert overhead_percent([], 10) == 0
    assert overhead_percent([spec], 0) == 0


def test_lowering_names_say_where_there_is_none(spec):
    assert lowering_name(spec, torch.device("cuda"), torch.float32).startswith("none")
    assert "fp64 state" in lowering_name(spec, torch.device("cpu"), torch.float64)
    assert "bfloat16" in lowering_name(spec, torch.device("cpu"), torch.bfloat16)


def test_unconverted_model():
    model = llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = explain(model, CONFIG)
    assert not report.converted
    assert not report.problems
    assert [row.chosen for row in report.rows] == [True, False, True]
    assert report.rows[0].weight == "model.layers.0.mlp.down_proj.weight"
    assert (report.rows[0].d_model, report.rows[0].d_ff) == (32, 48)
    assert (report.rows[0].activation, report.rows[0].gated, report.rows[0].bias) == (
        "silu",
        True,
        False,
    )
    assert report.rows[0].causal is True
    assert "every:2" in (report.rows[1].reason or "")
    assert report.parameters_added == 2 * (32 * 5 + 32 * 32)
    assert ttt.conversion.root_of(model) is None
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_converted_model_says_what_conversion_added_and_is_not_disturbed():
    model = llama()
    predicted = explain(model, CONFIG)
    parameters = sum(p.numel() for p in model.parameters())
    ttt.convert(model, CONFIG)
    model.train()
    rng = torch.get_rng_state()
    report = explain(model)
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training
    assert ttt.conversion.require_root(model)[1].context.enabled
    assert report.converted
    assert not report.problems
    assert report.rows == predicted.rows
    assert report.parameters_added == sum(p.numel() for p in model.parameters()) - parameters
    assert report.state_bytes == ttt.Session(model).state.nbytes
    assert report.flops_overhead_percent == predicted.flops_overhead_percent > 0
    assert ttt.explain(model, ttt.TTTConfig(layers="all")).problems


def test_a_compiled_model_still_runs_the_same_graphs():
    model = ttt.convert(llama(), CONFIG)
    model.compile(backend="inplace_ttt")
    ids = torch.randint(0, 64, (1, 20))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        report = explain(model)
        looked = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        after = model(input_ids=ids).logits
    assert report.converted
    assert not report.problems
    assert torch.equal(before, after)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == looked >= compiled


def test_biased_transposed_ungated_mlp():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    report = explain(GPT2LMHeadModel(config), ttt.TTTConfig(layers="all"))
    assert [(row.bias, row.gated, row.chosen) for row in report.rows] == [(True, False, True)] * 2


def test_bidirectional_model_says_why_not():
    config = BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
    )
    report = explain(BertModel(config), ttt.TTTConfig(layers="all"))
    assert [row.causal for row in report.rows] == [False, False]
    assert all("later tokens" in (row.reason or "") for row in report.rows)
    assert any("NonCausalModelError" in problem for problem in report.problems)


def test_encoder_decoder_is_a_problem_not_an_error():
    config = T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=2, vocab_size=64)
    report = explain(T5ForConditionalGeneration(config))
    assert any("encoder-decoder" in problem for problem in report.problems)


class _Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken\n" * 50)


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 3), _Raises(), nn.Module(), "no model", None],
    ids=["no inputs known", "raises", "empty", "str", "None"],
)
def test_never_raises(model):
    report = explain(model, example_inputs=((torch.ones(2, 9, 3),), {}) if callable(model) else None)
    assert report.problems
    assert str(report)
    json.dumps(report.to_dict())


def test_no_mlp_lists_what_was_refused():
    report = explain(nn.Linear(3, 3), example_inputs=((torch.randn(2, 9, 3),), {}))
    assert not report.rows
    assert any("NoMLPFoundError" in problem for problem in report.problems)
    assert [names for _, names in report.rejected] == [("weight",)]


def test_wrong_layer_is_a_problem():
    report = explain(llama(), ttt.TTTConfig(layers=[7]))
    assert any("blocks with an MLP: 0-2" in problem for problem in report.problems)
    assert not any(row.chosen for row in report.rows)


def test_text_is_aligned_and_narrow():
    text = str(explain(llama(), CONFIG))
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= WIDTH
    table = [line for line in lines if "down_proj" in line]
    assert len({line.index("silu") for line in table}) == 1
    assert "2 of 3 MLP down-projections would become fast weights" in lines[0]


def test_dict_is_json_ready():
    data = json.loads(json.dumps(explain(llama(), CONFIG).to_dict()))
    assert [row["chosen"] for row in data["rows"]] == [True, False, True]
    assert data["config"]["chunk_size"] == 16
    assert data["rejected"][0]["contractions"]
