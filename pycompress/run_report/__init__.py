"""`pycompress report RUN`: what a run of `compress` did to a model, as a page for people and as JSON.

read.py reads the run folder, collect.py says what is told of it, page.py puts it on a page, charts.py and
layer_charts.py draw, drawing.py is how.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from pycompress.atomic_file import write_text

__all__ = ["write_report"]


def write_report(run: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write report.json and report.html, and return the path of the latter.

    run: the folder of a run, finished or not. out: the folder to write to, made where it is missing; by default the
    run's own. report.html holds all that it shows; it has charts where matplotlib is installed, and says so elsewhere.

    Raises FileNotFoundError where there is no run, ValueError for a damaged one (nothing is written then), OSError
    where the files cannot be written.
    """
    from pycompress.run_report.collect import collect
    from pycompress.run_report.page import page_of
    from pycompress.run_report.read import read_run

    folder = Path(run if out is None else out)
    if folder.is_file():
        raise NotADirectoryError(f"report: out={str(folder)!r} is a file; expected a folder, or a new name")
    content = collect(read_run(run))
    page = page_of(content)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / "report.html", page)
    return folder / "report.html"
