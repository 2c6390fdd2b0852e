"""Weights & Biases as a view of the journals: a process beside the trainer, and the same code on the login node.

    job (child) -> supervisor -> worker: follows the journals of a pack   `python -m train.mirror follow PACK_JSON`
    launcher sync -> uploader: brings whole journals up to date           `python -m train.mirror sync`

The trainer writes journals and never waits for W&B; whatever happens here costs it nothing.
"""
