"""The room that alone knows submitit and Slurm's commands.

`choice` decides where jobs run; `local` runs them on this machine; `slurm`, `requests` and `queue` submit and follow them on a
cluster; `inventory` asks what the cluster has, and `partitions` which of it packs may go to; `commands` asks Slurm with time-outs,
`states` and `words` translate what it says.
"""
