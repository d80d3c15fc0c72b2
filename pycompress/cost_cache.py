"""The cost model on disk: one JSON file for each machine, instruction set, number of threads and version, and each GPU.

    $PYCOMPRESS_CACHE | $XDG_CACHE_HOME/pycompress | ~/.cache/pycompress  /  cost_model-<key>.json

A file that is damaged, of another key or not readable is as good as none, with a warning; a folder that cannot be
written to leaves the model in the process. PYCOMPRESS_COST_MODEL names a file to be used instead of all this, or
"builtin".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pycompress import _native
from pycompress.cost_builtin import BUILTIN_FITS
from pycompress.cost_core import DTYPES, FORMS, CostModel, Fit, Shape
from pycompress.cost_gpu import GPU_COUNTS, GPU_DTYPES, GPU_FIGURES
from pycompress.version import __version__

_FORMAT = "pycompress.cost_model"
VERSION = 3  # of the file and of what is counted
Fits = Mapping[tuple[str, str], Fit]
OVERRIDE = "PYCOMPRESS_COST_MODEL"
BUILTIN = "builtin"


def override() -> str:
    """What PYCOMPRESS_COST_MODEL says; empty where it is not set."""
    return os.environ.get(OVERRIDE, "")


def machine_key(threads: int) -> dict[str, Any]:
    """What the times depend on besides the layer."""
    from pycompress.info import cpu_name

    return {
        "cpu": cpu_name(),
        "isa": _native.selected_isa(),
        "threads": threads,
        "torch": torch.__version__,
        "pycompress": __version__,
        "version": VERSION,
    }


def cache_dir() -> Path:
    if own := os.environ.get("PYCOMPRESS_CACHE"):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "pycompress"
    try:
        return Path.home() / ".cache" / "pycompress"
    except RuntimeError:  # a user without a home, as in many containers
        return Path(tempfile.gettempdir()) / "pycompress"


def cache_path(key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / f"cost_model-{digest}.json"


def to_json(model: CostModel, key: dict[str, Any]) -> str:
    """What was measured; the built-in figures stay in the package."""
    fits = {
        f"{dtype} {form}": {"tokens": f.tokens, "rows": f.rows}
        for (dtype, form), f in model.fits.items()
        if dtype in model.measured
    }
    content = {
        "format": _FORMAT,
        "version": VERSION,
        "key": key,
        "measured": sorted(model.measured),
        "fits": fits,
        "corrections": [[list(k), m, ratio] for k, m, ratio in model.corrections],
    }
    return json.dumps(content)


def from_json(text: str, key: dict[str, Any] | None = None, builtin: Fits = BUILTIN_FITS) -> CostModel:
    """The model with built-in figures for what was not measured.

    Raises ValueError on anything that to_json did not write, or wrote for another key.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT or content.get("version") != VERSION:
        raise ValueError(f"no {_FORMAT!r} file of version {VERSION}")
    if key is not None and content.get("key") != key:
        raise ValueError(f"it is of {content.get('key')}, not of {key}")
    try:
        of_gpu = "gpu" in content["key"]
        fits = {_fit_key(name, of_gpu): _checked_fit(name, value, of_gpu) for name, value in content["fits"].items()}
        measured = frozenset(str(dtype) for dtype in content["measured"])
        machine = content["key"] if of_gpu else None
        threads = 1 if of_gpu else int(content["key"]["threads"])
        model = CostModel({**builtin, **fits}, threads=threads, measured=measured, machine=machine)
        model.restore([(tuple(k), int(m), _positive(ratio)) for k, m, ratio in content["corrections"]])
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"it lacks a part, or has one of the wrong kind ({error!r})") from error
    for dtype in measured:
        if any((dtype, form) not in fits for form in (("bitmap", "dense") if of_gpu else FORMS)):
            raise ValueError(f"it lacks a form of {dtype}")
    return model


def _fit_key(name: str, of_gpu: bool) -> tuple[str, str]:
    dtype, _, form = name.partition(" ")
    if dtype not in (GPU_DTYPES if of_gpu else DTYPES) or form not in (GPU_FIGURES if of_gpu else FORMS):
        raise ValueError(f"it has figures for {name!r}")
    return dtype, form


def _checked_fit(name: str, value: dict[str, Any], of_gpu: bool) -> Fit:
    tokens = tuple(int(m) for m in value["tokens"])
    rows = tuple(tuple(float(c) for c in row) for row in value["rows"])
    dtype, _, form = name.partition(" ")
    width = GPU_COUNTS if of_gpu else len(Shape.random(8, 8, 0.5, dtype).counts(form))
    sound = len(tokens) == len(rows) > 0 and all(a < b for a, b in zip((0, *tokens), tokens, strict=False))
    sound = sound and all(len(row) == width and max(row) > 0 for row in rows)
    if not sound or not all(math.isfinite(c) and c >= 0 for row in rows for c in row):
        raise ValueError(f"its figures for {name!r} are damaged")
    return Fit(tokens, rows)


def _positive(ratio: object) -> float:
    if not isinstance(ratio, (int, float)) or not 0 < ratio < math.inf:
        raise ValueError(f"a correction is {ratio!r}")
    return float(ratio)


def load(threads: int) -> CostModel | None:
    """The model cached for this CPU, or None, see load_of."""
    return load_of(machine_key(threads), BUILTIN_FITS)


def load_of(key: dict[str, Any], builtin: Fits) -> CostModel | None:
    """The model cached for a machine, or None: there is none yet, or the file is of no use (then a warning)."""
    path = cache_path(key)
    try:
        return from_json(path.read_text(encoding="utf-8"), key, builtin)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"pycompress: the cost model in {path} is ignored: {error}", stacklevel=2)
        return None


def load_override() -> CostModel:
    """The model in the file that PYCOMPRESS_COST_MODEL names. Raises ValueError where it cannot be used."""
    path = override()
    try:
        return from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cost_model: {OVERRIDE}={path!r} cannot be used: {error}; expected {BUILTIN!r} or a file that "
            "calibrate_cost_model wrote"
        ) from error


def save(model: CostModel) -> Path | None:
    """Writes the model, whole or not at all; None where there is nowhere to write."""
    key = model.machine or machine_key(model.threads)
    path = cache_path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    except OSError:
        return None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(to_json(model, key))
        os.replace(temporary, path)
    except OSError:  # the disk is full
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        return None
    return path
