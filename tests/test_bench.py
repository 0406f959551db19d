"""What benchmarks compute: the GPU's gate and record, seen on a processor; fits; counted instructions."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from bench import gpu, instructions
from bench.growth import linear, power
from ttt_compiler.errors import TTTError


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
