"""LoRA adapters: which modules they adapt, the packed parameters of all runs, and PEFT's files."""
