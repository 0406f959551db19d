"""What only a GPU can show; `nox -s gpu` runs this there. Elsewhere everything here is skipped.

Kernels are compiled here, so the process must not be interpreted: TRITON_INTERPRET=0.
"""

from __future__ import annotations

import os

import pytest
import torch
from transformers import StaticCache

import ttt_compiler as ttt
from tests import models
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "0",
    reason="needs a CUDA device and TRITON_INTERPRET=0",
)
CONFIG = ttt.TTTConfig(layers="all", chunk_size=16, lr=0.3)
# Of the largest logit, in fp32 without tf32: other kernels, other orders of sums, two layers.
CLOSE = 1e-4


def pair(dtype=torch.float32):
    """The same converted model on the GPU, compiled, and in fp64 on the CPU, for the reference."""
    wide = models.randomize(ttt.convert(models.tiny(dtype=torch.float64), CONFIG))
    here = ttt.convert(models.tiny(dtype=dtype), CONFIG)
    here.load_state_dict(wide.state_dict())
    here = here.to("cuda")
    here.compile(backend="inplace_ttt")
    return here, wide


@pytest.mark.parametrize("length", [7, 16, 61])
def test_forward(length):
    here, wide = pair()
    ids = models.ids(2, length)
    with torch.no_grad():
        y = here(ids.cuda(), use_cache=False).logits.cpu()
        assert relative_error(y, models.oracle(wide, ids)) < CLOSE


def test_gradients():
    here, wide = pair()
    ids = models.ids(2, 61)
    here(ids.cuda(), use_cache=False).logits.square().mean().backward()
    theirs = models.oracle_gradients(wide, ids)
    for name, p in here.named_parameters():
        assert relative_error(p.grad.cpu(), theirs[name]) < 1e-3, name


def test_prefill_and_decode():
    here, wide = pair()
    ids = models.ids(2, 61)
    session = ttt.Session(here, 2)
    parts = []
    with torch.no_grad():
        for start, stop in ((0, 5), (5, 40), *((i, i + 1) for i in range(40, 61))):
            part = ids[:, start:stop].cuda()
            parts.append(here(part, past_key_values=session.cache).logits.cpu())
        assert relative_error(torch.cat(parts, 1), models.oracle(wide, ids)) < CLOSE


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes(mode):
    here, wide = pair()
    here.compile(backend="inplace_ttt", mode=mode)
    ids = models.ids(2, 61)
    with torch.no_grad():
        for _ in range(3):
            y = here(ids.cuda(), use_cache=False).logits.cpu()
    assert relative_error(y, models.oracle(wide, ids)) < CLOSE


def test_a_repeated_call_gives_the_same_bits():
    here, _ = pair(torch.bfloat16)
    ids = models.ids(2, 61).cuda()
    with torch.no_grad():
        first = here(ids, use_cache=False).logits.clone()
        assert torch.equal(first, here(ids, use_cache=False).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_records_a_running_step(dtype):
    """``reduce-overhead``: no graph of a step is left out because it writes to what is not static.

    A cache that grows hands one recorded call's output to the next, which Inductor refuses of any model; a
    static one must have its keys before a call is compiled, or they are what is not static.
    """
    here, wide = pair(dtype)
    here.compile(backend="inplace_ttt", mode="reduce-overhead")
    ids, skips = models.ids(2, 61), []
    cache, out = StaticCache(here.config, max_cache_len=64), []
    cache.early_initialization(2, 2, 8, dtype, torch.device("cuda"))
    with torch.no_grad():
        for start, stop in ((0, 40), *((i, i + 1) for i in range(40, 61))):
            part = ids[:, start:stop].cuda()
            out.append(here(part, past_key_values=cache).logits.cpu())
            skips.append(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])
        want = models.oracle(wide, ids)
    assert relative_error(torch.cat(out, 1), want) < (CLOSE if dtype == torch.float32 else 5e-2)
    # The first call makes the state, which is static from the second one on.
    assert skips[-1] == skips[0]
