"""What compress() raises: a refusal before any work, or a failure during it."""

from __future__ import annotations


class CompressError(RuntimeError):
    """A stage, an evaluation or a file failed; chained from the cause.

    The message names the stage and the cause, says what is kept on the disk, and how to go on.
    """


class PreflightError(CompressError, ValueError):
    """Something that compress() was given cannot work; nothing was trained, converted or written."""
