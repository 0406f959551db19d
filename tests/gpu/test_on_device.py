"""What only a GPU can show; `nox -s gpu` runs this there. Elsewhere everything here is skipped.

Kernels are compiled here, so the process must not be interpreted: TRITON_INTERPRET=0.
"""

from __future__ import annotations

import os

import pytest
import torch

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
    """The same converted model on the GPU and, in fp64, on the CPU."""
    wide = models.randomize(ttt.convert(models.tiny(dtype=torch.float64), CONFIG))
    here = ttt.convert(models.tiny(dtype=dtype), CONFIG)
    here.load_state_dict(wide.state_dict())
    here = here.to("cuda")
    for model in (wide, here):
        model.compile(backend="inplace_ttt")
    return here, wide


@pytest.mark.parametrize("length", [7, 16, 61])
def test_forward(length):
    here, wide = pair()
    ids = models.ids(2, length)
    with torch.no_grad():
        y = here(ids.cuda(), use_cache=False).logits.cpu()
        assert relative_error(y, wide(ids, use_cache=False).logits) < CLOSE


def test_gradients():
    here, wide = pair()
    ids = models.ids(2, 61)
    for model, x in ((here, ids.cuda()), (wide, ids)):
        model(x, use_cache=False).logits.square().mean().backward()
    theirs = dict(wide.named_parameters())
    for name, p in here.named_parameters():
        assert relative_error(p.grad.cpu(), theirs[name].grad) < 1e-3, name


def test_prefill_and_decode():
    here, wide = pair()
    ids = models.ids(2, 61)
    session = ttt.Session(here, 2)
    parts = []
    with torch.no_grad():
        for start, stop in ((0, 5), (5, 40), *((i, i + 1) for i in range(40, 61))):
            part = ids[:, start:stop].cuda()
            parts.append(here(part, past_key_values=session.cache).logits.cpu())
        assert relative_error(torch.cat(parts, 1), wide(ids, use_cache=False).logits) < CLOSE


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes(mode):
    here, wide = pair()
    here.compile(backend="inplace_ttt", mode=mode)
    ids = models.ids(2, 61)
    with torch.no_grad():
        for _ in range(3):
            y = here(ids.cuda(), use_cache=False).logits.cpu()
    assert relative_error(y, wide(ids, use_cache=False).logits) < CLOSE


def test_a_repeated_call_gives_the_same_bits():
    here, _ = pair(torch.bfloat16)
    ids = models.ids(2, 61).cuda()
    with torch.no_grad():
        first = here(ids, use_cache=False).logits.clone()
        assert torch.equal(first, here(ids, use_cache=False).logits)
