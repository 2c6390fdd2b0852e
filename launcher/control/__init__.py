"""The stages in order: one command from composing to the report, following jobs, stopping them."""
