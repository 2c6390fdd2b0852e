"""The room that alone knows submitit and Slurm's commands.

`choice` decides where jobs run; `local` runs them on this machine; `commands` asks Slurm, `states` translates its words.
"""
