"""How much memory and time a pack takes on a device, by arithmetic, corrected by what earlier packs measured.

The way in is `forecaster.Forecaster`. `workload` says how much work a run is, `shapes` what a model weighs, `checking` how it is
computed, `catalogue` has the shipped models' numbers, `devices` where a pack can go, `arithmetic` puts them together, and `model_table`
makes the table of docs/models.md. A new GPU type belongs in `gpus.MODELS`, a shipped model in `catalogue.CATALOGUE`, a new usual model
size in `shapes.TYPICAL`.
"""
