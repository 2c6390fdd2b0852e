"""The instruction set that this project writes itself (``builtin:tasks``).

`kinds` has the kinds of task, and `generate` writes ``train.jsonl`` and ``heldout.jsonl`` from them.
"""
