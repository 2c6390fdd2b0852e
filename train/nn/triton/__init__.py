"""Kernels of our own, in Triton, for GPUs from sm_80 on.

Triton comes with torch where there is a GPU; the trainer imports these modules there alone (`train.nn.backends` decides). What holds
for all of them:
- Sums run in a fixed order, without atomics: the same bits every time.
- Which kernels are compiled depends on features, heads and ranks alone, never on tokens or runs: what one micro-batch has used is there
  when another one is captured in a CUDA graph (`train.nn.gradients`), where nothing can be compiled or loaded.
- A NaN stays in its run, and what else lies in a micro-batch changes no bit of a run's results; but for the last ones of the adapters'
  gradients from some 1,000 tokens a run on, which `grouped.outer` adds up in as many parts as the micro-batch leaves programs for.
"""
