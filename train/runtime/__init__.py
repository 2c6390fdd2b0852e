"""The process of a job. Light: no torch.

    environment  what Python and torch read once, set before torch is imported
    signals      a signal sets a flag; the training loop looks at it
    slurm        why Slurm stops the job, and how the job asks to be queued again
    attempts     taking a run folder, giving up, and the line that says how an attempt ended
    activity     what the job is doing besides steps, for `status`
    rendezvous   where the processes of a job with several GPUs find each other
    backoff      pauses between tries to reach something

How an attempt can end is not here but in `train.store.causes`; `attempts.cause_of` finds it for an exception.
"""
