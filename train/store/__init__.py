"""Files below the root and the cache. Light: no torch.

    layout       every file name
    storage      the ways to write and read: whole files atomically, lines by appending
    record_file  documents on disk: read, checked, and refused if damaged or of a newer format
    line_file    the same for files that grow by lines
    records      what each JSON document holds
    journal      what the lines of the growing files hold: journal, pace, samples, attempts
    causes       how an attempt can end, and what follows
    lease        one live process per folder, with a heartbeat (`periodic` is its thread)
    permissions  whether others could write into a folder

A new file needs a name in `layout` and a model in `records`, or in `journal` for a ``.jsonl``.
"""
