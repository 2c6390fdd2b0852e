"""Verbs that run a program of `train` in a process of its own, because it needs torch or wandb."""
