"""Calibrating the cost model with a made-up clock, and the cache on disk.

Nothing here is timed. Where something would be measured, a clock stands in that advances by what a call is said to
cost.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import stat
import tempfile

import pytest
import torch
from torch import nn

from pycompress import cost_cache, cost_calibration, cost_model
from pycompress.cost_core import DTYPES, FORMS, CostModel, Shape
from pycompress.nn import SparseLinear
from tests.cost_fakes import FakeMachine, model_of, seconds_of


@pytest.fixture
def made_up_machine(monkeypatch):
    """measure_fits measures this one, whose built-in figures are its own at three times the speed."""
    machine = FakeMachine(slower=dict.fromkeys(FORMS, 3.0))

    def layer_in_forms(n, k, sparsity, block, dtype):
        shape = Shape.random(n, k, sparsity, dtype)
        return {form: machine.module(form, shape) for form in FORMS}, shape

    builtin = {key: fitted for dtype in DTYPES for key, fitted in model_of(dtype).fits.items()}
    monkeypatch.setattr(cost_calibration, "BUILTIN_FITS", builtin)
    monkeypatch.setattr(cost_calibration, "_layer_in_forms", layer_in_forms)
    monkeypatch.setattr(cost_calibration, "activations", lambda m, k, dense: torch.empty(m, 1))
    monkeypatch.setattr(cost_calibration, "_SECONDS", 0.0)
    return machine


def assert_fits(fits, dtype, rel=0.25):
    model = CostModel(fits, threads=1, measured=frozenset((dtype,)))
    shape = Shape.random(1024, 1024, 0.75, dtype)
    for form in FORMS:
        for m in (1, 16, 128, 512):
            assert model.predict(form, m, shape) == pytest.approx(3 * seconds_of(form, m, shape), rel=rel), (form, m)


@pytest.mark.parametrize("dtype", DTYPES)
def test_calibration_on_a_made_up_machine(made_up_machine, dtype):
    seen = []
    fits = cost_calibration.measure_fits(
        dtype, clock=made_up_machine.clock, progress=lambda done, of: seen.append((done, of))
    )
    assert seen[-1][0] == seen[-1][1] == len(seen)
    assert_fits(fits, dtype)


def test_times_out_of_line_are_measured_again_or_left_out(made_up_machine):
    """A program that takes a core for 20 ms in one of a hundred calls, and for good from some call on to another."""
    machine = made_up_machine
    machine.stall = lambda call: 0.02 if call % 97 == 0 or 300 < call < 420 else 0.0
    assert_fits(cost_calibration.measure_fits("float32", clock=machine.clock), "float32", rel=0.4)


def test_a_machine_too_busy_to_be_measured(made_up_machine, own_cache, monkeypatch):
    made_up_machine.stall = lambda call: 0.02 if call % 50 else 0.0
    with pytest.raises(cost_calibration.BusyMachineError, match="out of line"):
        cost_calibration.measure_fits("float32", clock=made_up_machine.clock)
    tried = []

    def measure_fits(dtype, *, progress=None):
        tried.append(dtype)
        raise cost_calibration.BusyMachineError("9 of 9 times are out of line")

    monkeypatch.setattr(cost_calibration, "measure_fits", measure_fits)
    linear, mask = nn.Linear(16, 16), torch.rand(16, 16) > 0.9
    with pytest.warns(UserWarning, match=r"too busy to be measured \(9 of 9.*going by built-in figures"):
        SparseLinear.from_dense(linear, mask)
    SparseLinear.from_dense(linear, mask)
    assert tried == ["float32"], "the next layer does not try again"
    assert not own_cache.exists()
    with pytest.warns(UserWarning, match="too busy"):
        cost_model.calibrate_cost_model("float32")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("block", [(1, 1), (4, 1), (1, 4), (4, 4)])
def test_layers_of_the_calibration_are_what_they_say(dtype, block):
    modules, shape = cost_calibration._layer_in_forms(64, 48, 0.75, block, dtype)
    assert set(modules) == set(FORMS)
    assert (shape.n, shape.k, shape.dtype) == (64, 48, dtype)
    assert shape.sparsity == pytest.approx(0.75, abs=0.15)
    full = {(4, 1): 4 * shape.columns, (1, 4): 4 * shape.units, (4, 4): 16 * shape.blocks}
    assert shape.nnz == full.get(block, shape.nnz)
    x = torch.randn(3, 48)
    outputs = [module(x) for module in modules.values()]
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0], rtol=1e-4, atol=1e-4)


class Turns:
    """Runs whose calls take the given times, one after the other, on a clock of their own."""

    def __init__(self, **costs):
        self.now, self.order = 0.0, []
        self.costs = {name: iter(values) for name, values in costs.items()}
        self.runs = {name: functools.partial(self._run, name) for name in costs}

    def _run(self, name):
        self.order.append(name)
        self.now += next(self.costs[name])

    def clock(self):
        return self.now


def test_least_times_take_turns_and_keep_the_least():
    ms = 2.0**-10
    turns = Turns(a=[9 * ms, 2 * ms, 1 * ms, 2 * ms, *[3 * ms] * 20], b=[9 * ms, 1 * ms, *[2 * ms] * 20])
    assert cost_calibration.least_times(turns.runs, 0.0, clock=turns.clock) == {"a": ms, "b": ms}
    assert turns.order == ["a", "b"] + ["a", "a", "b", "b"] * 4


def test_long_calls_are_made_once_a_turn():
    turns = Turns(a=[1.0] * 20)
    assert cost_calibration.least_times(turns.runs, 0.0, clock=turns.clock) == {"a": 1.0}
    assert len(turns.order) == 1 + 2 + 3


def test_a_busy_machine_is_given_more_time():
    ms = 2.0**-10
    steady = Turns(a=[ms] * 1000)
    cost_calibration.least_times(steady.runs, 0.02, clock=steady.clock)
    assert steady.now <= 0.03
    jittery = Turns(a=[ms * (1 + 1000 / (i + 1)) for i in range(1000)])
    cost_calibration.least_times(jittery.runs, 0.02, clock=jittery.clock)
    assert jittery.now >= 0.08


def test_calibrated_once_and_kept_on_disk(own_cache, calibrations):
    assert cost_model.default_cost_model().measured == frozenset()
    model = cost_model.calibrate_cost_model("float32")
    assert model.measured == {"float32"}
    assert cost_model.default_cost_model() is model
    assert cost_model.calibrate_cost_model("float32") is model
    both = cost_model.calibrate_cost_model("int8")
    assert both.measured == {"float32", "int8"}
    assert calibrations == ["float32", "int8"]
    (path,) = own_cache.iterdir()
    assert path.name.startswith("cost_model-")
    cost_model._models.clear()  # as another process
    again = cost_model.default_cost_model()
    assert (again.fits, again.measured, again.threads) == (both.fits, both.measured, torch.get_num_threads())
    assert cost_model.calibrate_cost_model("int8").measured == both.measured
    assert calibrations == ["float32", "int8"]
    cost_model.calibrate_cost_model("int8", force=True)
    assert calibrations[-1] == "int8"


def test_threads_have_models_of_their_own(own_cache, calibrations):
    before = torch.get_num_threads()
    model = cost_model.calibrate_cost_model("float32", threads=before + 1)
    assert model.threads == before + 1
    assert torch.get_num_threads() == before
    assert cost_model.default_cost_model().measured == frozenset()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [({"dtype": "float16"}, "dtype='float16', expected one of float32"), ({"threads": 0}, "threads=0, expected")],
)
def test_calibration_refuses(kwargs, match, own_cache, calibrations):
    with pytest.raises(ValueError, match=match):
        cost_model.calibrate_cost_model(**kwargs)
    assert calibrations == []


def test_an_interrupted_calibration_leaves_the_threads_and_the_model(own_cache, monkeypatch):
    def interrupted(dtype, *, progress=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(cost_calibration, "measure_fits", interrupted)
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        cost_model.calibrate_cost_model("float32", threads=before + 1)
    assert torch.get_num_threads() == before
    assert not own_cache.exists()


# ---- the cache ----


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: "not json",
        lambda c: json.dumps([]),
        lambda c: json.dumps({**c, "version": 99}),
        lambda c: json.dumps({**c, "key": {**c["key"], "torch": "0.1"}}),
        lambda c: json.dumps({k: v for k, v in c.items() if k != "fits"}),
        lambda c: json.dumps({**c, "fits": {"float32 csr": {"tokens": [1], "rows": [[1.0]]}}}),
        lambda c: json.dumps({**c, "fits": {}}),
        lambda c: json.dumps({**c, "fits": {**c["fits"], "float32 dense": {"tokens": [1], "rows": [[-1.0] * 6]}}}),
        lambda c: json.dumps({**c, "fits": {**c["fits"], "int8 dense": {"tokens": [2, 1], "rows": [[1.0] * 6] * 2}}}),
        lambda c: json.dumps({**c, "fits": {**c["fits"], "float32 dense": {"tokens": [1], "rows": [[1.0]]}}}),
        lambda c: json.dumps({**c, "fits": {**c["fits"], "float32 dense": 3}}),
        lambda c: json.dumps({**c, "fits": {**c["fits"], "float32 dense": {"tokens": [1], "rows": [["x"] * 6]}}}),
        lambda c: json.dumps({**c, "corrections": [[["a"], 1, 0.0]]}),
        lambda c: json.dumps({**c, "corrections": [[["a"], 1]]}),
        lambda c: json.dumps(c)[:-40],
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning(own_cache, calibrations, damage):
    cost_model.calibrate_cost_model("float32")
    (path,) = own_cache.iterdir()
    path.write_text(damage(json.loads(path.read_text())), encoding="utf-8")
    cost_model._models.clear()
    with pytest.warns(UserWarning, match=r"cost model in .* is ignored"):
        model = cost_model.default_cost_model()
    assert model.measured == frozenset()
    cost_model.calibrate_cost_model("float32")
    cost_model._models.clear()
    assert cost_model.default_cost_model().measured == {"float32"}


def test_nowhere_to_write(own_cache, calibrations):
    own_cache.write_text("a file where the folder should be")
    assert cost_model.calibrate_cost_model("float32").measured == {"float32"}
    assert cost_model.default_cost_model().measured == {"float32"}


def test_a_full_disk_leaves_the_old_file(own_cache, calibrations, monkeypatch):
    cost_model.calibrate_cost_model("float32")
    (path,) = own_cache.iterdir()
    content = path.read_text()

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    assert cost_model.calibrate_cost_model("int8").measured == {"float32", "int8"}
    assert [p.name for p in own_cache.iterdir()] == [path.name]
    assert path.read_text() == content


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PYCOMPRESS_CACHE", str(tmp_path / "own"))
    assert cost_cache.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("PYCOMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cost_cache.cache_dir() == tmp_path / "xdg" / "pycompress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cost_cache.cache_dir() == tmp_path / ".cache" / "pycompress"


def test_a_user_without_a_home(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("PYCOMPRESS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pathlib.Path, "home", home)
    assert cost_cache.cache_dir() == pathlib.Path(tempfile.gettempdir()) / "pycompress"


def test_key_names_what_times_depend_on(monkeypatch):
    key = cost_cache.machine_key(2)
    assert set(key) == {"cpu", "isa", "threads", "torch", "pycompress", "version"}
    assert cost_cache.cache_path(key) != cost_cache.cache_path(cost_cache.machine_key(3))
    monkeypatch.setenv("PYCOMPRESS_ISA", "scalar")
    assert cost_cache.machine_key(2)["isa"] == "scalar"


def test_override_names_a_file(own_cache, calibrations, monkeypatch, tmp_path):
    cost_model.calibrate_cost_model("float32")
    (path,) = own_cache.iterdir()
    monkeypatch.setenv("PYCOMPRESS_COST_MODEL", str(path))
    assert cost_model.calibrate_cost_model("int8").measured == {"float32"}, "what was named is taken as it is"
    assert calibrations == ["float32"]
    monkeypatch.setenv("PYCOMPRESS_COST_MODEL", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"PYCOMPRESS_COST_MODEL='.*none\.json' cannot be used.*'builtin'"):
        cost_model.default_cost_model()


def test_tests_measure_nothing_and_leave_the_users_cache():
    assert cost_model.calibrate_cost_model("float32").measured == frozenset()
    assert stat.S_ISDIR(os.stat(os.path.dirname(os.environ["PYCOMPRESS_CACHE"])).st_mode)
    assert not str(cost_cache.cache_dir()).startswith(os.path.expanduser("~/.cache"))
