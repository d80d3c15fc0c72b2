"""The folder of a run: who may work in it, and its files, each there whole or not at all.

    run.json                the state, see run_state.py
    history.jsonl           losses, see history.py
    stages/<i>-<name>.safetensors   the model after stage i
    checkpoint.safetensors  the running training stage, see checkpoint.py
    model.safetensors       the final model, in its smallest form
    lock                    held while a process works here; its content is that process's number
"""

from __future__ import annotations

import fcntl
import os
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from pycompress.atomic_file import remove_partial, write_text
from pycompress.workflow.errors import PreflightError
from pycompress.workflow.run_state import RunState

_OURS = ("history.jsonl", "checkpoint.safetensors", "model.safetensors", "report.html", "report.json", "stages")
_open_here: set[str] = set()  # the system's lock is a process's: it would let a second run of this process in
_BLOCK = 1 << 20


class RunFolder:
    """Entered, the folder exists and is this process's alone; left, the lock is free again.

    A folder that this made and in which nothing was written is gone afterwards.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()  # whatever eval_fn does to the working directory
        self._made: list[Path] = []
        self._lock: int | None = None
        self._key = ""

    # ---- names ------------------------------------------------------------------------------------------------

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def history(self) -> Path:
        return self.path / "history.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    def stage(self, index: int, name: str) -> Path:
        return self.path / "stages" / f"{index}-{name}.safetensors"

    # ---- the lock ---------------------------------------------------------------------------------------------

    def __enter__(self) -> RunFolder:
        try:
            self._make()
            self._take_lock()
        except PreflightError:
            self._remove_made()
            raise
        except OSError as error:
            self._remove_made()
            raise PreflightError(
                f"compress: out={str(self.path)!r} cannot be written to: {error.strerror or error}; "
                "choose another folder"
            ) from error
        return self

    def _make(self) -> None:
        for folder in reversed((self.path, *self.path.parents)):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                self._made.append(folder)
        if not self.path.is_dir():
            raise PreflightError(f"compress: out={str(self.path)!r} is a file; expected a folder, or a new name")

    def _take_lock(self) -> None:
        self._key = os.path.realpath(self.path)
        taken = "" if self._key not in _open_here else "this process"
        if not taken:
            # A record lock, not flock: workers of a DataLoader, which are forks, would hold that one on.
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                number = os.read(handle, 32).decode(errors="replace").strip()
                os.close(handle)
                taken = f"process {number}" if number else "another process"
            except OSError:
                pass  # a file system without locks
        if taken:
            raise PreflightError(
                f"compress: {taken} is working in out={str(self.path)!r}; wait for it, stop it, or take another folder"
            )
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        self._lock = handle
        _open_here.add(self._key)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._made and set(os.listdir(self.path)) <= {"lock"}:
            with suppress(OSError):
                (self.path / "lock").unlink()
            self._remove_made()
        _open_here.discard(self._key)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            with suppress(OSError):  # someone else has put something there
                folder.rmdir()

    # ---- run.json ---------------------------------------------------------------------------------------------

    def read(self) -> RunState | None:
        """The state, or None for a folder without a run. Raises PreflightError where there is something else."""
        remedy = "resume=False (--restart) starts anew in this folder, another out elsewhere"
        try:
            text = self.run_json.read_text(encoding="utf-8")
        except FileNotFoundError:
            if found := next((name for name in _OURS if (self.path / name).exists()), None):
                raise PreflightError(
                    f"compress: out={str(self.path)!r} holds {found} and no run.json, so it is no run of compress(); "
                    "choose an empty folder, or remove that"
                ) from None
            return None
        except (OSError, ValueError) as error:
            raise PreflightError(f"compress: {self.run_json} cannot be read ({error}); {remedy}") from error
        try:
            return RunState.from_json(text)
        except ValueError as error:
            raise PreflightError(f"compress: {self.run_json} {error}; {remedy}") from error

    def write(self, state: RunState) -> None:
        write_text(self.run_json, state.to_json())

    # ---- files ------------------------------------------------------------------------------------------------

    def clean(self) -> None:
        """Make the folder of the stages, and remove what killed processes left half-written."""
        stages = self.path / "stages"
        stages.mkdir(exist_ok=True)
        remove_partial(self.path)
        remove_partial(stages)

    def remove_run(self) -> None:
        """Everything of an earlier run but run.json."""
        for name in _OURS:
            if name == "stages":
                for path in (self.path / name).glob("*.safetensors"):
                    path.unlink()
            else:
                (self.path / name).unlink(missing_ok=True)

    def mark(self, path: Path) -> dict[str, int]:
        """{"bytes", "crc32"} of a file, by which damage to it shows."""
        crc = size = 0
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                crc, size = zlib.crc32(block, crc), size + len(block)
        return {"bytes": size, "crc32": crc}

    def damage(self, path: Path, state: RunState) -> str | None:
        """What is wrong with a file that the state knows; None where it is as it was written."""
        expected = state.files.get(self.name_of(path))
        if expected is None:
            return "is not known to run.json"
        try:
            found = self.mark(path)
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if found["bytes"] != expected["bytes"]:
            return f"is damaged: it has {found['bytes']} bytes, {expected['bytes']} were written"
        return None if found == expected else "is damaged: its checksum does not fit"

    def name_of(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.path).free
