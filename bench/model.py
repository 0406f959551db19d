"""Whole models with random weights of a published model's shapes: static, ours, and the official algorithm.

All share the slow weights. Logits are compiled for one length, decoding for any; the official algorithm is op
by op, as it is published. May be changed here: which shapes there are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ttt_compiler as ttt
from bench.decode import CHUNK, LR, Decoder, OneByOne
from bench.official import official, reset
from ttt_compiler.architectures.presets import PRESETS
from ttt_compiler.spec import CONV, PROJ

# Norm of the error by the norm of the logits, of fp32. What bf16 costs the official algorithm is measured,
# and ours may cost that times so much.
BOUND, AS_BAD = 1e-3, 1.5
# Tokens of a call of a decoder: so many steps, and no chunk ends in any round.
STEPS = 8
# Steps of which the one in the middle completes a chunk.
BORDER = 32

CONFIGS: dict[str, dict[str, Any]] = {
    "small": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
    "SmolLM2-135M": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "Qwen3-0.6B": PRESETS["Qwen3-0.6B"],
}


@dataclass(frozen=True)
class ModelShape:
    """Which model, how many tokens T it reads, in which dtype, in chunks of C."""

    name: str
    tokens: int
    dtype: str = "float32"
    chunk: int = CHUNK

    def __str__(self) -> str:
        return f"{self.name} T={self.tokens} C={self.chunk} {self.dtype}"


class Models:
    """One model three times, and a text for it; every sixth layer is fast."""

    @torch.no_grad()
    def __init__(self, shape: ModelShape) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**CONFIGS[shape.name])
        torch.manual_seed(0)
        self.static: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        shared = {id(p): p for p in self.static.parameters()}
        self.fast: nn.Module = ttt.convert(
            copy.deepcopy(self.static, shared), ttt.TTTConfig(layers="every:6", chunk_size=shape.chunk, lr=LR)
        )
        for name, p in self.fast.named_parameters():
            if name.endswith((CONV, PROJ)):
                p.copy_(torch.randn(p.shape) * 0.02)
        layers = [int(s.key.split(".")[2]) for s in ttt.Session(self.fast).state.specs]
        self.published = official(self.fast, layers, shape.chunk, LR)
        g = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, config.vocab_size, (1, shape.tokens), generator=g)
        self.shape, self.dtype = shape, getattr(torch, shape.dtype)

    @torch.no_grad()
    def logits(self) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float]]:
        """What reads the whole text, static first, and errors against the official algorithm in fp32.

        Raises:
            AssertionError: ours is beyond its bound, or has written nothing.
        """
        self.static.compile(dynamic=False)
        self.fast.compile(backend="inplace_ttt", dynamic=False)

        def loop() -> Tensor:
            reset(self.published)
            return self._read(self.published)

        exact = loop()
        if self.dtype != torch.float32:
            for model in (self.static, self.fast, self.published):
                model.to(self.dtype)
        runs = {"static": lambda: self._read(self.static), "ours": lambda: self._read(self.fast)}
        runs["official"] = loop
        errors = {n: float((run().float() - exact).norm() / exact.norm()) for n, run in runs.items()}
        bound = BOUND if self.dtype == torch.float32 else AS_BAD * errors["official"]
        assert errors["ours"] <= bound, f"{self.shape}: error {errors['ours']:.1e}: no timing"
        assert errors["static"] > 2 * errors["ours"], f"{self.shape}: nothing was written: no timing"
        return runs, errors

    @torch.no_grad()
    def decoders(self) -> dict[str, Callable[[], None]]:
        """What reads :data:`STEPS` more tokens of one row with a cache; the chunk there is not full yet."""
        plain = copy.deepcopy(self.static)
        self.static.compile(dynamic=True)
        self.fast.compile(backend="inplace_ttt", dynamic=True)
        prompt = self.shape.tokens // self.shape.chunk * self.shape.chunk + self.shape.chunk // 4
        found: dict[str, Callable[[], object]] = {
            "static": Decoder(self.static, 1, prompt, fast=False, prefill=plain),
            "ours": Decoder(self.fast, 1, prompt, fast=True),
            "official": OneByOne(self.published, 1, prompt),
        }
        return {name: _steps(decoder) for name, decoder in found.items()}

    @torch.no_grad()
    def across_a_border(self, clock: Callable[[], float], rounds: int) -> tuple[list[float], list[int]]:
        """Seconds of each of :data:`BORDER` steps, medians over ``rounds``, and the chunks written by them.

        The model is compiled already. The step in the middle completes a chunk, of every fast layer at once.
        """
        prompt = self.shape.tokens // self.shape.chunk * self.shape.chunk - BORDER // 2
        taken, written = [], []
        for _ in range(rounds):
            decoder = Decoder(self.fast, 1, prompt, fast=True)
            state = decoder.cache.ttt
            key = state.specs[0].key
            before = state.chunks_written[key][0]
            decoder()
            steps = []
            for _ in range(BORDER):
                start = clock()
                decoder()
                steps.append(clock() - start)
            taken.append(steps)
            written.append(state.chunks_written[key][0] - before)
        return torch.tensor(taken).median(0).values.tolist(), written

    def _read(self, model: nn.Module) -> Tensor:
        return model(input_ids=self.ids, use_cache=False).logits


def _steps(decoder: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(STEPS):
            decoder()

    return run
