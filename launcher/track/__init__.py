"""Where every run is, read from its files and from Slurm.

The way in is `tracker.track`; `run_state` decides the state of a run without a result. `jobs` finds the job of each run, `logs` reads
what jobs wrote, and `find` turns what the user types into a sweep or a run. A new column of ``status`` is a field of
`launcher.records.RunStatus`, filled in `tracker`.
"""
