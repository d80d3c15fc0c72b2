"""Which transformers ``pycompress.hf`` works with, and its import where it will be needed; imports neither itself."""

from __future__ import annotations

import importlib
import re
import sys
from importlib import metadata

OLDEST = (4, 50)


def why_not() -> str:
    """Why pycompress.hf cannot be used with the transformers that is installed; empty where it can."""
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return "transformers is not installed; pip install 'pycompress[hf]'"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) >= OLDEST:
        return ""
    oldest = ".".join(map(str, OLDEST))
    return f"transformers {version} is installed and {oldest} or newer is needed; pip install 'transformers>={oldest}'"


def import_where_used() -> None:
    """Import pycompress.hf in a process that has models of transformers: their save_pretrained then says what they are.

    With a transformers that pycompress.hf does not work with nothing happens: compressing needs none.
    """
    if "transformers.modeling_utils" in sys.modules and "pycompress.hf" not in sys.modules and not why_not():
        importlib.import_module("pycompress.hf")
