"""Device facts are plausible, complete and reasoned; this machine's processor is measured once."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ttt_compiler.codegen import calibrate
from ttt_compiler.codegen.devices import (
    A100,
    B200,
    DEVICES,
    H100,
    H200,
    H800,
    MI300X,
    Device,
    Fraction,
    device_named,
    device_of,
)
from ttt_compiler.errors import UnsupportedDeviceError

FRACTIONS = ("gemm", "scan", "attention", "hbm_part", "l2_part")


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_units_are_plausible(device: Device):
    assert 1e14 < device.peak(torch.bfloat16) < 1e16
    assert device.peak(torch.float16) == device.peak(torch.bfloat16) > device.peak(torch.float32)
    assert 1e12 < device.hbm < device.l2_rate < 1e14
    assert 32 * 2**20 <= device.l2 < 2**30 < device.memory
    assert 100 <= device.sms <= 400
    assert 1e9 < device.clock < 3e9
    assert 2**16 <= device.shared_block <= device.shared <= 2**18
    assert 1e-7 < device.step < device.launch < device.host < 1e-4
    # What matrix units need is what registers and shared memory can hold: no tile is larger than its SM.
    assert device.registers * 4 >= device.shared


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_every_fraction_has_a_reason_and_every_device_sources(device: Device):
    assert all(len(getattr(device, name).reason) > 10 for name in FRACTIONS)
    assert device.sources
    assert device.hbm_reached == device.hbm * device.hbm_part.value < device.hbm
    assert device.l2_reached < device.l2_rate


def test_published_relations():
    assert H200.peaks == H100.peaks == H800.peaks
    assert H200.hbm > H100.hbm == H800.hbm
    per_clock = H100.peak(torch.bfloat16) / H100.sms / H100.clock
    assert per_clock == pytest.approx(4096, rel=0.01)  # dense bf16 FLOPs of a Hopper SM
    assert A100.peak(torch.bfloat16) / A100.sms / A100.clock == pytest.approx(2048, rel=0.01)
    assert MI300X.peak(torch.bfloat16) / MI300X.sms / MI300X.clock == pytest.approx(2048, rel=0.01)
    assert B200.peak(torch.bfloat16) > 2 * H100.peak(torch.bfloat16)


@pytest.mark.parametrize("value", [0.0, -0.1, 1.01])
def test_a_fraction_is_a_fraction(value: float):
    with pytest.raises(ValueError, match="fraction of a peak"):
        Fraction(value, "no reason")


def test_names():
    assert device_named("h100") is H100
    assert device_of("NVIDIA H100 80GB HBM3") is H100
    assert device_of("NVIDIA H200") is H200
    assert device_of("AMD Instinct MI300X") is MI300X
    assert device_of("NVIDIA GeForce RTX 4090") is None
    with pytest.raises(UnsupportedDeviceError, match=r"'TPU'.*A100, H100.*cpu"):
        device_named("TPU")
    with pytest.raises(UnsupportedDeviceError, match=r"int8.*bfloat16"):
        H100.peak(torch.int8)


def test_facts_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        H100.sms = 1  # type: ignore[misc]


def test_this_cpu_is_measured_once_and_in_units():
    calibrate.this_cpu.cache_clear()
    device = device_named("cpu")
    assert device_named("CPU") is device
    assert not device.overlaps
    assert set(device.peaks) == {torch.float32, torch.bfloat16, torch.float64}
    # A core of the last fifteen years; the point is that nothing is off by a unit.
    assert all(1e9 < rate < 1e14 for rate in (*device.peaks.values(), *device.variants.values()))
    assert 1e8 < device.hbm < 1e12
    assert 1e-8 < device.host < 1e-3
    assert device.peaks[torch.float32] == device.variants["float32 apply"]


def test_an_unknown_private_cache_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(calibrate, "Path", lambda _: tmp_path / "size")
    assert calibrate._private_cache() == 0
    (tmp_path / "size").write_text("2048K\n")
    assert calibrate._private_cache() == 2 * 2**20
    (tmp_path / "size").write_text("much")
    assert calibrate._private_cache() == 0
