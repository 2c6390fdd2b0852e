"""The computation of a pack: attention, linear layers, loss and gradients over flat tokens of many runs."""
