"""LoRA adapters, in reading order:

    targets      which modules a configuration adapts, with what rank and scaling: PEFT's rules
    parameters   `theta`: the adapters of all runs of a pack in one matrix, and the stacks that the base computes with
    peft_files   an adapter in PEFT's own files

A key that decides which modules are adapted, or how strongly, is read in `targets`, and `peft_files.peft_config` writes it for PEFT.
"""
