"""The process of a job: signals, Slurm, attempts, what it is doing, and where its peers are. Light: no torch."""
