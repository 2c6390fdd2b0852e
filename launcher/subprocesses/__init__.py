"""Verbs that run a program of `train` in a process of its own, because it needs torch or wandb.

`foreground` hands the terminal over (``merge``, ``chat``, ``dashboard``), and `sync` shows the progress of an upload. Another verb that
needs torch belongs in `foreground`.
"""
