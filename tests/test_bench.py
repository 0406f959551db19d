"""What benchmarks compute: gates that refuse wrong results, arithmetic, fits; counted instructions."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch

import ttt_compiler as ttt
from bench import competitors, decode, decode_layer, gpu, instructions, measure
from bench.decode_layer import Decoding, Place, WholeChunks, across_a_chunk
from bench.exact import SHORT, Exact
from bench.growth import linear, power, state_bytes
from bench.layer import KEY, LR, Layer, Leaving, Shape, fresh_state
from bench.official import official
from bench.results import ORDERED, RIVALS, held_against
from bench.training_products import TrainingProducts
from ttt_compiler.codegen import reference
from ttt_compiler.codegen.cpu import gemm, kept
from ttt_compiler.codegen.cpu.native import panels
from ttt_compiler.codegen.cpu.row import Row
from ttt_compiler.codegen.cpu.slots import RowMatrix
from ttt_compiler.codegen.layout import DONE, FACTORED, LEFT, spread_tokens
from ttt_compiler.errors import TTTError
from ttt_compiler.runtime.tables import bytes_per_sequence
from ttt_compiler.spec import CONV

from .models import VOCAB, converted


def test_the_gpu_benchmark_on_a_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "QUICK", ((48, 80, 100, 25),))
    given = ["gpu", "--device", "cpu", "--quick", "--dtype", "float32", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    gpu.main()
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    (layer,) = record["layers"]
    assert set(layer["forward"]) >= {"static", "ours", "official loop", "official training form"}
    assert layer["forward"]["static"]["ratio"] == 1.0
    assert layer["errors"]["ours"] < 1e-5
    assert {"torch", "triton", "commit", "device"} <= record["environment"].keys()


def test_no_number_from_a_wrong_result():
    h, t, w0 = torch.randn(1, 24, 16), torch.randn(1, 24, 8), torch.randn(8, 16)
    conv, proj = torch.randn(8, 1, 5), torch.randn(8, 8)
    args = (h, t, w0, conv, proj, 0.3, 8)

    def wrong(*given):
        return gpu.loop(*given) * 1.01

    assert gpu.gate(gpu.loop, args)["ours"] < 1e-5
    with pytest.raises(AssertionError, match="no timing"):
        gpu.gate(wrong, args)


def test_every_shape_is_timed_compiled():
    """Dynamo compiles one function for eight shapes at most, and then runs it as it is."""
    compiled = []
    make = torch.compile

    def counting(fn, **kwargs):
        def backend(graph, inputs):
            compiled.append(fn.__name__)
            return graph

        return make(fn, backend=backend, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", counting)
        for f in (32, 48, 64, 80):
            before = compiled.count("ours")
            gpu.one_layer((16, f, 40, 8), torch.float32, torch.device("cpu"), 2)
            assert compiled.count("ours") - before >= 3


def test_power_finds_the_exponent():
    assert power([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]) == pytest.approx({"exponent": 2.0, "r2": 1.0})
    assert power([1, 2, 4], [5.0, 5.0, 5.0])["exponent"] == pytest.approx(0.0)


def test_linear_finds_the_line():
    found = linear([0, 1, 2, 4], [1.0, 3.5, 6.0, 11.0])
    assert found == pytest.approx({"slope": 2.5, "intercept": 1.0, "r2": 1.0})
    assert linear([0, 1, 2], [0.0, 1.0, 0.0])["r2"] == pytest.approx(0.0)


def test_instructions_take_the_first_tool_that_counts(monkeypatch):
    there = {"perf": "3000,,instructions:u,1,100.00,,", "valgrind": "==7== Collected : 5000\n"}

    def run(command):
        return subprocess.CompletedProcess(command, 0, "", there[command[0]])

    monkeypatch.setattr(instructions, "_run", run)
    monkeypatch.setattr(instructions.shutil, "which", lambda name: name if name in there else None)
    assert instructions.counter()[0] == "perf"
    assert instructions.count(instructions.counter(), 1, 10) == 3000
    there["perf"] = "<not supported>,,instructions:u,0,100.00,,"
    assert instructions.counter()[0] == "valgrind"
    assert instructions.count(instructions.counter(), 1, 10) == 5000
    del there["valgrind"]
    with pytest.raises(TTTError, match="apt-get install valgrind"):
        instructions.counter()


def test_startup_cancels(monkeypatch):
    monkeypatch.setattr(instructions, "count", lambda tool, batch, steps: 10**9 + 7 * batch * steps)
    assert instructions.per_step(("perf",), 4, 100) == 28


def test_what_is_counted_runs():
    instructions.run(2, 3)


@pytest.mark.parametrize("tokens", [64, 70])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_prompt_whose_last_write_is_left_out_is_not_timed(monkeypatch, tokens, batch):
    """No output of a text of whole chunks shows it: W does."""
    layer = Layer(Shape(16, 48, tokens, 16, batch))
    runs = {"ours": competitors.running(layer), "official inference loop": competitors.looping(layer)}
    assert set(layer.gate(runs)) == {*runs, *(f"{name}: W" for name in runs)}
    write, last = Row._write, tokens // 16 - 1

    def skipping(row, h, t, end):
        if row.counts[DONE] == last:
            row.counts[DONE] += 1
        else:
            write(row, h, t, end)

    monkeypatch.setattr(Row, "_write", skipping)
    with pytest.raises(AssertionError, match="no timing"):
        layer.gate(runs)


def test_memory_of_a_state_is_a_sessions():
    shape = Shape(16, 48, 64, 16, 2)
    specs = fresh_state(16, 48, 16, 2, torch.float32).specs
    assert state_bytes(shape) == 2 * bytes_per_sequence(specs, torch.float32, spread=True)


def test_every_prompt_is_held_by_what_it_leaves():
    layer = Layer(Shape(16, 48, 64, 16, 2))
    assert all(isinstance(run, Leaving) for run in competitors.prefill(layer).values())


@pytest.mark.parametrize(("dtype", "error", "wrong"), [("float32", 1e-6, 1.001), ("bfloat16", 1e-2, 1.1)])
def test_a_floor_by_a_wrong_product_is_not_timed(dtype, error, wrong):
    layer = Layer(Shape(64, 96, 64, 16, 2, dtype))
    runs = competitors.libraries(layer)
    assert (ORDERED in runs) == (panels.shape_of(torch.empty(64, 96), layer.dtype) is not None)
    assert max(layer.gate_static(runs).values()) < error
    with pytest.raises(AssertionError, match="no timing"):
        layer.gate_static({name: (lambda run=run: run() * wrong) for name, run in runs.items()})


def test_gradients_that_are_no_numbers_are_not_timed():
    layer = Layer(Shape(16, 48, 40, 16))
    runs = {
        name: run for name, run in competitors.training(layer).items() if name == "official training form"
    }
    layer.gate_gradients(runs)
    (run,) = runs.values()
    with pytest.raises(AssertionError, match="no timing"):
        layer.gate_gradients({"wrong": lambda: [*run()[:-1], torch.full((16, 16), float("nan"))]})


# At a border, while a write is in progress, while v is made; a text too long to be kept.
@pytest.mark.parametrize("past", [16, 32, 33, 40, SHORT + 16])
def test_decode_on_wrong_fast_weights_is_not_timed(monkeypatch, past):
    place = Place(16, 48, 16, 2, past)
    assert set(Decoding(place).gate(1)) == {"ours", "ours: W"}
    write = RowMatrix.write
    monkeypatch.setattr(RowMatrix, "write", lambda w, v, *rest, **how: write(w, v * 1.01, *rest, **how))
    with pytest.raises(AssertionError, match="no timing"):
        Decoding(place).gate(1)


@pytest.mark.parametrize("row", [0, 1])
def test_decode_with_one_wrong_row_is_not_timed(row):
    """Each row has tokens, and a W, of its own."""
    decoding = Decoding(Place(16, 48, 16, 2, 32))
    first, second = decoding.matrices()
    assert not torch.allclose(first, second, rtol=0.1, atol=0.0)
    decoding.gate(1)
    decoding.site.w[row, 3, 5] += 0.01
    with pytest.raises(AssertionError, match="no timing"):
        decoding.gate(1)


def test_decode_stands_where_its_place_says():
    """A write is in progress behind a border that a single token crossed; later v is made again."""
    at, writing, making = (Decoding(Place(16, 48, 64, 2, n)) for n in (128, 130, 160))
    assert [x.decoded for x in (at, writing, making)] == [0, 3, 33]
    assert [all(x.state.column(KEY, LEFT)) for x in (at, writing, making)] == [False, True, False]
    assert [x.makes_v() for x in (at, writing, making)] == [False, False, True]
    assert not any(writing.state.column(KEY, FACTORED))


def test_a_border_that_writes_something_else_is_not_timed():
    decoding = Decoding(Place(16, 48, 64, 2, 64))
    clock = measure.clock_of(1)
    after = spread_tokens(decoding.spec) + 1
    steps = across_a_chunk(decoding, clock, 2, again=True)
    assert len(steps) == 64
    decoding.gate(after)
    # What the steps behind the border will write.
    decoding.state.sites[KEY].spread_values(1, 64)[0, 0] += 0.1
    with pytest.raises(AssertionError, match="no timing"):
        decoding.gate(after)


def test_whole_chunks_of_steps_are_held_after_the_timing():
    decoding = Decoding(Place(16, 48, 64, 2, 128))
    whole = WholeChunks(decoding, measure.clock_of(1))
    runs = whole.runs()
    for run in (*runs.values(), *runs.values()):
        run()
    errors = whole.gate()
    assert set(errors) == {"ours", "ours: W", f"{decode_layer.LOOP}: W"}
    assert decoding.state.tokens_seen == [256] * 2
    assert {name: [len(x) for x in taken] for name, taken in whole.taken.items()} == {
        name: [64, 64] for name in ("static", "ours", decode_layer.LOOP)
    }
    whole.loop.weights[1][0, 0] += 0.1
    with pytest.raises(AssertionError, match="no timing"):
        decoding.held_weights(decode_layer.LOOP, whole.loop.weights)


def test_exact_weights_are_the_specification():
    g = torch.Generator().manual_seed(0)
    w0, conv, proj, x, h, t = (
        torch.randn(*size, generator=g, dtype=torch.float64)
        for size in ((8, 12), (8, 1, 5), (8, 8), (2, 12, 3), (2, 21, 12), (2, 21, 8))
    )
    exact = Exact(w0, conv, proj, LR, 4, x)
    for start, stop in itertools.pairwise((0, 3, 4, 8, 12, 13, 15, 16, 20, 21)):
        exact.read(h[:, start:stop], t[:, start:stop])
    for b in range(2):
        w = reference.chunked(h[b], t[b], w0, conv, proj, LR, 4)[1]
        torch.testing.assert_close(exact.weight(b), w)
        torch.testing.assert_close(exact.products()[b], w @ x[b])


def test_a_training_steps_least_flops():
    shape = Shape(1024, 3072, 8192, 512)
    unit = shape.static_flops
    nu, tail = 15 / 16, 2
    # The last two chunks read each other: one write less, one read of C rows more.
    saved = 2.0 * 512 * (1024 * 3072 - 512 * (1024 + 3072))
    assert shape.training_flops() == pytest.approx(unit * (3 + 3 * nu) + nu * unit - saved)
    # From W0 alone every W is written again; with all kept, but the last two chunks' one, one read remains.
    again = 2.0 * 512 * (14 * 1024 * 3072 + 512 * (1024 + 3072))
    assert shape.training_flops_in_memory(0) == pytest.approx(shape.training_flops() + again)
    one_read = 2.0 * 512 * 512 * (1024 + 3072)
    assert shape.training_flops_in_memory(16 - tail) == pytest.approx(shape.training_flops() + one_read)
    costs = [shape.training_flops_in_memory(kept) for kept in range(16)]
    assert costs == sorted(costs, reverse=True)


@pytest.fixture
def pair(monkeypatch):
    """A tiny model as we run it, and as the official algorithm does."""
    monkeypatch.setattr(decode, "TOKENS", VOCAB)
    fast = converted(layers="all", chunk_size=16, lr=0.3)
    layers = [int(s.key.split(".")[2]) for s in ttt.Session(fast).state.specs]
    published = official(fast, layers, 16, 0.3)
    fast.compile(backend="inplace_ttt_eager")
    with torch.no_grad():
        yield fast, published


def test_a_model_is_held_token_by_token(pair):
    assert decode.gate(*pair, 16) < 1e-4


@pytest.mark.parametrize("call", [1, 8, 9, 11])
def test_a_model_with_one_wrong_call_is_not_timed(monkeypatch, pair, call):
    """Single tokens before and behind the border, the longer call, and a token after it."""
    seen, read = itertools.count(), decode.Decoder.read
    monkeypatch.setattr(
        decode.Decoder, "read", lambda *given: read(*given) * (1.01 if next(seen) == call else 1.0)
    )
    with pytest.raises(AssertionError, match="no timing"):
        decode.gate(*pair, 16)


def test_a_model_that_writes_nothing_is_not_timed(pair):
    fast, published = pair
    for name, p in (*fast.named_parameters(), *published.named_parameters()):
        if name.endswith(CONV):
            p.zero_()
    with pytest.raises(AssertionError, match="no timing"):
        decode.gate(fast, published, 16)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, 192, 1024, 128),
        Shape(64, 192, 1000, 128, 2),
        Shape(64, 192, 1024, 32),
        Shape(64, 64, 96, 64),
    ],
)
def test_products_of_a_training_step_are_all_of_its_flops(shape, monkeypatch):
    """What bounds a training step makes as many FLOPs as the form with so many kept matrices has."""
    made = []

    def counted(owner, name, flops):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **named: made.append(flops(*a)) or call(*a, **named))

    counted(gemm, "project", lambda x, p, out, name: 2 * len(x) * p.numel())
    counted(gemm, "add_product", lambda h, k, v, out, name: 2 * len(h) * len(k) * (h.shape[1] + v.shape[1]))
    counted(gemm.FastMatrix, "write", lambda _, v, h: 2 * len(v) * v.shape[1] * h.shape[1])
    counted(gemm.FastMatrix, "apply", lambda _, h, bias, out: 2 * h.numel() * out.shape[1])
    counted(gemm.FastMatrix, "apply_transposed", lambda _, x, out: 2 * x.numel() * out.shape[1])
    TrainingProducts(Layer(shape))()
    count = kept.count(shape.batch, shape.tokens, shape.chunk, shape.d, shape.f, torch.float32)
    assert sum(made) == pytest.approx(shape.training_flops_in_memory(count))


def test_a_form_without_a_state_is_held_against_one_without():
    assert held_against("official training form @ 512", RIVALS) == "ours, no state @ 512"
    assert held_against("official inference loop @ 512", RIVALS) == "ours @ 512"
    assert held_against("official training form", {}) == "ours"
