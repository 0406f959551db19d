"""Tiny random models and the eager oracle they are compared with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ttt_compiler.architectures.oracle import oracle_call
from ttt_compiler.config import TTTConfig
from ttt_compiler.conversion import convert
from ttt_compiler.spec import CONV, PROJ

VOCAB = 97


def tiny(family: str = "llama", *, layers: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    common = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if family == "gpt2":
        config = GPT2Config(n_embd=32, n_inner=80, n_layer=layers, n_head=4, n_positions=256, **common)
        model = GPT2LMHeadModel(config)
    else:
        kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
        make_config, make = kinds[family]
        config = make_config(
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
            **common,
        )
        model = make(config)
    return model.to(dtype).eval()


def ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomize(model: nn.Module, scale: float = 0.3, seed: int = 2) -> nn.Module:
    """A non-zero adapter, so that fast weights move and a match means something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.rpartition(".")[2].startswith((CONV, PROJ)):
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model


def converted(family: str = "llama", *, scale: float = 0.3, **config) -> nn.Module:
    settings = {"layers": "all", "chunk_size": 4, "lr": 1.0, **config}
    model = convert(tiny(family), TTTConfig(**settings))
    return randomize(model, scale) if scale else model


def oracle(model: nn.Module, tokens: Tensor, *, pos: Tensor | None = None, **kwargs) -> Tensor:
    """Logits of the converted model, eagerly, whole sequence, by the reference."""
    return oracle_call(model, tokens, pos=pos, kwargs={"use_cache": False, **kwargs}).logits


def oracle_gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Gradients of ``logits.square().mean()`` by autograd through the reference."""
    eager = copy.deepcopy(model)
    oracle(eager, tokens).square().mean().backward()
    return {name: p.grad for name, p in eager.named_parameters()}
