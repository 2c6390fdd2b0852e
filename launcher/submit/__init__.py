"""Third stage: a plan becomes folders, frozen code and jobs.

The way in is `submission.submit`, or `submission.submit_to_slurm`. Before it, `prepare` fetches models and data; `freeze` copies the
code, and `frozen` reads a submitted sweep back for ``resume``. What a job needs to know belongs into its pack file, which
`submission` writes.
"""
