"""Second stage: a decision per run, and the packs that train what is left. Reads the disk and asks Slurm, changes nothing.

The way in is `planner.make_plan`: `decision` looks at each run, `routing` picks a partition, `packing` cuts packs, and `refusal`
explains what fits nowhere. A new reason to train a run or to leave it alone belongs in `decision.decide`, a new setting that saves
memory in `refusal.changes`.
"""
