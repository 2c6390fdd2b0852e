"""Benchmarks of lorapack beside its peers, on one GPU: see README.md in this folder."""
