"""What single families need beside the usual field names; the special half of the tiny models.

Keyed by a configuration's ``model_type``, so a text configuration gets its values on its own and inside
of a multimodal one. For a sub-configuration, a dictionary adds options. May be changed here: entries.
A value that several families need under the same name belongs to ``sizes.py``.
"""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
# Of the attention over sliding windows that full attention is mixed with in these families.
_DOTS_SLIDING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 20,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 16,
}
_GEMMA4 = {"global_head_dim": 32}
_SHARED_BLOCK = {
    # The block that attends is one block, used twice.
    "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    # Over short texts sparse attention falls back to this one.
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"vocab_size": 260, "patch_size": 4, "encoder_hash_byte_group_vocab": 64},
    "blt_local_decoder": {"vocab_size": 260, "num_key_value_heads": 4},
    "blt_local_encoder": {"vocab_size": 260, "num_key_value_heads": 4},
    "blt_patcher": {"vocab_size": 260, "num_key_value_heads": 4},
    "cohere2_moe": _DENSE_THEN_SPARSE,
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**_ROPE, "mrope_section": [4, 2, 2]}}},
    "cpmant": {"prompt_types": 4, "segment_types": 4},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 48}},
    "doge": {"intermediate_size": 160},
    # A layer before, in and after the section that is run twice.
    "dory": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
    },
    "dots3_note_text": {**_DOTS_SLIDING, "head_dim": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {**_GEMMA4, "enable_moe_block": True},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_gate_rank": 8,
    },
    "inkling_text": _DENSE_THEN_SPARSE,
    "jamba": {
        "intermediate_size": 160,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"head_dim": 16, "num_heads": 8},
    "mellum": _DENSE_THEN_SPARSE,
    "minimax_m3_vl_text": _DENSE_THEN_SPARSE,
    "mimi": {"codebook_size": 64},
    "mllama_text_model": {"cross_attention_layers": []},  # a text passes them by
    "moshi": {"ffn_dim": 320},  # gate and value share it
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "phi4_multimodal_audio": {"bias_max_distance": 16},
    "qwen4_exp_text": {
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 64,
        "heads_per_ngram": 2,
        "split_ngram_parts": 1,
        "make_ngram_vocab_size_divisible_by": 8,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"intermediate_size": 320, "block_types": ["recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 48],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "roc_bert": {"pronunciation_embed_dim": 32, "shape_embed_dim": 32},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_SHARED_BLOCK, "n_mamba_heads": 2},
    "zamba2": _SHARED_BLOCK,
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"]},
}

# The mapping names the configuration of the whole, and the model takes that of a part.
MODEL_PART: dict[str, str] = {"musicgen": "decoder", "musicgen_melody": "decoder"}

_ASSISTANT = "a drafting head: it runs on another model's hidden states and keys, not on tokens"

# Model types whose model cannot be built or run on text at all, and why.
UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its image tower is a model of the timm package; gemma3n_text has the same text model",
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
}
