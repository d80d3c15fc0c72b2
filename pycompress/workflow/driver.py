"""A run: the stages of a recipe one after the other, each saved, evaluated, timed and recorded.

Every stage starts from the file of the stage before, whether this process wrote it or an earlier one: a run that was
killed and gone on with computes what an uninterrupted one does. What a stage writes, in this order:

    checkpoint.safetensors   now and then while it trains
    stages/<i>-<name>        its model; from here on nothing of the stage is ever done again
    run.json                 its record, once the model was evaluated and timed
"""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from pycompress import info
from pycompress.model_file import file_bytes, load_model, read_model_header, save_model
from pycompress.recipe import Stage
from pycompress.workflow import measure
from pycompress.workflow.errors import CompressError
from pycompress.workflow.evaluate import evaluate
from pycompress.workflow.fingerprint import model_identity, modules_digest
from pycompress.workflow.history import History
from pycompress.workflow.interrupt import Interrupt
from pycompress.workflow.job import Job, label
from pycompress.workflow.measure_layers import layer_rows
from pycompress.workflow.preflight import check_evaluation, check_savable, check_space, check_stages, described
from pycompress.workflow.progress import say
from pycompress.workflow.records import BASELINE, WARNING, StageRecord
from pycompress.workflow.result import CompressResult, line_of
from pycompress.workflow.rng import seed_all, seed_of
from pycompress.workflow.run_folder import RunFolder
from pycompress.workflow.run_state import RunState
from pycompress.workflow.stages import Bench, run_stage
from pycompress.workflow.training import CheckpointError, Session, Stopped

_EXTRA = "pycompress.stage"  # in a stage's file: what its record needs
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Run:
    """One run of compress(). anew: what the folder holds of an earlier one is to go."""

    def __init__(
        self, job: Job, folder: RunFolder | None, state: RunState, interrupt: Interrupt, anew: bool = False
    ) -> None:
        self.job, self.folder, self.state, self.interrupt, self._anew = job, folder, state, interrupt, anew
        self.history = History(None if folder is None else folder.history)
        self._model: nn.Module | None = None  # after the last stage that is done
        self._where = "writing the folder of the run"
        self._step = 0  # of the running stage, saved

    # ---- the whole --------------------------------------------------------------------------------------------

    def is_finished(self) -> bool:
        if self.state.status != "finished" or self.folder is None:
            return False
        if (damage := self.folder.damage(self.folder.model, self.state)) is None:
            return True
        self._note(f"{self.folder.model} {damage}; it is made anew")
        return False

    def go(self) -> CompressResult:
        first = 1 if self._anew else self._first_stage()
        check_stages(self.job, first)
        if self.folder is not None:
            check_space(self.job, self.folder.free_bytes(), self.folder.path, first)
        before = None
        if not self.state.stages:
            before = check_savable(self.job.fresh()), check_evaluation(self.job)
        try:
            self._begin()
            if before is not None:
                self._record_baseline(*before)
            for index, stage in enumerate(self.job.recipe.stages, 1):
                if index >= first:
                    self._do(index, stage)
            self._finish()
        except KeyboardInterrupt:
            self._close("interrupted", None)
            raise KeyboardInterrupt(f"compress: interrupted in {self._where}. {self._kept()}") from None
        except Exception as error:
            message = f"compress: {self._where} failed: {self._cause(error)}"
            self._close("failed", message)
            stop = "" if message.endswith("?") else "."
            raise CompressError(f"{message}{stop} {self._kept()}") from error
        self._report()
        return self.result()

    def _report(self) -> None:
        """The page, where there is something to see on it. The run is finished, whatever becomes of it."""
        wanted = self.job.recipe.measure
        if self.folder is None or not (wanted.rounds or wanted.layers):
            return
        try:
            from pycompress.run_report import write_report

            write_report(self.folder.path)
        except Exception as error:
            self._note(f"the report could not be written ({described(error)}); `pycompress report` does it anew")

    def result(self) -> CompressResult:
        state, folder = self.state, self.folder
        if folder is not None:
            self.history.load()
            self._model = load_model(folder.model, self.job.fresh())
        assert self._model is not None
        out = None if folder is None else folder.path
        size = state.files["model.safetensors"]["bytes"]
        return CompressResult(
            self._model.eval(),
            state.stages,
            out,
            self.history.lines,
            size,
            state.layers,
            state.latency,
            state.notes,
        )

    def _first_stage(self) -> int:
        """The first stage that is not done, or whose file is damaged."""
        if self.folder is None or not self.state.stages:
            return 1
        for record in self.state.stages[:0:-1]:
            path = self.folder.stage(record.index, record.name)
            if (damage := self.folder.damage(path, self.state)) is None:
                break
            self._note(f"{path} {damage}; stage {record.index} ({record.name}) is done again")
            self.state.stages.pop()
            path.unlink(missing_ok=True)
        return len(self.state.stages)

    def _begin(self) -> None:
        self.state.status, self.state.error = "running", None
        machine = info.collect()
        if not self.state.machine:
            self.state.machine = machine
        elif self.state.stages:
            self._compare(machine)
        if self.folder is None:
            return
        self.state.restarting = self._anew
        self._write()
        if self._anew:
            self.folder.remove_run()
            self.state.restarting = False
            self._write()
        self.folder.clean()
        self.history.load()

    def _compare(self, machine: dict[str, Any]) -> None:
        """Another machine computes the same up to rounding, and no closer."""
        before = self.state.machine
        for group, key in (("threads", "torch"), ("versions", "torch"), ("cpu", "name"), ("isa", "selected")):
            old, new = (found.get(group, {}).get(key) for found in (before, machine))
            if old is not None and old != new:
                self._note(f"the run began with {group}.{key}={old!r} and goes on with {new!r}: last bits may differ")

    def _close(self, status: str, message: str | None) -> None:
        """Say in run.json how it ended, if the disk takes that."""
        self.state.status, self.state.error = status, message
        with suppress(OSError):
            self.history.flush()
        with suppress(OSError):
            self._write()

    def _cause(self, error: Exception) -> str:
        if isinstance(error, OSError) and error.errno in _FULL and self.folder is not None:
            return f"{os.strerror(error.errno)}; make room on the disk of {str(self.folder.path)!r}"
        return described(error)

    def _kept(self) -> str:
        """What is on the disk, and how to go on."""
        if self.folder is None:
            return "Nothing is kept: pass out=RUN to keep stages and checkpoints"
        if not self.folder.run_json.exists():
            return "Nothing is kept yet; the same call starts anew"
        if self.folder.checkpoint.exists():
            last = "a checkpoint of this stage"
        elif len(self.state.stages) > 1:
            last = f"the model after {label(self.state.stages[-1].index, self.state.stages[-1].name)}"
        else:
            last = "the run's beginning"
        return f"{str(self.folder.path)!r} keeps {last}; the same call goes on from there"

    def _note(self, text: str) -> None:
        self.state.notes.append(text)
        warnings.warn(f"compress: {text}", stacklevel=_depth_of_caller())

    def _write(self) -> None:
        if self.folder is not None:
            self.folder.write(self.state)

    # ---- a stage ----------------------------------------------------------------------------------------------

    def _do(self, index: int, stage: Stage) -> None:
        self._where = label(index, stage)
        if self.folder is None:
            done = self._work(index, stage)
            size = file_bytes(self._last())
        else:
            done = self._kept_or_done(self.folder, index, stage)
            size = self.folder.stage(index, stage.name).stat().st_size
        if self.interrupt.requested:  # in the last step
            raise KeyboardInterrupt
        self._where = f"the evaluation after {label(index, stage)}"
        metrics = evaluate(self.job.eval_fn, self._last(), self.job.recipe.seed)
        options = self.job.recipe.to_dict()["stages"][index - 1][stage.name]
        self._where = f"the timing after {label(index, stage)}"
        self._record(index, stage.name, options, done, metrics, size)

    def _kept_or_done(self, folder: RunFolder, index: int, stage: Stage) -> dict[str, Any]:
        """The stage, done now or by an earlier process; self._model is then the one of its file."""
        path = folder.stage(index, stage.name)
        modules = None
        done = self._done_before(path, index)
        if done is None:
            done = self._work(index, stage)
            modules = modules_digest(self._last())
            save_model(self._last(), path, extra={_EXTRA: {**done, "run": self.state.identity, "stage": index}})
        folder.checkpoint.unlink(missing_ok=True)
        self.state.choices.pop(str(index), None)
        self.state.files[folder.name_of(path)] = folder.mark(path)
        self._model = load_model(path, self.job.fresh())
        if modules not in (None, modules_digest(self._model)):
            path.unlink()
            raise RuntimeError("the model's file does not give all of its modules back; this is a bug of pycompress")
        return done

    def _done_before(self, path: Path, index: int) -> dict[str, Any] | None:
        """What an earlier process said of this stage, if it saved its model and came no further."""
        if not path.exists():
            return None
        try:
            said = read_model_header(path)["extra"][_EXTRA]
            if said["run"] != self.state.identity or said["stage"] != index:
                return None
            load_model(path, self.job.fresh())
            return {"seconds": float(said["seconds"]), "steps": int(said["steps"]), "summary": str(said["summary"])}
        except (ValueError, TypeError, KeyError) as error:
            self._note(f"{path} is not used: {error}; {self._where} is done again")
            return None

    def _work(self, index: int, stage: Stage) -> dict[str, Any]:
        """Run the stage; the model is then in self._model. Returns seconds, steps and summary."""
        try:
            return self._attempt(index, stage)
        except CheckpointError as error:
            assert self.folder is not None
            self.folder.checkpoint.unlink()
            self._note(f"{error}; {self._where} begins anew")
            return self._attempt(index, stage)

    def _attempt(self, index: int, stage: Stage) -> dict[str, Any]:
        job, state = self.job, self.state
        model = self._before(index)
        identity = model_identity(model)["fingerprint"]
        seed_all(seed_of(job.recipe.seed, index, "stage"))
        start = time.monotonic()
        checkpoint = None if self.folder is None else self.folder.checkpoint
        session = Session(job, index, stage.name, state.identity, self.history, self.interrupt, checkpoint)
        choices = state.choices.setdefault(str(index), {})
        try:
            done = run_stage(stage, model, Bench(job, index, session, choices, self._write))
        except Stopped:
            self._where = f"{label(index, stage)} after step {session.step}"
            raise KeyboardInterrupt from None
        seconds = time.monotonic() - start + session.earlier
        summary = done.summary
        if model_identity(model)["fingerprint"] == identity and WARNING not in summary:
            summary = f"{WARNING}this stage changed nothing; {summary}"
        self._model = model.eval()
        return {"seconds": round(seconds, 3), "steps": done.steps, "summary": summary}

    def _before(self, index: int) -> nn.Module:
        """The model that a stage begins with."""
        if index == 1:
            return self.job.fresh()
        if self.folder is None:
            return self._last()
        record = self.state.stages[index - 1]
        return load_model(self.folder.stage(record.index, record.name), self.job.fresh())

    def _last(self) -> nn.Module:
        assert self._model is not None
        return self._model

    # ---- records ----------------------------------------------------------------------------------------------

    def _record_baseline(self, size: int, metrics: dict[str, float]) -> None:
        self._where = "the timing of the model as it came"
        self._model = self.job.baseline
        self._record(0, BASELINE, {}, {"seconds": 0.0, "steps": 0, "summary": "the model as it came"}, metrics, size)

    def _record(
        self, index: int, name: str, options: dict[str, Any], done: dict[str, Any], metrics: dict[str, float], size: int
    ) -> None:
        job, state, model = self.job, self.state, self._last()
        sizes = measure.sizes(model)
        wanted = job.recipe.measure
        found = {}
        if job.sample is not None and (index > 0 or not job.recipe.stages):
            found = measure.latencies(job.baseline, model, job.sample, wanted.batch_sizes, wanted.rounds)
            state.latency = {batch: latency.to_dict() for batch, latency in found.items()}
        record = StageRecord(
            index=index,
            name=name,
            options=options,
            metrics=metrics,
            file_bytes=size,
            latency={batch: latency.after.p50 for batch, latency in found.items()},
            **done,
            **dataclasses.asdict(sizes),
        )
        if index == 1:  # timed beside it, in turns
            before = {batch: latency.before.p50 for batch, latency in found.items()}
            state.stages[0] = dataclasses.replace(state.stages[0], latency=before)
        state.stages.append(record)
        self._write()
        if job.progress:
            say(line_of(record, len(job.recipe.stages)))

    def _finish(self) -> None:
        self._where = "saving the final model"
        state, folder, job = self.state, self.folder, self.job
        model = self._model = self._before(len(state.stages))  # from its file: eval_fn has had the other one
        if folder is None:
            with tempfile.TemporaryDirectory() as temporary:
                size = save_model(model, Path(temporary) / "model.safetensors", compact=True)
            state.files["model.safetensors"] = {"bytes": size, "crc32": 0}
        else:
            save_model(model, folder.model, compact=True)
            state.files["model.safetensors"] = folder.mark(folder.model)
        self._where = "measuring the layers"
        if job.recipe.measure.layers and job.sample is not None:
            state.machine["peaks"] = measure.machine_peaks(measure.device_of(model))
            rows = layer_rows(job.baseline, model, job.sample, job.recipe.measure.rounds)
            state.layers = [row.to_dict() for row in rows]
        state.status = "finished"
        self._write()


def _depth_of_caller() -> int:
    """How far above whoever asks this function's caller is the first frame outside of this package."""
    depth, frame = 0, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(__package__ or ""):
        depth, frame = depth + 1, frame.f_back  # type: ignore[assignment]
    return depth + 1
