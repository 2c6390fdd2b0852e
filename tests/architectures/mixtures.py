"""Mixtures of experts, dense layers beside sparse ones where the family has both."""

from __future__ import annotations

from architectures.entry import FULL, GRANITE, LATENT, SLIDING, WINDOW, experts, model, rope

ARCHITECTURES = [
    model(
        "qwen3-moe", "qwen3_moe", "own", moe=True, head_dim=16, mlp_only_layers=[1], norm_topk_prob=True,
        **experts(),
    ),
    model("mixtral", "mixtral", "own", moe=True, sliding_window=WINDOW, **experts()),
    model(
        "qwen2-moe", "qwen2_moe", "own", moe=True, shared_expert_intermediate_size=32, mlp_only_layers=[1],
        **experts(),
    ),
    model("olmoe", "olmoe", "flat", moe=True, num_key_value_heads=4, clip_qkv=2.0, **experts()),
    model("minimax-m2", "minimax_m2", "own", moe=True, head_dim=16, **experts()),
    model("flex-olmo", "flex_olmo", "own", moe=True, **experts()),
    model("phimoe", "phimoe", "own", moe=True, lm_head_bias=True, attention_bias=True, **experts()),
    model("granite-moe", "granitemoe", "own", moe=True, **GRANITE, **experts()),
    model(
        "deepseek-v2", "deepseek_v2", "flat", moe=True, n_routed_experts=4, n_shared_experts=1,
        first_k_dense_replace=1, routed_scaling_factor=1.5, **LATENT, **experts(),
    ),
    model(
        "deepseek-v3", "deepseek_v3", "flat", moe=True, n_routed_experts=8, n_shared_experts=1,
        first_k_dense_replace=1, n_group=4, topk_group=2, **LATENT, **experts(count=8),
    ),
    model(
        "glm4-moe", "glm4_moe", "own", moe=True, n_routed_experts=4, n_shared_experts=1, use_qk_norm=True,
        head_dim=16, routed_scaling_factor=1.5, first_k_dense_replace=1, **experts(),
    ),
    model(
        "ernie4.5-moe", "ernie4_5_moe", "own", moe=True, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1,
        moe_layer_end_index=2, **experts(),
    ),
    model(
        "afmoe", "afmoe", "flat", moe=True, num_shared_experts=1, num_dense_layers=1, head_dim=16,
        num_hidden_layers=4, sliding_window=WINDOW, layer_types=[SLIDING, SLIDING, SLIDING, FULL], mup_enabled=True,
        route_scale=1.5, **experts(),
    ),
    model(
        "gemma4-moe", "gemma4_text", "flat", moe=True, num_hidden_layers=4,
        layer_types=[SLIDING, SLIDING, FULL, FULL], head_dim=16, global_head_dim=32, num_global_key_value_heads=1,
        attention_k_eq_v=True, sliding_window=WINDOW, hidden_size_per_layer_input=0, final_logit_softcapping=2.0,
        enable_moe_block=True, top_k_experts=2, idle=r"layers\.3\.layer_scalar", **experts(),
    ),
    model(
        "gpt-oss", "gpt_oss", "own", moe=True, head_dim=16, sliding_window=WINDOW,
        layer_types=[SLIDING, FULL, SLIDING],
        rope_parameters=rope(
            "yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=32,
        ),
        **experts(),
    ),
    model(
        "llama4", "llama4_text", "padded", moe=True, head_dim=16, num_hidden_layers=4, intermediate_size_mlp=96,
        moe_layers=[1, 3], no_rope_layers=[1, 1, 1, 0], attention_chunk_size=WINDOW, floor_scale=4,
        **experts(chosen=1),
    ),
    model(
        "flint", "flint", "own", moe=True, head_dim=16, sliding_window=WINDOW,
        layer_types=[FULL, SLIDING, SLIDING], shared_expert_intermediate_size=32, mlp_only_layers=[0], **experts(),
    ),
    model(
        "glm4-moe-lite", "glm4_moe_lite", "flat", moe=True, n_routed_experts=4, n_shared_experts=1,
        mlp_layer_types=["dense", "sparse", "sparse"], n_group=1, topk_group=1, **LATENT, **experts(),
    ),
    model(
        "granite-moe-shared", "granitemoeshared", "flat", moe=True, shared_intermediate_size=32, **GRANITE,
        **experts(),
    ),
    model(
        "dots1", "dots1", "own", moe=True, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1,
        topk_group=1, routed_scaling_factor=1.5, head_dim=16, sliding_window=WINDOW,
        layer_types=[FULL, SLIDING, FULL], **experts(),
    ),
    model(
        "hunyuan-moe", "hunyuan_v1_moe", "own", moe=True, head_dim=16, moe_topk=[2, 2, 2], num_shared_expert=1,
        **experts(),
    ),
    model(
        "exaone-moe", "exaone_moe", "own", moe=True, num_hidden_layers=4, sliding_window=WINDOW,
        layer_types=[SLIDING, SLIDING, SLIDING, FULL], first_k_dense_replace=1, num_shared_experts=1, n_group=1,
        topk_group=1, **experts(),
    ),
    model(
        "solar-open", "solar_open", "own", moe=True, n_routed_experts=4, n_shared_experts=1, head_dim=16, n_group=1,
        topk_group=1, **experts(),
    ),
]  # fmt: skip
