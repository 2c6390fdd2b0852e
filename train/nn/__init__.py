"""The computation of a pack: one frozen base, the flat tokens of many runs, and each run's own adapter on its own tokens.

In reading order:

    backends         which kernels, dtype and memory a device offers; decided once per pack
    functional       norms with their gradients, and how formulas are computed: by torch or by a Triton kernel
    activations      the activations of a decoder's MLP, likewise
    forward_context  what attention and adapters look up during a forward; the key-value cache of a generation
    padding          between flat tokens and padded sequences, with gradients
    heads            the norms and rotations of queries and keys, likewise
    grouped_mm       products of each run's tokens with that run's own matrices
    dropout          LoRA dropout as a pure function of seed, step, module, token and feature
    linear           frozen linear layers that add each token's own adapter
    experts          mixtures of frozen experts: each token through the experts that it chose
    expert_forms     which form of experts a module computes, and its exchange
    varlen           the kernels that attend within flat sequences, and what they keep for their backward
    attention        causal attention that keeps sequences apart
    description      what a decoder computes, as data
    rotation         the rotary tables of a forward, and the heads in a fused projection's output
    attention_calls  the calls of attention in a trace, by transformers' interface or PyTorch's function
    tracing          what a small copy of a model computes, call by call
    matching         judging by numbers: equal tensors, factors, norms, and where a model keeps a number
    attention_reading  from a trace to the description of a layer's attention
    reading          from a trace to the description of a decoder
    kept             how many values per token a described decoder keeps for the backward
    decoder          our decoder on flat tokens, for every architecture that has a description
    head             the output head, with what a model does to its logits, measured
    loss             the cross-entropy of the targets with its gradient
    windows          which tokens each attention module of transformers' decoder sees, read off its masks
    stock_attention  PyTorch's attention as transformers' decoders call it
    transformers_decoder  transformers' own decoder, on flat tokens or on padded sequences
    packed_model     the base of a pack: loading, freezing and exchanging a model's parts
    gradients        one micro-batch forward and backward, directly or as a replayed CUDA graph
    probing          what the judge compares: numbers of stock transformers and of a packed model
    judge            which path computes a model, decided by these numbers
    facts            what is known of a model, measured
    base             the base of a pack, loaded, judged and packed
    generation       greedy answers of many runs at once
    triton/          the kernels behind functional, activations, heads, grouped_mm and attention, for GPUs from sm_80 on

A new model family needs no word here: `judge` takes the first path that computes it right, ours if `reading` finds its description.
What a description cannot say yet belongs in `description`, `reading` and `decoder`, with an entry in tests/architectures.
"""
