"""A call of one token: plan, keep, read, and write when a chunk is full.

Every launch is made in every step: 14 with R = 0, three more with R > 0; one or two more per pass over v
under a limit. What a step does not need, its programs find out from the plan and exit.

Per step, for B rows of which M read a matrix of their own and the others N factored tokens each, with e bytes
an operand: ``4 M D F`` bytes of W, ``e D F`` of W0 once unless M = B, ``e (B - M) N (D + F)`` of factored
rows; ``2 M D F + 2 (B - M) (D F + N (D + F))`` FLOPs. W is read in fp32: where operands are bf16 that is
twice the bytes of a rounded copy. May be changed here: the order of launches, and schedules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen.gpu.schedules import blocks_for, interpreted, programs_per_row, write_tile_for
from ttt_compiler.codegen.kernels.append_tail import append_tail
from ttt_compiler.codegen.kernels.base_apply import base_apply
from ttt_compiler.codegen.kernels.decode_finish import decode_finish
from ttt_compiler.codegen.kernels.decode_plan import NEED_BASE, decode_plan
from ttt_compiler.codegen.kernels.decode_read import decode_read
from ttt_compiler.codegen.kernels.decode_values import decode_values
from ttt_compiler.codegen.kernels.factor_rows import factor_rows
from ttt_compiler.codegen.kernels.own_slot import own_slot
from ttt_compiler.codegen.kernels.write_chunks import Keys, write_chunks
from ttt_compiler.codegen.layout import StateTensors, factored_limit
from ttt_compiler.codegen.reference import TINY
from ttt_compiler.spec import SiteSpec


def decode_step(
    h: Tensor,
    t: Tensor,
    w0: Tensor,
    bias: Tensor | None,
    conv: Tensor,
    proj: Tensor | None,
    pos: Tensor | None,
    spec: SiteSpec,
    state: StateTensors,
    batch: Tensor,
) -> Tensor:
    """Arguments and result of :func:`ttt_compiler.codegen.cpu.step.fast_weight_step`, with T = 1."""
    count, chunk, rule = len(batch), spec.chunk, spec.rule
    narrow = state.tail_v.dtype != state.w.dtype
    if spec.lr == 0.0:
        still = torch.ones((), dtype=torch.bool, device=h.device)
    else:
        still = ~conv.any()
    plan, slot_jobs, write_jobs, token, entry = decode_plan(
        state,
        batch,
        pos,
        still,
        chunk,
        # As on CPU: decay multiplies what is stored, and a narrow factored row would round it away.
        0 if rule.decay != 1.0 and narrow else factored_limit(spec.d_model, spec.d_ff, count),
        decays=rule.decay != 1.0,
    )
    append_tail(h, state.tail_h, token, entry)
    append_tail(t, state.tail_t, token, entry)

    programs, blocks = programs_per_row(h), blocks_for(h, state.tail_h)
    conv = conv.contiguous()

    def values(v: Tensor, *, cache: bool) -> Tensor:
        return decode_values(v, w0, conv, proj, spec, state, plan, write_jobs, blocks, cache=cache, tiny=TINY)

    if state.capacity > chunk:
        values(state.tail_v, cache=True)
    if spec.lr == 0.0:
        # The base model's own projection, bit for bit. Nothing was or will be written.
        y = torch.nn.functional.linear(h[:, 0], w0, bias)
    else:
        y = _read(h[:, 0], w0, bias, state, plan, chunk, rule.decay, small=interpreted(h))
    v = h.new_empty(count, chunk, spec.d_model)
    verdict = values(v, cache=False)
    staged = own_slot(state.w, state.tail_h.dtype, slot_jobs, programs)
    factor_rows(state, v, plan, write_jobs, chunk, programs, decay=rule.decay)
    keys = Keys(state.tail_h, state.lanes if state.lanes.shape[1] else None)
    write_chunks(
        state.w, w0, keys, v, staged, write_jobs, chunk, write_tile_for(h), programs, decay=rule.decay
    )
    decode_finish(state, plan, verdict, chunk)
    return y[:, None]


def _read(
    h: Tensor,
    w0: Tensor,
    bias: Tensor | None,
    state: StateTensors,
    plan: Tensor,
    chunk: int,
    decay: float,
    *,
    small: bool,
) -> Tensor:
    tokens = max(16, min(64, 1 << (len(h) - 1).bit_length()))
    outer, inner = (16, 64) if small else (16, 256)
    # A narrow output alone would leave most of the device idle.
    shares = 2 if small else max(1, 264 * outer // w0.shape[0])
    need = plan[:, NEED_BASE].contiguous()
    # 256 bytes of a row at a time, by four programs a processor: with fewer, memory waits for them.
    depth = inner // 2 if small else 256 // h.dtype.itemsize
    # Products of fp32 would spill there.
    wide = not small and h.dtype.itemsize == 2
    edge = 32 if wide else outer
    parts = max(1, min(8, 528 * edge // w0.shape[0])) if wide else shares
    base = base_apply(h, w0, need, tokens=tokens, outer=edge, inner=depth, shares=parts)
    return decode_read(
        h, base, bias, state, plan, chunk, decay=decay, shares=shares, outer=outer, inner=inner, tokens=16
    )
