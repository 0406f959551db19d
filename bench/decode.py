"""Whole models that decode: one more token a call, and the gate before any such call is timed.

The official algorithm takes one sequence: a batch is read one by one. May be changed here: what the gate
reads, as long as single tokens cross a chunk's end.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

import ttt_compiler as ttt
from bench.layer import held
from bench.official import reset, running
from ttt_compiler.compat.cache_names import installed_name

CHUNK, LR = 256, 0.3
# Tokens are drawn from so many.
TOKENS = 1000
# Largest error of a logit by the largest one.
_BOUND = 1e-3


class Decoder:
    """A model in the middle of a text: every call reads one more token of each row."""

    def __init__(
        self,
        model: torch.nn.Module,
        batch: int,
        prompt: int,
        *,
        fast: bool,
        prefill: torch.nn.Module | None = None,
    ) -> None:
        self.model = model if prefill is None else prefill
        self.cache = ttt.Session(model, batch).cache if fast else DynamicCache(config=model.config)
        self.token = torch.ones(batch, 1, dtype=torch.int64)
        ids = torch.randint(0, TOKENS, (batch, prompt), generator=torch.Generator().manual_seed(0))
        for start in range(0, prompt, CHUNK):
            self.read(ids[:, start : start + CHUNK].clone())
        self.model = model

    def read(self, ids: Tensor) -> Tensor:
        # Under the other of its two names a wrapper would rename it, at a price, in some competitors alone.
        return self.model(input_ids=ids, use_cache=True, **{installed_name(): self.cache}).logits

    def __call__(self) -> Tensor:
        return self.read(self.token)


class OneByOne:
    """The official algorithm on a batch: as many decoders as rows, on one model."""

    def __init__(self, model: torch.nn.Module, batch: int, prompt: int) -> None:
        self.model, self.rows, self.states = model, [], []
        for _ in range(batch):
            reset(model)
            self.rows.append(Decoder(model, 1, prompt, fast=False))
            self.states.append([(m.past, m.weight) for m in running(model)])

    def __call__(self) -> None:
        for row, state in zip(self.rows, self.states, strict=True):
            for module, (past, weight) in zip(running(self.model), state, strict=True):
                module.past, module.weight = past, weight
            row()
            state[:] = [(m.past, m.weight) for m in running(self.model)]


def gate(fast: torch.nn.Module, published: torch.nn.Module, chunk: int) -> float:
    """No number from a wrong result: the largest error of logits against the official algorithm's.

    A prompt, then single tokens across a chunk's end, whose write is spread over some of them; a longer call,
    which finishes that write and crosses the next end at once; and single tokens again.

    Raises:
        AssertionError: a call's logits differ, or the logits do not depend on what was written.
    """
    sizes = [chunk - 4, *[1] * 8, chunk, *[1] * 2]
    ids = torch.randint(0, TOKENS, (1, sum(sizes)), generator=torch.Generator().manual_seed(1))
    reset(published)
    expected = published(input_ids=ids, use_cache=False).logits
    reader = Decoder(fast, 1, 0, fast=True)
    errors, start = [], 0
    for size in sizes:
        here = slice(start, start + size)
        got = reader.read(ids[:, here].clone())
        said = f"logits of {size} tokens from {start} on against the official algorithm's"
        errors.append(held(said, got, expected[:, here], _BOUND))
        start += size
    written = reader.cache.ttt.chunks_written
    assert all(count == [2] for count in written.values()), f"{written} chunks were written: no timing"
    still = _without_writes(published, ids)[:, chunk:]
    apart = float((still - expected[:, chunk:]).abs().max() / expected.abs().max())
    assert apart > 2 * _BOUND, f"writes change logits by {apart:.1e} alone: no timing"
    return max(errors)


def _without_writes(published: torch.nn.Module, ids: Tensor) -> Tensor:
    rates = [module.lr for module in running(published)]
    try:
        for module in running(published):
            module.lr = 0.0
        reset(published)
        return published(input_ids=ids, use_cache=False).logits
    finally:
        for module, rate in zip(running(published), rates, strict=True):
            module.lr = rate
