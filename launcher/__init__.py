"""The login node: compose, plan, submit, track, report. Imports no torch."""
