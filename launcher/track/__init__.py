"""Where every run is, read from its files and from Slurm.

The way in is `tracker.track`. `jobs` finds the job of each run, `logs` reads what jobs wrote, `find` turns what the user types into a
sweep or a run. A new column of ``status`` is a field of `launcher.records.RunStatus`, filled in `tracker`.
"""
