"""Rows: reading, rendering, tokenizing, sampling, and how a micro-batch lies in memory."""
