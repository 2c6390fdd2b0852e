"""Our Triton kernels, for GPUs from sm_80 on: `activations`, `attention`, `functional`, `grouped_mm` and `heads` stand in for the
modules of `train.nn` of the same names.

Triton comes with PyTorch on machines with a GPU, and these modules are imported only there (`train.nn.backends` decides). All of them
keep these rules:
- Sums run in a fixed order, without atomics: the same bits every time.
- Which kernels are compiled depends on features, heads and ranks alone, never on tokens or runs. So what one micro-batch has used is
  ready when another one is captured in a CUDA graph (`train.nn.gradients`), where nothing can be compiled or loaded.
- A NaN stays in its run, and the rest of a micro-batch changes no bit of a run's results. One exception: from some 1,000 tokens per run
  on, the last bits of the adapters' gradients, which `grouped_mm.outer_grad` sums in as many parts as the micro-batch leaves
  programs for.
"""
