"""Everything that knows submitit and Slurm's commands.

The ways in: `partitions` (where packs may go, Slurm or this machine), `slurm` (submit and cancel there), `local` (train here),
`queue` (what Slurm says of jobs) and `inventory` (what the cluster has). Below them, `arrays` and `requests` hold what is
submitted as values, `sbatch` makes one call, `commands` runs commands with time-outs, `parsing` and `states` translate output.

What comes next belongs here: a new Slurm state in `states.SLURM_STATES`, another field of scontrol or sinfo in `parsing`, another
option of sbatch in `requests.sbatch_parameters`.
"""
