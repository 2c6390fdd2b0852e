"""LoRA adapters, in reading order:

    targets      which modules a configuration adapts, with what rank and scaling: PEFT's rules
    parameters   `theta`: the adapters of all runs of a pack in one matrix, and the stacks that the base computes with
    peft_forms   how PEFT is told which modules those are: the first form that it resolves to exactly them
    loadable     targets that PEFT is known to load over a model, remembered in the cache
    peft_files   an adapter in PEFT's own files

A key that decides which modules are adapted, or how strongly, is read in `targets`, and `peft_forms` writes it for PEFT.
"""
