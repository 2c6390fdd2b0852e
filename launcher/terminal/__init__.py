"""What people see in the terminal: tables, progress, numbers with units, Ctrl-C.

`tables` prints plans, states and sweeps, `progress` shows runs in training, `units` formats numbers, `interrupts` counts Ctrl-C. A new
column of ``status`` belongs in `tables.print_statuses`.
"""
