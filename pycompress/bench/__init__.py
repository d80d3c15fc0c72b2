"""Benchmarks: `pycompress bench NAME` runs `pycompress.bench.NAME.main`.

timing.py    round-robin timing of several callables in one process
memory.py    peak extra memory of one call
rows.py      one result = one row of a CSV
provider.py  who is measured: a library that may be absent, and the rows it gives
figures.py   the figures to reach, and parts of tables;  options.py  of the command line;  roofline.py  a plot
NAME.py, NAME_providers.py, NAME_run.py, NAME_summary.py, ...    one operation: what runs, against whom, what it shows
"""
