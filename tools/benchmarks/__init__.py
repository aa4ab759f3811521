"""What `tools/benchmark.py` measures: one module per command, and the timing, flags and tables they share.

A command is a module with `add_flags(parser)`, `cases(flags)` (checks everything, before anything is measured),
`calls(case, flags)` (for the progress bar), `measure(case, flags, progress)` and `tables(rows)`.
"""
