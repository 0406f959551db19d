"""The command line, and the demo from end to end on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import ttt_compiler as ttt
from ttt_compiler.cli import app, parse_layers
from ttt_compiler.demo import DemoOptions, DemoResult
from ttt_compiler.demo_view import verdict
from ttt_compiler.report import Report

WORDS = [f"w{i}" for i in range(63)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a random two-layer Llama and a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<unk>": 0, **{word: i + 1 for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def document(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "document.txt"
    picks = torch.randint(0, len(WORDS), (128,), generator=torch.Generator().manual_seed(1))
    path.write_text(" ".join(WORDS[i] for i in picks))
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def small(tiny: Path, document: Path, out: Path, *more: object):
    sizes = {"tokens": 96, "window": 32, "block": 16, "sink": 2, "chunk-size": 16}
    options = {"model": tiny, "document": document, "out": out, "layers": "all", **sizes}
    given = [x for name, value in options.items() for x in (f"--{name}", value)]
    return run("demo", *given, "--continuation", 6, *more)


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"ttt_compiler {ttt.__version__}"


def test_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "ttt_compiler", "--version"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert ttt.__version__ in done.stdout


def test_missing_typer_is_one_line():
    code = "import sys; sys.modules['typer'] = None; from ttt_compiler.cli import main"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'ttt_compiler[demo]'" in done.stderr


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", "all"),
        ("every:6", "every:6"),
        ("0, 6", (0, 6)),
        ("*.1.*,*.2.*", ("*.1.*", "*.2.*")),
        ("7", (7,)),
    ],
)
def test_layers(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "./no-such-folder"], "no such folder"),
        (["explain", "./no-such.gguf"], "no such file"),
        (["explain", "smollm2", "--layers", "evry:2"], "every:k"),
        (["explain", "smollm2", "--layers", "every:0"], "every:k"),
        (["explain", "smollm2", "--chunk-size", "0"], "chunk_size"),
        (["explain", "smollm2", "--html", "no-such-folder/out.html"], "mkdir -p no-such-folder"),
        (["demo", "--target", "logits"], "input_embed"),
        (["demo", "--document", "no-such.txt"], "no-such.txt"),
        (["demo", "--tokens", "1000"], "multiple"),
        (["demo", "--window", "512"], "window=512"),
        (["demo", "--adapter", "x", "--random-adapter"], "exclude"),
        (["demo", "--random-adapter", "--tokens", "512", "--chunk-size", "1024"], "one chunk"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_unknown_option():
    result = run("demo", "--no-such-option")
    assert result.exit_code == 2
    assert "no-such-option" in result.stderr


def test_a_folder_without_a_model(tmp_path):
    result = run("explain", tmp_path)
    assert result.exit_code == 2
    assert "cannot be loaded as a causal language model" in result.stderr


def test_explain(tiny):
    result = run("explain", tiny, "--layers", "1", "--chunk-size", "16")
    assert result.exit_code == 0
    assert "1 of 2 MLP down-projections would become fast weights" in result.output


def test_explain_json(tiny):
    result = run("explain", tiny, "--layers", "1", "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert [row["chosen"] for row in data["rows"]] == [False, True]
    assert data["problems"] == []


def test_explain_html(tiny, tmp_path):
    page = tmp_path / "out.html"
    result = run("explain", tiny, "--layers", "1", "--json", "--html", page)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["rows"]
    assert f"written: {page}" in result.stderr
    assert 'id="site=1"' in page.read_text(encoding="utf-8")


def test_demo_with_an_untrained_adapter_says_that_the_columns_are_equal(tiny, document, tmp_path):
    result = small(tiny, document, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Both columns are equal" in result.output
    assert "bit for bit" in result.output
    assert "Training an adapter is not part of this version" in result.output
    numbers = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert numbers["equal"]
    assert numbers["restored"]
    assert numbers["static_bits"] == numbers["fast_bits"]
    assert len(numbers["static_bits"]) == 95
    assert not any(any(values) for values in numbers["drift"].values())
    assert (tmp_path / "out" / "bits-per-token.png").stat().st_size > 10_000


def test_demo_with_a_random_adapter_shows_state_moving(tiny, document, tmp_path):
    result = small(tiny, document, tmp_path / "out", "--random-adapter", "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "Both columns are equal" not in result.output
    assert "not expected to help" in result.output
    assert "after so many chunks" in result.output
    numbers = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert not numbers["equal"]
    assert numbers["largest_effect"] > 0
    # Nothing is written before the first chunk is complete.
    assert numbers["static_bits"][:15] == numbers["fast_bits"][:15]
    assert numbers["chunks"] == [1, 2, 3, 4, 5, 6]
    for values in numbers["drift"].values():
        assert 1e-3 < values[0] < 1e-2
    assert numbers["restored"]
    assert numbers["session"]["cached_tokens"] == 16
    assert numbers["session"]["tokens_seen"] == [96]


def test_demo_with_a_saved_adapter(tiny, document, tmp_path):
    model = LlamaForCausalLM.from_pretrained(tiny)
    ttt.convert(model, ttt.TTTConfig(layers=[1], chunk_size=16))
    torch.manual_seed(5)
    torch.nn.init.normal_(model.model.layers[1].mlp.down_proj.ttt_conv, std=0.1)
    ttt.save_adapter(model, tmp_path / "adapter")
    result = small(tiny, document, tmp_path / "out", "--adapter", tmp_path / "adapter")
    assert result.exit_code == 0, result.output
    assert "says nothing about other documents" in result.output
    numbers = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert list(numbers["drift"]) == ["model.layers.1.mlp.down_proj.weight"]


def test_demo_reads_what_one_whole_call_reads(tiny, document, tmp_path):
    """With a window as long as the document, the static column is the model's own loss."""
    result = small(tiny, document, tmp_path / "out", "--window", 64, "--tokens", 32, "--continuation", 1)
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "out" / "demo.json").read_text())
    model = LlamaForCausalLM.from_pretrained(tiny).eval()
    ids = torch.tensor([[WORDS.index(word) + 1 for word in document.read_text().split()[:32]]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    mean = sum(numbers["static_bits"]) / len(numbers["static_bits"])
    assert mean * 0.6931471805599453 == pytest.approx(loss, rel=1e-5)


def test_demo_refuses_a_short_document(tiny, document, tmp_path):
    result = small(tiny, document, tmp_path / "out", "--tokens", 1600)
    assert result.exit_code == 2
    assert "128 tokens, but 1600 were asked for" in result.stderr


def test_verdict_never_hides_an_unexplained_difference():
    result = DemoResult(Report("M"), equal=False, largest_effect=1.0)
    assert "report this as a bug" in verdict(DemoOptions(), result)


def test_buckets():
    bits = [float(i) for i in range(1, 1500)]
    result = DemoResult(Report("M"), static_bits=bits, fast_bits=bits)
    assert [(a, b) for a, b, _, _ in result.buckets()] == [(0, 512), (512, 1024), (1024, 1500)]
    assert result.buckets()[0][2] == sum(range(1, 512)) / 511
