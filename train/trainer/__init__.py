"""The training of a pack: loop, sessions of runs, checkpoints, evaluation, optimizer, processes."""
