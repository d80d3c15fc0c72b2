"""The random number generators of torch, numpy and Python: seeded together, saved and put back."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORDS = 624  # of a Mersenne Twister's state, numpy's and Python's alike


def seed_of(*parts: int | str) -> int:
    """A seed, 0 <= seed < 2**63, in which every part counts: seeds 1, 2 of epochs 2, 1 have nothing in common."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(seed: int) -> None:
    """Seed torch (with its GPUs), numpy and Python."""
    # Not torch.manual_seed: without a GPU it keeps each seed, with a printed stack, for the day there is one.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (what a user's dataset draws from)
    random.seed(seed)


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON that `set_rng_state` takes. The GPUs are those that torch has used in this process."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors.update((f"cuda.{i}", state) for i, state in enumerate(torch.cuda.get_rng_state_all()))
    kind, words, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    assert kind == "MT19937"
    tensors["numpy"] = torch.from_numpy(np.asarray(words).astype(np.int64))
    version, python, python_gauss = random.getstate()
    tensors["python"] = torch.tensor(python[:-1], dtype=torch.int64)
    meta = {
        "numpy": [int(position), int(has_gauss), float(gauss).hex()],
        "python": [version, python[-1], None if python_gauss is None else python_gauss.hex()],
    }
    return tensors, meta


def set_rng_state(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Raises ValueError for what `rng_state` did not give; nothing is changed then."""
    before = rng_state()
    try:
        _set(tensors, meta)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        _set(*before)
        raise ValueError(f"the state of the random number generators is damaged ({error})") from error


def _set(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    for name in ("numpy", "python"):
        if tensors[name].shape != (_WORDS,):
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; expected ({_WORDS},)")
    position, has_gauss, gauss = meta["numpy"]
    words = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, int(position), int(has_gauss), float.fromhex(gauss)))  # noqa: NPY002
    version, index, python_gauss = meta["python"]
    next_gauss = None if python_gauss is None else float.fromhex(python_gauss)
    random.setstate((version, (*tensors["python"].tolist(), index), next_gauss))
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{i}" in tensors:  # else the run began on a machine with fewer
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)


@contextmanager
def keeping_all_rng() -> Iterator[None]:
    """All generators are afterwards what they were."""
    before = rng_state()
    try:
        yield
    finally:
        set_rng_state(*before)
