"""Base models: from `model.source` to a checked folder, and from there to a model on the device. In reading order:

    source        what `model.source` means, its folder in the cache, its fingerprint in run ids
    staging       fetches, converts or builds that folder, once; `locking` lets others wait
    hub           whether the Hugging Face hub can be reached
    gguf_package  a GGUF file in a Python package, converted
    tiny          the random model of `builtin:tiny`
    folder        what a model folder must hold, and whether its weights are whole
    facts         what is known of a model from its configuration, kept in the cache
    anatomy       where decoder and layers of a model are, whatever its class
    modalities    models that also see or hear: how they are loaded, with towers of one layer
    linears       which modules are linear layers
    experts       which parameters are stacks of experts
    loading       decoder and tokenizer by transformers' loaders, and whether its files fit
    layer_kinds   models with fewer layers of every kind
    narrowing     and with smaller sizes
    reference_code  transformers' own code in the place of other packages' kernels
    copies        both together: what `train.nn.judge` measures
    nf4           the only file that knows bitsandbytes
    quantized     a base in 4 bits as tensors by name
    quantizing    from the files of a model to such a base, a weight at a time
    base_cache    bases quantized once per cluster

Another kind of source belongs in `source.source_kind` and `staging`. No model is refused here by its name: `train.nn.judge` measures.
"""
