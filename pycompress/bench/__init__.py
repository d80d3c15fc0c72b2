"""Benchmarks: `pycompress bench NAME` runs `pycompress.bench.NAME.main`.

timing.py    round-robin timing of several callables in one process
rows.py      one result = one row of a CSV
roofline.py  the plot of such a CSV
NAME.py, NAME_providers.py, NAME_summary.py    one operation: what runs, against whom, what it shows
"""
