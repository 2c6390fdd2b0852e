"""Decoders with other mixers than attention: convolutions, recurrences, and both beside attention."""

from __future__ import annotations

from architectures.entry import FULL, GRANITE, LATENT, LINEAR, WINDOW, experts, model, rope

MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
DELTA_NET = {
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
    "layer_types": [LINEAR, LINEAR, FULL, LINEAR],
    "num_hidden_layers": 4,
    "rope_parameters": rope(partial_rotary_factor=0.5),
}

ARCHITECTURES = [
    model("qwen3.5", "qwen3_5_text", "padded", **DELTA_NET),
    model(
        "qwen3-next", "qwen3_next", "padded", moe=True, shared_expert_intermediate_size=32, mlp_only_layers=[1],
        **DELTA_NET, **experts(),
    ),
    model(
        "qwen3.5-moe", "qwen3_5_moe_text", "padded", moe=True, shared_expert_intermediate_size=32,
        **DELTA_NET | {"layer_types": [LINEAR, FULL, LINEAR], "num_hidden_layers": 3} | experts(),
    ),
    model(
        "falcon-h1", "falcon_h1", "padded", not_adapted="out_proj", mamba_d_ssm=128, mamba_rms_norm=True,
        projectors_bias=True, mamba_proj_bias=True, lm_head_multiplier=0.5, embedding_multiplier=2.0,
        mlp_multipliers=[0.7, 1.4], key_multiplier=0.6, attention_out_multiplier=0.8, attention_in_multiplier=1.2,
        ssm_multipliers=[0.6, 0.8, 1.2, 1.4, 0.9], ssm_in_multiplier=1.3, ssm_out_multiplier=0.8, **MAMBA,
    ),
    model(
        "granite-4-hybrid", "granitemoehybrid", "padded", moe=True, layer_types=["mamba", "attention", "mamba"],
        shared_intermediate_size=32, position_embedding_type="rope", **GRANITE, **MAMBA, **experts(),
    ),
    model(
        "nemotron-h", "nemotron_h", "padded", not_adapted="out_proj", moe=True,
        layers_block_type=["mamba", "moe", "attention", "mlp", "mamba"], num_hidden_layers=5, head_dim=16,
        ssm_state_size=8, mamba_num_heads=8, mamba_head_dim=16, n_groups=2, conv_kernel=4, chunk_size=8,
        n_routed_experts=4, n_shared_experts=1, moe_shared_expert_intermediate_size=32, **experts(),
    ),
    model("lfm2", "lfm2", "padded", layer_types=["conv", FULL, "conv"], block_multiple_of=8, conv_bias=True),
    model(
        "lfm2-moe", "lfm2_moe", "padded", moe=True, layer_types=["conv", FULL, "conv"], num_dense_layers=1,
        conv_bias=True, use_expert_bias=True, **experts(),
    ),
    model("bamba", "bamba", "padded", attn_layer_indices=[1], rope_parameters=rope(partial_rotary_factor=0.5), **MAMBA),
    model(
        "zaya", "zaya", "padded", moe=True, head_dim=16, sliding_window=WINDOW,
        layer_types=["hybrid", "hybrid_sliding", "hybrid"], router_hidden_size=16, **experts(chosen=1),
    ),
    # In 5.17 every token attends to later ones.
    model("doge", "doge", "padded", since="5.23", keep_window_size=128),
    # Which keys are kept is chosen among later ones too.
    model("doge-window", "doge", None, causal=False, since="5.23", keep_window_size=WINDOW),
    model(
        "minimax", "minimax", "padded", moe=True, head_dim=16, layer_types=[FULL, LINEAR, FULL], block_size=8,
        full_attn_alpha_factor=1.3, full_attn_beta_factor=0.8, linear_attn_alpha_factor=0.7,
        linear_attn_beta_factor=1.2, mlp_alpha_factor=0.9, mlp_beta_factor=1.1, **experts(),
    ),
    model(
        "recurrent-gemma", "recurrent_gemma", "padded", lru_width=64, attention_window_size=WINDOW,
        logits_soft_cap=2.0,
    ),
    model("mamba", "mamba", "padded", not_adapted="out_proj|dt_proj", state_size=8, time_step_rank=4, use_bias=True),
    model(
        "mamba2", "mamba2", "padded", not_adapted="out_proj", num_heads=8, head_dim=16, state_size=8, n_groups=2,
        chunk_size=8, use_bias=True,
    ),
    model(
        "olmo-hybrid", "olmo_hybrid", "padded", layer_types=[LINEAR, LINEAR, FULL], linear_num_key_heads=4,
        linear_num_value_heads=4, linear_key_head_dim=12, linear_value_head_dim=16,
    ),
    model(
        "kimi-linear", "kimi_linear", "padded", moe=True, layer_types=[LINEAR, FULL, LINEAR],
        mlp_layer_types=["dense", "sparse", "sparse"], linear_head_dim=16, linear_num_heads=4, num_shared_experts=1,
        num_experts_per_token=2, **LATENT | experts() | {"q_lora_rank": None},
    ),
    model(
        "bailing-hybrid", "bailing_hybrid", "padded", moe=True, layer_types=[LINEAR, FULL, LINEAR],
        mlp_layer_types=["dense", "sparse", "sparse"], linear_head_dim=16, linear_num_heads=4, num_shared_experts=1,
        num_experts_per_token=2, num_expert_group=2, topk_group=1, **LATENT | experts() | {"q_lora_rank": None},
    ),
    model(
        "jamba", "jamba", "padded", moe=True, not_adapted="dt_proj", num_hidden_layers=4, attn_layer_period=2,
        attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4,
        use_mamba_kernels=False, **experts(),
    ),
]  # fmt: skip
