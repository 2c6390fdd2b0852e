"""Base models: from `model.source` to a checked folder, and from there to a model on the device. In reading order:

    source        what `model.source` means, its folder in the cache, its fingerprint in run ids
    staging       fetches, converts or builds that folder, once; `locking` lets others wait
    hub           whether the Hugging Face hub can be reached
    gguf_package  a GGUF file in a Python package, converted
    tiny          the random model of `builtin:tiny`
    folder        what a model folder must hold, and the shapes in the headers of its weights
    architecture  what `config.json` alone rules out, on the login node
    anatomy       where decoder and layers of a model are, whatever its class
    modalities    models that also see or hear: how they are loaded, with towers of one layer
    linears       which modules are linear layers
    experts       which parameters are stacks of experts
    loading       decoder and tokenizer by transformers' loaders, and the checks on the meta device
    layer_kinds   models with fewer layers of every kind
    narrowing     and with smaller sizes
    copies        both together: what `train.nn.judge` measures
    nf4           the only file that knows bitsandbytes
    quantized     a base in 4 bits as tensors by name
    quantizing    from the files of a model to such a base, a weight at a time
    base_cache    bases quantized once per cluster

Another kind of source belongs in `source.source_kind` and `staging`. A model that must be refused belongs in
`architecture.UNLIKE_LLAMA` if its `config.json` shows it, and in `loading.refuse_unsupported` if not.
"""
