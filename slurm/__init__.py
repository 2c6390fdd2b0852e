"""A real small Slurm on one machine, for development and tests. The way in is the program ``slurm/cluster``."""
