"""What a user should know about a cluster and a machine before the first sweep.

The way in is `examine.examine`. `advice` turns Slurm's settings into sentences, `machine` looks at this machine, and `site` writes a
configuration file. A new check of the machine belongs in `machine.machine_advice`, a new sentence on Slurm in `advice`.
"""
