"""The stages in order, for one command.

The way in is `pipeline.run_sweep`; `follow` shows jobs until they end, and `cancel` stops them. A new stage between planning and the
report belongs in `pipeline`, a new way to watch jobs in `follow`.
"""
