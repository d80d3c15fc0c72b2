"""Ctrl-C, full disks and killed processes: what was finished is kept, and goes on to the same bits."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pycompress.workflow import CompressError
from pycompress.workflow.interrupt import Interrupt
from tests.workflow_runs import QUIET, STAGES, digest, fork, make_loader, run

pytestmark = pytest.mark.usefixtures("one_thread", "no_machine")
REPOSITORY = Path(__file__).parent.parent


# ---- Ctrl-C -----------------------------------------------------------------------------------------------------


class PressingLoader:
    """Batches, during which Ctrl-C is pressed: `times` before batch number `at`."""

    def __init__(self, at: int, times: int = 1, dies: bool = False) -> None:
        self.at, self.times, self.dies, self.count = at, times, dies, 0

    def __len__(self) -> int:
        return len(make_loader())

    def __iter__(self) -> Iterator[Any]:
        for batch in make_loader():
            self.count += 1
            if self.count == self.at:
                for _ in range(self.times):
                    os.kill(os.getpid(), signal.SIGINT)
                if self.dies:
                    raise RuntimeError("DataLoader worker exited unexpectedly")
            yield batch


def status(out: Path) -> str:
    return str(json.loads((out / "run.json").read_text())["status"])


@pytest.mark.parametrize("at", [10, 11, 16, 22])
def test_ctrl_c_finishes_the_step_and_saves_it(tmp_path: Path, whole: str, at: int) -> None:
    out, handler = tmp_path / "run", signal.getsignal(signal.SIGINT)
    recipe = {"stages": STAGES, **QUIET, "checkpoint_seconds": 1000.0}
    with pytest.raises(KeyboardInterrupt, match=r"interrupted in stage \d \(\w+\).*the same call goes on from there"):
        run(out, recipe=recipe, train_batches=PressingLoader(at))
    assert signal.getsignal(signal.SIGINT) is handler
    assert status(out) == "interrupted"
    done = sum(1 for _ in (out / "history.jsonl").read_text().splitlines())
    assert (out / "checkpoint.safetensors").exists() or (out / "stages" / "1-prune.safetensors").exists()
    result = run(out, recipe=recipe)
    assert len(result.history) == 15
    assert 0 < done < 15
    assert digest(out / "model.safetensors") == whole


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, whole: str) -> None:
    out = tmp_path / "run"
    recipe = {"stages": STAGES, **QUIET, "checkpoint_seconds": 1000.0}
    with pytest.raises(KeyboardInterrupt):
        run(out, recipe=recipe, train_batches=PressingLoader(12, times=2))
    assert not (out / "checkpoint.safetensors").exists()
    assert status(out) == "interrupted"
    run(out, recipe=recipe)
    assert digest(out / "model.safetensors") == whole


def test_workers_that_die_of_ctrl_c_are_no_failure(tmp_path: Path, whole: str) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"interrupted in stage 1 \(prune\).*keeps a checkpoint of this stage"):
        run(tmp_path / "run", train_batches=PressingLoader(12, dies=True))
    run(tmp_path / "run")
    assert digest(tmp_path / "run" / "model.safetensors") == whole


def test_forks_leave_ctrl_c_to_the_process_that_trains() -> None:
    with Interrupt() as interrupt, interrupt.deferring():
        child = fork(lambda: os.kill(os.getpid(), signal.SIGINT))
        assert os.waitpid(child, 0)[1] == 0
        assert not interrupt.requested


def test_ctrl_c_outside_of_training_ends_at_once(tmp_path: Path) -> None:
    calls = []

    def eval_fn(model: torch.nn.Module) -> float:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("was not interrupted")
        return 1.0

    recipe = {"stages": ["quantize"], **QUIET}
    with pytest.raises(KeyboardInterrupt, match="the evaluation after stage 1"):
        run(tmp_path / "run", recipe=recipe, eval_fn=eval_fn)
    assert run(tmp_path / "run", recipe=recipe, eval_fn=eval_fn).metrics == {"metric": 1.0}


def test_without_a_folder_ctrl_c_says_that_nothing_is_kept() -> None:
    recipe = {"stages": [{"finetune": {"steps": 9}}], **QUIET}
    with pytest.raises(KeyboardInterrupt, match="Nothing is kept: pass out=RUN"):
        run(None, recipe=recipe, train_batches=PressingLoader(9))


def test_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    results: list[Any] = []
    handler = signal.getsignal(signal.SIGINT)
    recipe = {"stages": [{"finetune": {"steps": 2}}], **QUIET}
    thread = threading.Thread(target=lambda: results.append(run(tmp_path / "run", recipe=recipe)))
    thread.start()
    thread.join()
    assert results[0].records[1].steps == 2
    assert signal.getsignal(signal.SIGINT) is handler


# ---- full disks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 3, 4, 8, 13, 21, 34, 47])
def test_a_full_disk(tmp_path: Path, whole: str, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    out, calls = tmp_path / "run", []
    fsync = os.fsync

    def full(descriptor: int) -> None:
        calls.append(1)
        if len(calls) in (number, number + 1):  # the flush of a folder may fail: no file depends on it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CompressError, match=r"No space left on device; make room on the disk") as found:
            run(out)
    assert isinstance(found.value.__cause__, OSError)
    assert not list(out.rglob("*.partial"))
    run(out)
    assert digest(out / "model.safetensors") == whole


# ---- killed processes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed() -> dict[str, Any]:
    """What tests/workflow_runs.py prints. In memory where that can be: 50 runs flush 4000 files to the disk."""
    environment = {**os.environ, "PYCOMPRESS_COST_MODEL": "builtin", "OMP_NUM_THREADS": "1"}
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        command = [sys.executable, "-m", "tests.workflow_runs", folder, "1"]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("kind", "times"), [("moments", 10), ("writes", 8), ("chain", 1), ("limits", 4)])
def test_a_killed_run_goes_on_to_the_same_model(killed: dict[str, Any], whole: str, kind: str, times: int) -> None:
    assert killed["digests"]["whole"] == [whole]
    assert killed["digests"][kind] == times * [whole]


def test_they_were_killed_while_they_worked(killed: dict[str, Any]) -> None:
    assert killed["killed"]["moments"] >= 5  # of 10: the others had just finished
    assert killed["killed"]["chain"] >= 2
    assert killed["killed"]["writes"] == 8
    assert killed["writes"] > 50


def test_files_that_grow_too_large_end_with_a_message(killed: dict[str, Any]) -> None:
    assert len(killed["messages"]) == 4
    assert all("File too large" in message for message in killed["messages"])


def test_a_cause_that_ends_with_a_question_gets_no_full_stop() -> None:
    recipe = {"stages": [{"finetune": {"steps": 9}}], **QUIET}
    with pytest.raises(CompressError, match=r"gave no batch in epoch 1; .* iterator again\? Nothing is kept"):
        run(None, recipe=recipe, train_batches=lambda epoch: [] if epoch else make_loader())
