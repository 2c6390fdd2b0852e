"""Weights & Biases as a view of the journals: a process next to the trainer, and the same code on the login node.

    job -> supervisor -> worker: follows the journals of a pack    `python -m train.mirror follow PACK_JSON`
    launcher sync -> upload: brings whole journals up to date      `python -m train.mirror sync`

The trainer writes journals and never waits for W&B. Whatever happens here costs it nothing. In reading order:

    child         the trainer's side: start the mirror, keep it alive, end it
    worker        follows the journals of a pack
    upload        what ``launcher sync`` runs
    request       which runs are shown, in which W&B project, with which configuration and summary
    reach         whether W&B can be reached from here, and with which key
    rows          journal and pace as the rows of W&B
    run_mirror    one run on its way to W&B, online or offline
    memory        what is remembered on disk of how far W&B has a run
    client        the only file that imports W&B's client
    dashboard     a W&B workspace for one sweep
"""
