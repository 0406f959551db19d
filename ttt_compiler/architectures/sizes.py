"""Tiny values for the usual names of configuration fields; the generic half of the tiny models.

A field of a configuration class (or of one of its sub-configurations) that is named here gets this value,
every other field keeps its default. May be changed here: values and new names. What only one family needs
belongs to ``families.py``.
"""

from __future__ import annotations

from typing import Any

# A prime, so that it is no multiple of any width.
VOCAB = 101
# Token ids of text; the ids before are special, and those after stand for images and sound.
FIRST_TEXT_ID, LAST_TEXT_ID = 10, 79

WIDTH, HIDDEN, EXPERT_HIDDEN = 64, 160, 48
HEADS, HEAD_WIDTH, LAYERS, POSITIONS = 4, 16, 2, 128
EXPERTS, EXPERTS_PER_TOKEN = 4, 2
STATE_HEADS, STATE_WIDTH = 8, 16


def _same(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **_same(VOCAB, "vocab_size vocab_size_per_layer_input decoder_vocab_size audio_vocab_size"),
    **_same(VOCAB, "shape_vocab_size pronunciation_vocab_size codebook_size unpadded_vocab_size"),
    **_same(WIDTH, "hidden_size n_embd d_model emb_dim embedding_size lru_width cross_attention_hidden_size"),
    **_same(WIDTH, "input_embedding_size output_embedding_size backbone_hidden_size out_hidden_size"),
    **_same(WIDTH, "attention_hidden_size hidden_size_global word_embed_proj_dim embedding_dim"),
    **_same(
        WIDTH, "adapter_in_dim adapter_input_size adapter_out_dim downsample_hidden_size output_proj_dims"
    ),
    **_same(WIDTH, "vision_output_dim projector_input_dim projector_output_dim output_channels input_size"),
    **_same(WIDTH, "output_proj_dims audio_embed_dim mm_embed_dim nemo_conv_channels ext_pw_out_channel"),
    **_same(WIDTH, "depthwise_separable_out_channel"),
    **_same(HIDDEN, "intermediate_size ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size"),
    **_same(HIDDEN, "d_ff dff dim_ff d_inner feed_forward_size mlp_dim intermediate_size_mlp"),
    **_same(HIDDEN, "dense_intermediate_size prefix_dense_intermediate_size"),
    **_same(EXPERT_HIDDEN, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size"),
    **_same(EXPERT_HIDDEN, "shared_experts_intermediate_size shared_intermediate_size"),
    **_same(EXPERT_HIDDEN, "moe_shared_expert_intermediate_size"),
    **_same(LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth"),
    **_same(LAYERS, "num_encoder_layers num_decoder_layers num_blocks conf_num_hidden_layers"),
    **_same(LAYERS, "num_global_layers max_window_layers no_rope_layer_interval sliding_window_pattern"),
    **_same(HEADS, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads"),
    **_same(HEADS, "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
    **_same(HEADS, "swa_num_attention_heads conf_num_attention_heads index_n_heads linear_num_heads"),
    **_same(HEADS, "linear_num_value_heads"),
    **_same(2, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads"),
    **_same(HEAD_WIDTH, "head_dim swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim"),
    **_same(HEAD_WIDTH, "kv_channels d_kv dim_head attention_head_size v_head_dim index_head_dim"),
    **_same(HEAD_WIDTH, "query_pre_attn_scalar global_head_dim"),
    **_same(8, "qk_rope_head_dim qk_nope_head_dim rotary_dim d_rel hidden_size_per_layer_input laurel_rank"),
    **_same(8, "index_topk adapter_rank gated_norm_rank router_hidden_size time_step_rank mamba_dt_rank"),
    **_same(24, "q_lora_rank o_lora_rank hc_lowrank"),
    **_same(20, "kv_lora_rank"),
    **_same(POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions"),
    **_same(POSITIONS, "max_target_positions context_length model_max_length rel_extent"),
    **_same(POSITIONS, "original_max_position_embeddings position_bias_max_distance"),
    **_same(EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_same(EXPERTS_PER_TOKEN, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k"),
    **_same(EXPERTS_PER_TOKEN, "top_k_experts"),
    **_same(1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group"),
    **_same(1, "num_expert_group first_k_dense_replace num_dense_layers"),
    # Multi-token-prediction blocks are no part of a forward pass over text.
    **_same(0, "num_mtp_layers num_nextn_predict_layers"),
    # Shorter than the tokens of a test, so that windows and chunks are seen to end.
    **_same(8, "sliding_window sliding_window_size attention_window_size window_size local_attention"),
    **_same(8, "attention_chunk_size chunk_size mamba_chunk_size block_size"),
    **_same(STATE_HEADS, "mamba_n_heads mamba_num_heads n_mamba_heads"),
    **_same(STATE_WIDTH, "mamba_d_head mamba_head_dim mamba_headdim state_size ssm_state_size mamba_d_state"),
    **_same(1, "n_groups mamba_n_groups mamba_ngroups"),
    **_same(2 * WIDTH, "mamba_d_ssm"),
    # Mixture-of-experts families that may keep some layers dense keep the first one.
    "mlp_only_layers": [0],
    # Towers for images and sound: built, never called.
    **_same(32, "image_size crop_size base_channels feature_size num_mel_bins"),
    **_same(8, "patch_size spatial_patch_size"),
    **_same(16, "num_position_embeddings position_embedding_size mm_posemb_size mm_tokens_per_image"),
    **_same(16, "vision_soft_tokens_per_image audio_soft_tokens_per_image image_seq_length"),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    # Encoders and encoder-decoders of the mapping run as decoders.
    "is_decoder": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}

# These, besides the fields ending so, are ids of tokens that no text has.
MARKER_SUFFIXES = ("_token_id", "_token_index")

# A configuration with experts and none of these gives its experts the width of a dense MLP.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERT_WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size")
