"""The training of a pack. In reading order:

    context        what all parts of a job's training share
    pack           from run folders to a running loop, in the main process and in workers
    base           how the frozen base fits on the device, and how it is opened
    pack_state     adapters and optimizer of the runs, built from checkpoints and copied out to them
    loop           evaluate, save, end, step: again and again, for all runs at once
    optim          schedules, clipping, AdamW and loss scales; row i of every tensor is run i
    session        one run: how far it is, and what is due
    run_writer     one run's files: journal, checkpoints, adapter, result
    recorder       numbers from the device to the journals, without waiting for the GPU
    evaluation     loss and exact match over the held-out rows
    samples        answers to a few held-out prompts
    checkpoint     what must survive, with a manifest
    process_group  one pack on several GPUs

A new measurement of a finished run belongs in `ResultRecord`, filled in `run_writer`, a number of every step in `recorder`.
"""
