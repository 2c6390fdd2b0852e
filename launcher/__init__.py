"""The login node: compose, plan, submit, track, report. Imports no torch.

`cli` is the entry point: its table names the verbs of `verbs`, and `arguments` parses what follows a verb. `config` has the sections
`cluster` and `sweep`, `records` the values that the stages hand on, `plan_files` the plans on disk, `errors` what can go wrong, and
`installation` where packages and ``conf/`` lie. The rest are rooms: folders of modules whose own docstring names the way in.
`control.pipeline` calls the stages in order, so start reading there.
"""
