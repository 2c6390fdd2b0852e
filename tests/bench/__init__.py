"""Benchmarks of lorapack and its peers, on one GPU: see README.md in this folder."""
