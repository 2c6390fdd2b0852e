"""Compare the finished runs of a sweep: which configuration won, by how much, and how sure that is.

The way in is `writer.write_report`. `axes` finds what differs, `curves` reads journals, and `noise` says how far the lead can be
trusted. `table`, `html_page` and `plots` show the `comparison.Report`. On Slurm, `job` submits a job that writes it.

A new column of the terminal's table belongs in `table.MEASURES`, and its field in `comparison.FinishedRun`; a column of the page in
``page/table.js``; a new PNG in `plots.draw_plots`.
"""
