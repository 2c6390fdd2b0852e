"""Dense decoders that share Llama's outline: attention with rotations and one feed-forward network per layer."""

from __future__ import annotations

from architectures.entry import FULL, GRANITE, SIZES, SLIDING, TOKENS, VOCABULARY, WINDOW, Architecture, model, rope

# Factors per pair of rotated dimensions, as Phi-3's checkpoints for long texts have.
LONG_ROPE = {
    "short_factor": [1.0, 1.3, 1.6, 2.0, 2.5, 3.0, 3.5, 4.0],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0, 9.0],
}
GEMMA3 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
    "sliding_window": WINDOW,
    "rope_parameters": {SLIDING: rope(), FULL: rope("linear", 1e6, factor=8.0)},
}

ARCHITECTURES = [
    model("llama", "llama", "own", rope_parameters=rope()),
    model("llama-biases", "llama", "own", attention_bias=True, mlp_bias=True),
    model("llama-tied", "llama", "own", tie_word_embeddings=True, num_key_value_heads=1),
    model(
        "llama-llama3-rope", "llama", "own",
        rope_parameters=rope(
            "llama3", 100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    model("llama-yarn", "llama", "own", rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    model("llama-dynamic-rope", "llama", "own", rope_parameters=rope("dynamic", factor=2.0)),
    model("mistral", "mistral", "own", sliding_window=WINDOW),
    model("ministral", "ministral", "own", head_dim=16, sliding_window=WINDOW, layer_types=[SLIDING, FULL, SLIDING]),
    model(
        "ministral3", "ministral3", "own", head_dim=24, max_position_embeddings=32,
        rope_parameters=rope(
            "yarn", 1e6, factor=4.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
            llama_4_scaling_beta=0.3, original_max_position_embeddings=8,
        ),
    ),
    model("qwen2", "qwen2", "own", tie_word_embeddings=True),
    model(
        "qwen2-sliding", "qwen2", "own", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1,
        layer_types=[FULL, SLIDING, SLIDING],
    ),
    model("qwen3", "qwen3", "own", head_dim=24),
    model("internlm3", "internlm3", "own", head_dim=16, attention_bias=True, mlp_bias=True),
    model("seed-oss", "seed_oss", "own", head_dim=24, attention_dropout=0.0, residual_dropout=0.0),
    model("iquestcoder", "iquestcoder", "own", head_dim=16),
    model("gemma", "gemma", "own", head_dim=24, num_key_value_heads=1, tie_word_embeddings=True),
    model(
        "gemma2", "gemma2", "own", head_dim=16, query_pre_attn_scalar=24, sliding_window=WINDOW,
        layer_types=[SLIDING, FULL, SLIDING], attn_logit_softcapping=1.0, final_logit_softcapping=2.0,
    ),
    model("gemma3-text", "gemma3_text", "own", **GEMMA3),
    Architecture(
        "gemma3", "gemma3", "own",
        {
            "text_config": SIZES | TOKENS | GEMMA3,
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 8,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 200,
            "eoi_token_index": 201,
            "image_token_index": 202,
        },
        idle=r"vision|projector",
    ),
    model(
        "gemma4-dense", "gemma4_text", "own", num_hidden_layers=4, layer_types=[SLIDING, SLIDING, FULL, FULL],
        head_dim=16, global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=WINDOW,
        hidden_size_per_layer_input=0, final_logit_softcapping=2.0, idle=r"layers\.3\.layer_scalar",
    ),
    model(
        "gemma4-small", "gemma4_text", "flat", num_hidden_layers=6,
        layer_types=[SLIDING, FULL, SLIDING, FULL, SLIDING, FULL], head_dim=16, global_head_dim=32,
        sliding_window=WINDOW, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8,
        num_kv_shared_layers=2, use_double_wide_mlp=True, final_logit_softcapping=2.0,
        idle=r"layers\.5\.layer_scalar",
    ),
    model(
        "gemma3n", "gemma3n_text", "flat", num_hidden_layers=6,
        layer_types=[SLIDING, FULL, SLIDING, FULL, SLIDING, FULL], head_dim=16, sliding_window=WINDOW,
        vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8, num_kv_shared_layers=2, laurel_rank=4,
        altup_num_inputs=3, final_logit_softcapping=2.0, intermediate_size=[96] * 6,
        activation_sparsity_pattern=[0.9, 0.9, 0.0, 0.0, 0.0, 0.0],
    ),
    model(
        "vaultgemma", "vaultgemma", "own", head_dim=16, query_pre_attn_scalar=24, sliding_window=WINDOW,
        layer_types=[SLIDING, FULL, SLIDING], attn_logit_softcapping=1.0, final_logit_softcapping=2.0,
    ),
    model("phi3", "phi3", "own", sliding_window=WINDOW),
    model(
        "phi3-longrope", "phi3", "own", original_max_position_embeddings=32,
        rope_parameters=rope("longrope", original_max_position_embeddings=32, **LONG_ROPE),
    ),
    # Sequences on both sides of the length where the factors change: a token's rotation hangs on what comes later.
    model(
        "phi3-longrope-crossing", "phi3", "own", causal=False, original_max_position_embeddings=12,
        rope_parameters=rope("longrope", original_max_position_embeddings=12, **LONG_ROPE),
    ),
    model(
        "phi4-mini", "phi3", "own", tie_word_embeddings=True, head_dim=16,
        rope_parameters=rope(partial_rotary_factor=0.75),
    ),
    model("olmo", "olmo", "own", clip_qkv=1.0),
    model("olmo2", "olmo2", "own", attention_bias=True),
    model("olmo3", "olmo3", "own", sliding_window=WINDOW, layer_types=[SLIDING, SLIDING, FULL]),
    model("granite", "granite", "own", **GRANITE),
    model("smollm3", "smollm3", "own", num_hidden_layers=4, no_rope_layers=[1, 1, 0, 1], tie_word_embeddings=True),
    model("hyperclovax", "hyperclovax", "own", head_dim=16, **GRANITE),
    model("granite-swa", "granite_swa", "own", sliding_window=WINDOW, layer_types=[FULL, SLIDING, SLIDING],
           layer_rope_theta=[10_000.0, 1000.0, 100.0], **GRANITE),
    model("glm", "glm", "own", head_dim=16),
    model("glm4", "glm4", "own", head_dim=16),
    model("cohere", "cohere", "own", logit_scale=0.3, use_qk_norm=False),
    model("cohere-qk-norm", "cohere", "own", logit_scale=0.3, use_qk_norm=True),
    model(
        "cohere2", "cohere2", "own", logit_scale=0.3, head_dim=16, sliding_window=WINDOW,
        layer_types=[SLIDING, SLIDING, FULL],
    ),
    model("nemotron", "nemotron", "own", head_dim=16),
    model("stablelm", "stablelm", "own", use_qkv_bias=True),
    model("stablelm-parallel", "stablelm", "own", use_parallel_residual=True, qk_layernorm=True),
    model("starcoder2", "starcoder2", "own", sliding_window=WINDOW),
    model(
        "exaone4", "exaone4", "own", num_hidden_layers=4, sliding_window=WINDOW,
        layer_types=[SLIDING, SLIDING, SLIDING, FULL],
    ),
    model("arcee", "arcee", "own", head_dim=16),
    model("apertus", "apertus", "own", rope_parameters=rope()),
    model("helium", "helium", "own", head_dim=16),
    model("hunyuan", "hunyuan_v1_dense", "own", head_dim=16),
    model("ernie4.5", "ernie4_5", "own", head_dim=24, use_bias=True),
    model("jais2", "jais2", "own", head_dim=16),
]  # fmt: skip
