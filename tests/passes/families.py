"""Tiny random transformers models, two layers of width 64, and the names their MLPs go by.

The patterns are the independent truth the detector is compared with: it never sees a name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

VOCAB = 101
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {**_DECODER, "num_key_value_heads": 4}
_GPT = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_END = {"bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


@dataclass(frozen=True)
class Family:
    """A configuration, the pattern of its down-projections, and how many it has."""

    config: str
    options: dict[str, Any]
    pattern: str
    count: int = 2
    auto: str = "AutoModelForCausalLM"
    kinds: frozenset[str] = field(default=frozenset({"dense"}))
    embedding: str | None = None

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        make: Callable[..., nn.Module] = getattr(transformers, self.auto).from_config
        return make(config).eval()

    def expected(self, model: nn.Module) -> list[str]:
        names = [n for n, _ in model.named_parameters() if re.search(self.pattern, n)]
        assert len(names) == self.count, "the independent name rule is out of date"
        return sorted(names)


_MOE = frozenset({"moe"})
_SHARED = frozenset({"shared", "moe"})
_ALL = frozenset({"dense", "moe", "shared"})
_DOWN = r"mlp\.down_proj\.weight$"
_OPT = {
    **{k: v for k, v in _DECODER.items() if "intermediate" not in k and "key_value" not in k},
    "ffn_dim": 160,
    "word_embed_proj_dim": 64,
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", _DECODER, _DOWN),
    "qwen3": Family("Qwen3Config", {**_DECODER, "head_dim": 16}, _DOWN),
    "gpt2": Family("GPT2Config", {**_GPT, **_END, "n_inner": 160}, r"\.mlp\.c_proj\.weight$"),
    "phi3": Family("Phi3Config", _DECODER, _DOWN),
    "gemma2": Family("Gemma2Config", {**_DECODER, "head_dim": 16}, _DOWN),
    "gptj": Family("GPTJConfig", {**_GPT, **_END, "n_inner": 160, "rotary_dim": 8}, r"mlp\.fc_out\.weight$"),
    "gpt_neox": Family(
        "GPTNeoXConfig",
        {k: v for k, v in _DECODER.items() if "key_value" not in k},
        r"mlp\.dense_4h_to_h\.weight$",
    ),
    "falcon": Family(
        "FalconConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_hidden_size": 160,
            **_END,
        },
        r"mlp\.dense_4h_to_h\.weight$",
    ),
    "mixtral": Family(
        "MixtralConfig",
        {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
        r"experts\.down_proj$",
        kinds=_MOE,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        {**_DECODER, **_EXPERTS, "head_dim": 16},
        r"experts\.down_proj$",
        kinds=_MOE,
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        {
            **_HEADS,
            "moe_intermediate_size": 48,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 20,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
        r"(mlp|shared_experts|experts)\.down_proj(\.weight)?$",
        count=3,
        kinds=_ALL,
    ),
    "opt": Family("OPTConfig", _OPT, r"\.fc2\.weight$"),
    "opt_350m": Family(
        "OPTConfig",
        {**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
        r"\.fc2\.weight$",
    ),
    "bloom": Family(
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4, **_END},
        r"mlp\.dense_4h_to_h\.weight$",
    ),
    "mpt": Family(
        "MptConfig",
        {"vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        r"ffn\.down_proj\.weight$",
    ),
    "mamba2": Family(
        "Mamba2Config",
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 1,
            "chunk_size": 8,
            "pad_token_id": 0,
            **_END,
        },
        r"(?!)",
        count=0,
        kinds=frozenset(),
    ),
    "bert": Family(
        "BertConfig",
        {k: v for k, v in _DECODER.items() if "key_value" not in k},
        r"layer\.\d+\.output\.dense\.weight$",
        auto="AutoModelForMaskedLM",
    ),
}

_MLA = FAMILIES["deepseek_v3"].options

# Families whose routed experts have a shared one beside them.
SHARED: dict[str, Family] = {
    "deepseek_v3": FAMILIES["deepseek_v3"],
    "deepseek_v2": Family(
        "DeepseekV2Config",
        {**_MLA, "head_dim": 8},
        r"(mlp|shared_experts|experts)\.down_proj(\.weight)?$",
        count=3,
        kinds=_ALL,
    ),
    "llama4": Family(
        "Llama4TextConfig",
        {
            **_DECODER,
            "head_dim": 16,
            "intermediate_size": 48,
            "intermediate_size_mlp": 160,
            "moe_layers": [1],
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 16,
        },
        r"feed_forward\.(shared_expert\.|experts\.)?down_proj(\.weight)?$",
        count=3,
        kinds=_ALL,
    ),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        {
            **_DECODER,
            **_EXPERTS,
            "head_dim": 16,
            "shared_expert_intermediate_size": 48,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        r"mlp\.(shared_expert|experts)\.down_proj(\.weight)?$",
        count=4,
        kinds=_SHARED,
    ),
    "hunyuan_v1_moe": Family(
        "HunYuanMoEV1Config",
        {**_DECODER, "head_dim": 16, "num_experts": 4, "moe_topk": 2},
        r"mlp\.(shared_mlp|experts)\.down_proj(\.weight)?$",
        count=4,
        kinds=_SHARED,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        {**_DECODER, **_EXPERTS, "shared_expert_intermediate_size": 96},
        r"mlp\.(shared_expert|experts)\.down_proj(\.weight)?$",
        count=4,
        kinds=_SHARED,
    ),
}
