"""The benchmark for GPUs runs on a processor too, where its gate and its record can be seen."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bench import gpu


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
