"""Kernels of our own, in Triton, for GPUs from sm_80 on.

Triton comes with torch where there is a GPU; the trainer imports these modules there alone (`train.kernels` decides). What holds
for all of them:
- Sums run in a fixed order, without atomics: the same bits every time.
- Which kernels are compiled depends on features, heads and ranks alone, never on tokens or runs: what one micro-batch has used is there
  when another one is captured in a CUDA graph (`train.graphs`), where nothing can be compiled or loaded.
- What else lies in a micro-batch changes no bit of a run's results, and a NaN stays in its run.
"""
