"""Whole models with random weights of a published model's shapes: static, ours, and the official algorithm.

Logits and prompts are compiled for one length, decoding for any; the official algorithm is op by op, as it is
published, and compiled too where that ends in time. May be changed here: which shapes there are.
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
from bench.layer import Shape
from bench.official import official, reset, running
from ttt_compiler.architectures.presets import PRESETS
from ttt_compiler.spec import CONV, PROJ

# Norm of the error by the norm of the logits, of fp32. What bf16 costs the official algorithm is measured,
# and ours may cost that times so much.
BOUND, AS_BAD = 1e-3, 1.5
# Of W in bf16, whose hidden rows come out of bf16 layers: by what was written.
BOUND_W_NARROW = 0.1
COMPILED = "official inference loop, compiled"
# Chunks of a text up to which the official loop is compiled: it is unrolled.
UNROLLED = 16
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


# Every how many layers one is fast.
EVERY = 6


@dataclass(frozen=True)
class ModelShape:
    """Which model, how many tokens T it reads, in which dtype, in chunks of C, B rows at once."""

    name: str
    tokens: int
    dtype: str = "float32"
    chunk: int = CHUNK
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.name} T={self.tokens} C={self.chunk} B={self.batch} {self.dtype}"

    def flops_of_writing(self) -> float:
        """What a prompt costs beyond the static model: v and the writes of every fast layer."""
        config = CONFIGS[self.name]
        d, f = config["hidden_size"], config["intermediate_size"]
        layer = Shape(d, f, self.tokens, self.chunk, self.batch, self.dtype)
        fast = len(range(0, config["num_hidden_layers"], EVERY))
        return fast * (layer.forward_flops(state=True) - layer.static_flops)


class Models:
    """One model as it is, compiled and not, ours, the official one, and texts; each sixth layer is fast."""

    @torch.no_grad()
    def __init__(self, shape: ModelShape) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**CONFIGS[shape.name])
        torch.manual_seed(0)
        self.static: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self.eager = twin(self.static)
        self.fast: nn.Module = ttt.convert(
            twin(self.static), ttt.TTTConfig(layers=f"every:{EVERY}", chunk_size=shape.chunk, lr=LR)
        )
        for name, p in self.fast.named_parameters():
            if name.endswith((CONV, PROJ)):
                p.copy_(torch.randn(p.shape) * 0.02)
        layers = [int(s.key.split(".")[2]) for s in ttt.Session(self.fast).state.specs]
        self.published = official(self.fast, layers, shape.chunk, LR)
        g = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, config.vocab_size, (shape.batch, shape.tokens), generator=g)
        self.shape, self.dtype = shape, getattr(torch, shape.dtype)

    @torch.no_grad()
    def logits(self) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float]]:
        """What reads the whole text, static first, and errors against the official algorithm in fp32.

        Raises:
            AssertionError: ours is beyond its bound, or has written nothing.
        """
        return self._checked({"use_cache": False})[:2]

    @torch.no_grad()
    def prefill(self) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float]]:
        """The same of a prompt: into a cache, with the last logits alone; and W that it leaves is right too.

        Raises:
            AssertionError: as before.
        """
        asked = {"use_cache": True, "logits_to_keep": 1}
        runs, errors, exact = self._checked(asked)
        state = self.fast(input_ids=self.ids, **asked).past_key_values.ttt
        for i, (spec, module) in enumerate(zip(state.specs, running(self.published), strict=True)):
            w0 = module.mlp.down_proj.weight
            for b, want in enumerate(exact):
                got, change = state.matrix(spec.key, b, w0).float(), (want[i] - w0.float()).norm()
                error = float((got - want[i]).norm() / change) if float(change) else 0.0
                errors["ours: W"] = max(errors.get("ours: W", 0.0), error)
        bound = BOUND if self.dtype == torch.float32 else BOUND_W_NARROW
        assert errors.get("ours: W", 0.0) <= bound, f"{self.shape}: W {errors['ours: W']:.1e}: no timing"
        return runs, errors

    def _checked(self, asked: dict[str, Any]) -> tuple[dict, dict[str, float], list[list[Tensor]]]:
        """Competitors of a call, their errors, and what W is per row and fast layer, by the official one."""
        self.static.compile(dynamic=False)
        self.fast.compile(backend="inplace_ttt", dynamic=False)
        weights: list[list[Tensor]] = []

        def loop(model: nn.Module) -> Tensor:
            out = []
            weights.clear()
            for row in self.ids.split(1):
                reset(self.published)
                out.append(model(input_ids=row, **asked).logits)
                weights.append([m.mlp.down_proj.weight if m.weight is None else m.weight for m in layers])
            return out[0] if len(out) == 1 else torch.cat(out)

        def read(model: nn.Module) -> Callable[[], Tensor]:
            return lambda: model(input_ids=self.ids, **asked).logits

        layers = running(self.published)
        exact = loop(self.published)
        exact_weights = [[w.clone() for w in row] for row in weights]
        if self.dtype != torch.float32:
            for model in (self.static, self.eager, self.fast, self.published):
                model.to(self.dtype)
        runs = {
            "static": read(self.static),
            "static, eager": read(self.eager),
            "ours": read(self.fast),
            "official": lambda: loop(self.published),
        }
        if self.shape.tokens <= UNROLLED * self.shape.chunk:
            # Of the same module, which stays op by op for who calls it itself.
            compiled = torch.compile(self.published, dynamic=False)
            runs[COMPILED] = lambda: loop(compiled)
        errors = {n: float((run().float() - exact).norm() / exact.norm()) for n, run in runs.items()}
        bound = BOUND if self.dtype == torch.float32 else AS_BAD * errors["official"]
        for name in {"ours", COMPILED} & errors.keys():
            assert errors[name] <= bound, f"{self.shape}, {name}: error {errors[name]:.1e}: no timing"
        assert errors["static"] > 2 * errors["ours"], f"{self.shape}: nothing was written: no timing"
        return runs, errors, exact_weights

    @torch.no_grad()
    def decoders(self) -> dict[str, Callable[[], None]]:
        """What reads :data:`STEPS` more tokens of each row with a cache; the chunk there is not full yet."""
        self.static.compile(dynamic=True)
        self.fast.compile(backend="inplace_ttt", dynamic=True)
        batch, chunk = self.shape.batch, self.shape.chunk
        prompt = self.shape.tokens // chunk * chunk + chunk // 4
        found: dict[str, Callable[[], object]] = {
            "static": Decoder(self.static, batch, prompt, fast=False, prefill=self.eager),
            "static, eager": Decoder(self.eager, batch, prompt, fast=False),
            "ours": Decoder(self.fast, batch, prompt, fast=True),
            "official": OneByOne(self.published, batch, prompt),
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


def twin(model: nn.Module) -> nn.Module:
    """A copy with the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _steps(decoder: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(STEPS):
            decoder()

    return run
