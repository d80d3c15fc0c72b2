"""Files that are there whole or not at all: written under a temporary name beside the target, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SUFFIX = ".partial"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`, for the body to write a file at.

    When the body is done the file is flushed to the disk and takes the place of `path` in one step: whoever opens
    `path`, also after a power failure, finds the old file or the new one. Where anything fails, the body included, the
    old file stays and the temporary one is removed; only a killed process leaves it, see remove_partial.

    >>> with replacing("run.json") as temporary:
    ...     temporary.write_text(text)

    Raises:
        FileNotFoundError: there is no such folder, or the body wrote no file.
        OSError: as the system says, a full disk among others.
    """
    target = Path(os.path.realpath(path))  # a link stays one, its target is replaced
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {target.parent}; make it first")
    temporary = target.parent / f".{target.name[:200]}.{secrets.token_hex(4)}{_SUFFIX}"
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    with suppress(OSError):  # the new file is in place; some file systems cannot flush a folder
        _flush(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file (UTF-8) whole or not at all; see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def remove_partial(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove what killed processes left in `folder`, and return it. Only where no other process writes there."""
    left = [path for path in Path(folder).iterdir() if path.name.startswith(".") and path.name.endswith(_SUFFIX)]
    for path in left:
        path.unlink(missing_ok=True)
    return left


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
