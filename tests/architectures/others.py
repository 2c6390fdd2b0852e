"""Dense decoders that go other ways: learned or additive positions, one matrix for all heads, own attention."""

from __future__ import annotations

from architectures.entry import LATENT, SIZES, TOKENS, VOCABULARY, WINDOW, Architecture, model

GPT = TOKENS | {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
ARCHITECTURES = [
    model("bitnet", "bitnet", "flat"),
    model("nanochat", "nanochat", "flat", final_logit_softcapping=2.0),
    model("gpt-neox", "gpt_neox", "own"),
    model("gpt-neox-sequential", "gpt_neox", "own", use_parallel_residual=False),
    model("persimmon", "persimmon", "own", num_key_value_heads=4),
    model("opt", "opt", "flat", ffn_dim=96, word_embed_proj_dim=64, dropout=0.0, idle=r"k_proj\.bias"),
    model(
        "opt-350m", "opt", "flat", ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False, dropout=0.0,
        idle=r"k_proj\.bias",
    ),
    model("biogpt", "biogpt", "flat", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, idle=r"k_proj\.bias"),
    Architecture("gpt-bigcode", "gpt_bigcode", "flat", GPT),
    # Where a padding token is named, transformers loads its embedding as zeros.
    model("youtu", "youtu", "flat", **LATENT | {"pad_token_id": None}),
    model("minicpm3", "minicpm3", "flat", scale_emb=3, scale_depth=1.0, dim_model_base=32, **LATENT),
    model("diffllama", "diffllama", "flat", head_dim=16),
    Architecture("gpt2", "gpt2", "flat", GPT),
    Architecture("gptj", "gptj", "padded", GPT | {"rotary_dim": 8}),
    Architecture("codegen", "codegen", "padded", GPT | {"rotary_dim": 8, "n_ctx": 128}),
    model("bloom", "bloom", "padded", n_layer=3, n_head=4),
    model("falcon-7b", "falcon", "own", multi_query=True, parallel_attn=True),
    model("falcon-40b", "falcon", "own", new_decoder_architecture=True, num_kv_heads=2),
    model(
        "falcon-one-norm", "falcon", "own", new_decoder_architecture=True, num_kv_heads=1, num_ln_in_parallel_attn=1,
        bias=True,
    ),
    model("falcon-serial", "falcon", "own", multi_query=False, parallel_attn=False, num_kv_heads=4, bias=True),
    model(
        "falcon-alibi", "falcon", "padded", alibi=True, multi_query=False, parallel_attn=False, num_kv_heads=4,
        bias=True,
    ),
    model("phi", "phi", "own"),
    model("phi-qk-norm", "phi", "own", qk_layernorm=True),
    Architecture(
        "gpt-neo", "gpt_neo", "padded",
        SIZES | TOKENS | {
            "num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "local"], 1]],
            "window_size": WINDOW,
            "resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0,
        },
    ),
    Architecture(
        "xglm", "xglm", "padded",
        SIZES | TOKENS | {
            "d_model": 64, "ffn_dim": 96, "num_layers": 3, "attention_heads": 4, "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        idle=r"k_proj\.bias",
    ),
    Architecture(
        "mpt", "mpt", "padded", TOKENS | {"vocab_size": VOCABULARY, "d_model": 64, "n_heads": 4, "n_layers": 3,
        "max_seq_len": 128},
    ),
]  # fmt: skip
