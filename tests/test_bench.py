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
