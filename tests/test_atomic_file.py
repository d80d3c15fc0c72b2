"""replacing: a file is the old one or the new one, whatever happens in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pycompress import atomic_file
from pycompress.atomic_file import remove_partial, replacing, write_text


def test_replaces_the_file_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), ValueError("x")], ids=repr)
def test_an_error_leaves_the_old_file_and_nothing_else(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_body_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "run.json"):
        pass
    assert not os.listdir(tmp_path)


def test_a_folder_that_is_not_there_and_one_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*; make it first"):
        write_text(tmp_path / "a" / "b", "x")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_text(tmp_path, "x")


def test_a_link_stays_one_and_permissions_are_as_usual(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "far" / "file")
    write_text(link, "x\n")
    assert link.is_symlink()
    assert (tmp_path / "far" / "file").read_bytes() == b"x\n"
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "far" / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    script = f"""
        import os, signal
        import runpy  # the file alone: pycompress imports torch
        with runpy.run_path({atomic_file.__file__!r})["replacing"]({str(path)!r}) as temporary:
            temporary.write_text("ne")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    code = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False).returncode
    assert code == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = remove_partial(tmp_path)
    assert left.name.startswith(".run.json.")
    assert os.listdir(tmp_path) == ["run.json"]
