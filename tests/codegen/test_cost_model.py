"""Closed forms against counts by hand and torch's own counter; order, limits and monotony of predictions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.cost_model import SHAPES, spearman
from ttt_compiler.codegen import decode_cost, forms, forms_cpu, training_cost
from ttt_compiler.codegen.calibrate import this_cpu
from ttt_compiler.codegen.cost_model import rank_scan_configs
from ttt_compiler.codegen.decode_cost import DecodeShape
from ttt_compiler.codegen.devices import A100, DEVICES, H100, MI300X, Device
from ttt_compiler.codegen.forms import ScanShape
from ttt_compiler.codegen.kernels.tiles import GRADIENT, SCAN
from ttt_compiler.codegen.on_chip import (
    ScanConfig,
    on_chip,
    resident,
    shared_bytes,
    shipped_configs,
    thread_registers,
    why_not,
    workspace_bytes,
)
from ttt_compiler.codegen.phases import LIMITS, Phase, cost_of, filled, gemm
from ttt_compiler.errors import UnsupportedDeviceError

SHAPE = ScanShape(tokens=96, d_model=8, d_ff=12, chunk=16, batch=2, dtype=torch.float32)
BIG = ScanShape(tokens=32768, d_model=2560, d_ff=9728, chunk=1024)
TILES = ScanConfig(64, 64, 256, 8, 2)


def flops(phases: tuple[Phase, ...]) -> float:
    return sum(p.flops for p in phases)


def seconds(phases: tuple[Phase, ...], device: Device = H100) -> float:
    return cost_of(phases, device).seconds


def named(phases: tuple[Phase, ...], name: str) -> Phase:
    (phase,) = (p for p in phases if p.name == name)
    return phase


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def configs_of(device: Device) -> tuple[ScanConfig, ...]:
    """Whatever is shipped for ``BIG``."""
    found = (shipped_configs(device.arch, BIG.dtype, use, BIG.d_ff) for use in (SCAN, GRADIENT))
    return tuple(dict.fromkeys(c for configs in found for c in configs))


# --- counts ----------------------------------------------------------------------------------------------


def test_shape_counts_by_hand():
    assert (SHAPE.chunks, SHAPE.writes, SHAPE.unit) == (6, 5, 2 * 2 * 96 * 8 * 12)
    assert replace(SHAPE, final=True).writes == 6
    tail = replace(SHAPE, tokens=90)
    assert (tail.chunks, tail.writes, replace(tail, final=True).writes) == (6, 5, 5)
    assert SHAPE.flops == SHAPE.unit * (1 + 5 / 6)
    assert (SHAPE.turned.d_model, SHAPE.turned.d_ff, SHAPE.turned.unit) == (12, 8, SHAPE.unit)
    assert (BIG.state_itemsize, replace(BIG, dtype=torch.float64).state_itemsize) == (4, 8)


@pytest.mark.parametrize("field", ["tokens", "d_model", "d_ff", "chunk", "batch"])
def test_a_shape_has_no_empty_side(field: str):
    with pytest.raises(ValueError, match=f"{field}=0"):
        replace(SHAPE, **{field: 0})


def scan_inputs(shape: ScanShape):
    sides = ((shape.tokens, shape.d_ff), (shape.tokens, shape.d_model), (shape.d_model, shape.d_ff))
    h, v, w = (torch.empty(*side, device="meta", requires_grad=True) for side in sides)
    return h.expand(shape.batch, -1, -1), v.expand(shape.batch, -1, -1), w


def test_static_and_two_gemm_flops_are_torchs():
    h, v, w = scan_inputs(SHAPE)

    def loop():
        state = w.expand(SHAPE.batch, -1, -1)
        parts = zip(h.split(SHAPE.chunk, 1), v.split(SHAPE.chunk, 1), strict=True)
        for i, (hi, vi) in enumerate(parts):
            torch.bmm(hi, state.transpose(1, 2))
            if i < SHAPE.writes:
                state = torch.baddbmm(state, vi.transpose(1, 2), hi)

    assert counted(loop) == flops(forms.two_gemm(SHAPE, H100)) == SHAPE.flops
    assert counted(lambda: h.reshape(-1, SHAPE.d_ff) @ w.t()) == flops(forms.static(SHAPE, H100))


def test_dual_flops_are_torchs():
    h, v, w = scan_inputs(SHAPE)

    def dual():
        h.reshape(-1, SHAPE.d_ff) @ w.t()
        for i in range(1, SHAPE.chunks):
            rows, keys = slice(i * SHAPE.chunk, (i + 1) * SHAPE.chunk), slice(0, i * SHAPE.chunk)
            scores = torch.bmm(h[:, rows], h[:, keys].transpose(1, 2))
            torch.bmm(scores, v[:, keys])

    assert counted(dual) == flops(forms.dual(SHAPE, H100))
    n, c = SHAPE.chunks, SHAPE.chunk
    pairs = SHAPE.batch * c * c * n * (n - 1) / 2
    assert flops(forms.dual(SHAPE, H100)) == SHAPE.unit + 2 * pairs * (SHAPE.d_model + SHAPE.d_ff)


def stacked(h, v, w):
    batch, n = SHAPE.batch, SHAPE.chunks
    hc = h.reshape(batch, n, SHAPE.chunk, -1)
    vc = v.reshape(batch, n, SHAPE.chunk, -1)[:, :-1].flatten(0, 1)
    delta = torch.bmm(vc.transpose(1, 2), hc[:, :-1].flatten(0, 1)).view(batch, n - 1, *w.shape)
    weights = torch.cat([w.expand(batch, 1, *w.shape), delta], 1).cumsum(1)
    return torch.bmm(hc.flatten(0, 1), weights.flatten(0, 1).transpose(1, 2))


def test_stacked_flops_are_torchs_forward_and_backward():
    assert counted(lambda: stacked(*scan_inputs(SHAPE))) == flops(forms.stacked_cumsum(SHAPE, H100))
    official, _ = training_cost.stacked_step(SHAPE, H100)
    assert counted(lambda: stacked(*scan_inputs(SHAPE)).sum().backward()) == flops(official)


def test_training_flops():
    h, _, w = scan_inputs(SHAPE)
    static = training_cost.static_step(SHAPE, H100)
    assert counted(lambda: (h.reshape(-1, SHAPE.d_ff) @ w.t()).sum().backward()) == flops(static)
    assert flops(static) == 3 * SHAPE.unit

    def scan(shape: ScanShape, device: Device) -> tuple[tuple[Phase, ...], int]:
        return forms.two_gemm(shape, device), shape.tokens

    ours, workspace = training_cost.our_step(SHAPE, H100, scan)
    # Forward, dh, and the two reverse scans; the one that yields dW0 writes its last chunk too.
    assert flops(ours) == pytest.approx(SHAPE.unit * (3 * (1 + 5 / 6) + 2))
    assert workspace == SHAPE.tokens
    many = replace(SHAPE, tokens=16 * 4096)
    assert flops(training_cost.our_step(many, H100, scan)[0]) / many.unit == pytest.approx(8, rel=1e-3)


def test_values_count_conv_and_projection():
    conv, proj = forms.values(SHAPE, H100, d_target=6)
    assert conv.hbm == 2 * SHAPE.batch * SHAPE.tokens * 6 * 4
    assert conv.flops == 2 * 5 * SHAPE.batch * SHAPE.tokens * 6
    assert proj.flops == 2 * SHAPE.batch * SHAPE.tokens * 8 * 6
    assert len(forms.values(SHAPE, H100, proj=False)) == 1
    assert len(training_cost.values_step(SHAPE, H100)) == 6


def test_two_gemm_bytes_by_hand():
    phases = forms.two_gemm(BIG, H100)
    n, matrix = 32, 2560 * 9728
    rows = 1024 * (2560 + 9728) * 2
    assert named(phases, "apply").hbm == n * (rows + 2 * matrix)
    assert named(phases, "write").hbm == (n - 1) * (rows + 8 * matrix)
    assert named(phases, "copy").hbm == (n - 1) * 6 * matrix
    assert [p.launches for p in phases] == [n, n - 1, n - 1]
    narrow = forms.two_gemm(BIG, H100, state_itemsize=2)
    assert [p.name for p in narrow] == ["apply", "write"]
    assert named(narrow, "write").hbm == (n - 1) * (rows + 4 * matrix)
    assert len(forms.two_gemm(replace(BIG, chunk=BIG.tokens), H100)) == 1


def test_a_state_that_fits_the_cache_leaves_memory_alone():
    small = replace(BIG, d_model=1024, d_ff=3072)
    write = named(forms.two_gemm(small, H100), "write")
    assert write.l2 == 31 * 8 * 1024 * 3072
    assert write.hbm == 31 * 1024 * (1024 + 3072) * 2


def test_stacks_by_hand():
    matrix = 2560 * 9728 * 2
    assert forms.stack_bytes(BIG, training=False) == 3 * 32 * matrix
    assert forms.stack_bytes(BIG, training=True) == 4 * 32 * matrix
    assert named(forms.stacked_cumsum(BIG, H100), "concatenate").hbm == 63 * matrix
    assert named(forms.stacked_cumsum(BIG, H100), "sum").hbm == 64 * matrix
    assert training_cost.saved_bytes(BIG, H100) == 32768 * 2560 * 2
    assert training_cost.saved_bytes(BIG, H100, stacked=True) == 32768 * 2560 * 2 + 32 * matrix


def test_on_chip_bytes_and_limits_by_hand():
    scan, total = on_chip(BIG, H100, TILES)
    d_tiles, f_tiles, rounds = 40, 38, 19
    keys, targets, outputs = 32768 * 9728 * 2, 32768 * 2560 * 2, 32768 * 2560 * 4
    partials = 2 * f_tiles * outputs - 2 * outputs
    assert scan.l2 == d_tiles * keys + f_tiles * targets + partials
    # h once, v once per tile of a group, W0 once, and partial sums that no cache holds.
    assert scan.hbm == keys + rounds * targets + 2560 * 9728 * 2 + partials
    assert total.hbm == 2 * outputs + targets
    assert scan.flops == BIG.flops
    assert workspace_bytes(TILES, BIG) == 2 * outputs
    with_state = on_chip(replace(BIG, final=True), H100, TILES)[0]
    assert with_state.hbm - scan.hbm == 4 * 2560 * 9728


def test_on_chip_capacity_by_hand():
    assert shared_bytes(TILES, BIG) == (64 * 256 + 2 * 64 * (256 + 64)) * 2
    assert thread_registers(TILES, H100) == (64 * 256 + 64 * 64) // 256 + 40
    assert resident(TILES, BIG, H100) == 2
    assert shared_bytes(TILES, replace(BIG, apart=True)) > shared_bytes(TILES, BIG)


@pytest.mark.parametrize(
    ("config", "device", "reason"),
    [
        (ScanConfig(64, 64, 512, 4), H100, "registers per thread"),
        (ScanConfig(128, 64, 256, 8), MI300X, "shared memory"),
        (ScanConfig(48, 64, 256), H100, "power of two"),
        (ScanConfig(64, 8, 256), H100, "at least 16"),
        (ScanConfig(64, 64, 256, 8, 64), H100, "groups share 38 tiles"),
    ],
    ids=["registers", "shared", "odd", "tiny", "groups"],
)
def test_what_cannot_run_says_why(config: ScanConfig, device: Device, reason: str):
    assert reason in (why_not(config, BIG, device) or "")
    with pytest.raises(ValueError, match=reason):
        on_chip(BIG, device, config)


# --- the machine -----------------------------------------------------------------------------------------


def test_a_phase_takes_as_long_as_its_slowest_part():
    phase = Phase("p", flops=1, seconds=1e-3, hbm=1e-3 * H100.hbm_reached / 2, l2=0, launches=1)
    cost = cost_of([phase], H100)
    assert cost.seconds == pytest.approx(1e-3 + H100.launch)
    assert cost.limit == "compute"
    assert cost_of([replace(phase, hbm=4 * phase.hbm)], H100).limit == "hbm"
    assert cost_of([replace(phase, l2=2e-3 * H100.l2_reached)], H100).limit == "l2"
    assert cost_of([replace(phase, seconds=0, hbm=0, launches=5)], H100, recorded=True).limit == "launch"
    many = cost_of([replace(phase, launches=5000, seconds=1e-4, hbm=0)], H100)
    assert (many.limit, many.seconds) == ("host", 5000 * H100.host)
    assert set(LIMITS) == {"compute", "hbm", "l2", "launch", "host"}


def test_a_core_adds_what_a_gpu_overlaps():
    core = replace(H100, overlaps=False)
    phase = Phase("p", seconds=1e-3, hbm=1e-3 * H100.hbm_reached, launches=10)
    assert cost_of([phase], core).seconds == pytest.approx(2e-3 + 10 * (core.launch + core.host))
    assert sum(s for _, s in cost_of([phase], core).by_limit) == pytest.approx(cost_of([phase], core).seconds)


def test_filled_counts_waves_and_padding():
    whole = filled(H100, 128 * 132, 256, 256)
    assert whole == 1.0
    assert filled(H100, 128 * 133, 256, 256) < 0.8
    assert filled(H100, 100, 2560, 9728) < filled(H100, 1000, 2560, 9728) < 1
    assert filled(replace(H100, overlaps=False), 1, 1, 1) == 1.0


def test_gemm_bytes_and_rate():
    phase = gemm("g", H100, torch.bfloat16, 128 * 132, 256, 256)
    assert phase.hbm == 2 * (128 * 132 * 256 * 2 + 256 * 256)
    assert phase.flops / phase.seconds == pytest.approx(H100.gemm.value * H100.peak(torch.bfloat16))
    with pytest.raises(UnsupportedDeviceError):
        gemm("g", H100, torch.int8, 1, 1, 1)


# --- predictions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
@pytest.mark.parametrize("field", ["tokens", "d_model", "d_ff", "batch"])
def test_more_work_takes_longer(device: Device, field: str):
    more = replace(BIG, **{field: 2 * getattr(BIG, field)})
    for form in (forms.static, forms.two_gemm, forms.stacked_cumsum, forms.dual):
        assert seconds(form(more, device), device) > seconds(form(BIG, device), device)
    config = ScanConfig(32, 64, 128, 8)
    assert seconds(on_chip(more, device, config), device) > seconds(on_chip(BIG, device, config), device)


def test_shorter_chunks_cost_two_gemms_and_stacks_more_and_our_kernel_nothing():
    times = {
        chunk: [
            seconds(phases)
            for phases in (
                forms.two_gemm(replace(BIG, chunk=chunk), H100),
                forms.stacked_cumsum(replace(BIG, chunk=chunk), H100),
                on_chip(replace(BIG, chunk=chunk, final=True), H100, TILES),
            )
        ]
        for chunk in (256, 1024, 4096)
    }
    assert times[256][0] > times[1024][0] > times[4096][0]
    assert times[256][1] > times[1024][1] > times[4096][1]
    assert times[256][2] == pytest.approx(times[4096][2], rel=0.01)


def test_the_order_of_two_gemm_and_our_kernel_turns_with_the_chunk():
    def first(chunk):
        ranked = rank_scan_configs(replace(BIG, chunk=chunk), H100, configs_of(H100))
        return next(c.form for c in ranked if c.form != "dual")

    first = {chunk: first(chunk) for chunk in (128, 8192)}
    assert first == {128: "on_chip", 8192: "two_gemm"}


def test_ranking_is_sorted_complete_and_stable():
    configs, short = configs_of(A100), replace(BIG, chunk=128)
    ranked = rank_scan_configs(short, A100, configs)
    times = [choice.cost.seconds for choice in ranked]
    assert times == sorted(times)
    running = [c for c in configs if why_not(c, short, A100) is None]
    assert sorted(map(repr, running)) == sorted(repr(c.config) for c in ranked if c.form == "on_chip")
    assert {c.form for c in ranked} == {"on_chip", "two_gemm", "dual"}
    assert [c.config for c in ranked] == [c.config for c in rank_scan_configs(short, A100, configs)]
    assert all(c.cost.limit in LIMITS and c.workspace > 0 for c in ranked)
    assert rank_scan_configs(short, A100, [])[0].config is None


def test_uneven_waves_cost_more_than_even_ones():
    # 40 tiles of D: with 3 groups 120 programs share 132 SMs, with 4 some SMs get two of 160.
    one = replace(TILES, bf=512, groups=3)
    assert resident(one, BIG, H100) == 1
    busy = [named(on_chip(BIG, H100, replace(one, groups=g)), "scan").seconds for g in (3, 4)]
    assert busy[0] < busy[1]


def test_spans_are_multiples_of_chunks_and_the_best_is_no_worse():
    span = forms.best_span(BIG, H100)
    assert span % BIG.chunk == 0
    best = seconds(forms.dual(BIG, H100, span=span))
    assert best <= seconds(forms.dual(BIG, H100, span=BIG.chunk))
    assert best <= seconds(forms.dual(BIG, H100))
    assert flops(forms.dual(BIG, H100, span=BIG.chunk)) == flops(forms.two_gemm(BIG, H100))
    with pytest.raises(ValueError, match="multiple of the chunk"):
        forms.dual(BIG, H100, span=1500)


# --- decode ----------------------------------------------------------------------------------------------


def test_decode_bytes_by_hand():
    shape = DecodeShape(batch=4, written=100, d_model=2560, d_ff=9728, chunk=1024)
    matrix, rows = 2560 * 9728, 2560 + 9728
    assert sum(p.hbm for p in decode_cost.static(shape, H100)) == 2 * matrix
    dense = {p.name: p for p in decode_cost.dense(shape, H100)}
    assert dense["W"].hbm == 4 * 4 * matrix
    assert dense["tail"].hbm == 4 * rows * 2
    assert dense["write"].hbm == pytest.approx(4 * (8 * matrix / 1024 + 2 * rows))
    assert dense["write"].flops == 2 * 4 * matrix
    factored = {p.name: p for p in decode_cost.factored(shape, H100)}
    assert factored["W0"].hbm == 2 * matrix
    assert factored["tokens"].hbm == 4 * 100 * rows * 2


def test_decode_chooses_by_written_tokens():
    shape = DecodeShape(batch=8, written=0, d_model=2560, d_ff=9728, chunk=1024)
    assert decode_cost.choose(shape, H100)[0] == "static"
    assert decode_cost.choose(replace(shape, written=1024), H100)[0] == "factored"
    assert decode_cost.choose(replace(shape, written=65536), H100)[0] == "dense"
    assert decode_cost.crossover(1, 2560, 9728) == 0
    assert decode_cost.crossover(8, 2560, 9728) == pytest.approx(7 / 8 * 2560 * 9728 / 12288)


# --- this processor --------------------------------------------------------------------------------------


def test_the_loop_of_this_processor_by_hand(monkeypatch):
    # First a processor that multiplies every dtype by its own units.
    monkeypatch.setattr(forms_cpu, "product_dtype", lambda dtype: dtype)
    monkeypatch.setattr(forms_cpu, "writes_blocks", lambda dtype: False)
    device = replace(this_cpu(), l2=0)
    shape = ScanShape(tokens=100, d_model=8, d_ff=12, chunk=32, dtype=torch.float32)
    phases = {p.name: p for p in forms_cpu.recurrent(shape, device)}
    assert phases["apply"].flops == 2 * 100 * 96
    assert phases["apply"].hbm == (100 * 20 + 4 * 96) * 4
    assert phases["write"].flops == 2 * 96 * 96
    assert phases["write"].hbm == 3 * 96 * 8
    assert phases["finite"].hbm == 96 * 20 * 4
    narrow = {p.name: p for p in forms_cpu.recurrent(replace(shape, dtype=torch.bfloat16), device)}
    assert set(narrow) == {"apply", "finite", "increment", "add", "copy"}
    assert narrow["add"].hbm == 3 * 96 * 10
    few = {p.name for p in forms_cpu.recurrent(replace(shape, dtype=torch.bfloat16, chunk=8), device)}
    assert "copy" not in few
    assert {p.name for p in forms_cpu.recurrent(replace(shape, chunk=100), device)} == {"apply"}
    # A state in the core's own cache does not move.
    kept = {p.name: p for p in forms_cpu.recurrent(shape, replace(device, l2=2**20))}
    assert kept["write"].hbm == 0
    # Writes in blocks read and write the state once, and leave the narrow copy on the way.
    monkeypatch.setattr(forms_cpu, "writes_blocks", lambda dtype: True)
    blocks = {p.name: p for p in forms_cpu.recurrent(replace(shape, dtype=torch.bfloat16), device)}
    assert set(blocks) == {"apply", "finite", "write"}
    assert blocks["write"].hbm == 3 * 96 * 10
    # Then one that multiplies in fp32: h is widened twice, v once, y is narrowed once.
    monkeypatch.setattr(forms_cpu, "product_dtype", lambda dtype: torch.float32)
    wide = {p.name: p for p in forms_cpu.recurrent(replace(shape, dtype=torch.bfloat16), device)}
    assert set(wide) == {"apply", "finite", "write", "widen"}
    assert wide["apply"] == phases["apply"]
    assert wide["widen"].hbm == 100 * 2 * 20 * (2 + 4)


def test_the_loop_is_the_one_choice_of_a_processor_besides_dual():
    device = this_cpu()
    shape = ScanShape(2048, 1024, 3072, 512, dtype=torch.float32)
    assert shipped_configs(device.arch, shape.dtype, SCAN, shape.d_ff) == ()
    assert "no GPU kernel" in (why_not(TILES, shape, device) or "")
    ranked = rank_scan_configs(shape, device, [TILES])
    assert {c.form for c in ranked} <= {"recurrent", "dual"}
    phases, state = training_cost.our_step(shape, device, lambda s, d: ((), 0))
    # 2 - 1/n forward; 5 backward: W of every chunk applied, v S, h S^T, and a write of every chunk. One W of
    # four is kept and two last chunks read each other, so that W takes two reads and no write.
    n = shape.chunks
    reads = 2 * 2 * 512**2 * (1024 + 3072) / shape.unit
    assert flops(phases) / shape.unit == pytest.approx(2 - 1 / n + 4 + reads)
    assert state == 2 * 1024 * 3072 * 4
    assert training_cost.saved_bytes(shape, device) == 2048 * 1024 * 4 + 1024 * 3072 * 4


def test_the_benchmark_has_enough_shapes_and_ranks_right():
    assert len(SHAPES) == len(set(SHAPES)) >= 20
    assert spearman([1, 2, 3], [10, 20, 30]) == 1
    assert spearman([1, 2, 3], [30, 20, 10]) == -1
