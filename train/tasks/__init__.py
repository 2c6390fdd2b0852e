"""The instruction set that this project writes itself (``builtin:tasks``), and its generator."""
