"""A real small Slurm on one machine, for development and tests. The way in is the program ``slurm/cluster``.

`program` reads the command line, `box` starts and ends the cluster, `daemons` handles processes, `files` renders the configuration, and
`packages` prepares the machine.
"""
