"""What people see in the terminal: tables, progress, units, Ctrl-C."""
