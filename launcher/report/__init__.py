"""Last stage: the comparison of finished runs, as a table, a page and plots. The way in is `writer.write_report`."""
