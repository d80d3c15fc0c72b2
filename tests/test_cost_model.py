"""The cost model: fitting, choosing, calibrating with a made-up clock, the cache on disk, explaining.

Nothing here is timed. Where something would be measured, a clock stands in that advances by what a call is said to
cost.
"""

from __future__ import annotations

import functools
import io
import json
import os
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from pycompress import cost_cache, cost_calibration, cost_core, cost_model
from pycompress.cost_core import ANY_M, BUCKETS, DTYPES, FORMS, CostModel, Fit, Shape, fit
from pycompress.nn import Int8Linear, SparseLinear
from tests.cost_fakes import FakeMachine, model_of, seconds_of

settle_ties = cost_model.settle_ties  # a fixture replaces it
SHAPE = Shape.random(768, 768, 0.8, "float32")


def pairs(choice):
    return list(zip(choice[::2], choice[1::2], strict=True))


# ---- shapes ----


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 8), (7, 13), (16, 16), (33, 70)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_shape_counts_blocks(n, k, sparsity):
    mask = torch.rand(n, k) >= sparsity
    padded = torch.zeros(-(-n // 4) * 4, -(-k // 4) * 4, dtype=torch.bool)
    padded[:n, :k] = mask
    bits = torch.zeros(n, -(-k // 8) * 8, dtype=torch.uint8)
    bits[:, :k] = mask
    bitmap = (bits.view(n, -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    shape = Shape.of(bitmap, k, "int8")

    def blocks(r, c):
        return int(padded.reshape(padded.shape[0] // r, r, -1, c).any(3).any(1).sum())

    assert (shape.n, shape.k, shape.nnz) == (n, k, int(mask.sum()))
    assert (shape.columns, shape.units, shape.blocks) == (blocks(4, 1), blocks(1, 4), blocks(4, 4))
    assert shape.sparsity == pytest.approx(1 - mask.float().mean().item(), abs=1e-6)


def test_shape_of_nothing():
    shape = Shape.of(torch.zeros(0, 0, dtype=torch.uint8), 0, "float32")
    assert (shape.nnz, shape.sparsity) == (0, 0.0)
    assert cost_model.default_cost_model().choose(shape)[-2] == ANY_M


def test_shape_refuses():
    with pytest.raises(ValueError, match="dtype='float16', expected one of float32"):
        Shape.of(torch.zeros(1, 1, dtype=torch.uint8), 8, "float16")
    with pytest.raises(ValueError, match="meta device"):
        Shape.of(torch.zeros(1, 1, dtype=torch.uint8, device="meta"), 8, "int8")


def test_random_shape_is_what_a_random_mask_has():
    mask = torch.rand(512, 512) >= 0.8
    bitmap = (mask.view(512, -1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    actual, expected = Shape.of(bitmap, 512, "int8"), Shape.random(512, 512, 0.8, "int8")
    for name in ("nnz", "columns", "units", "blocks"):
        assert getattr(actual, name) == pytest.approx(getattr(expected, name), rel=0.02)


# ---- fitting ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_fit_recovers_what_it_was_measured_from(dtype):
    """Within 10 % on shapes that were not measured, with 5 % of noise in the measurements."""
    model = model_of(dtype, noise=0.05)
    for n, k, s in [(384, 1536, 0.85), (1024, 1024, 0.6), (2304, 768, 0.95), (768, 2304, 0.45)]:
        shape = Shape.random(n, k, s, dtype)
        for form in FORMS:
            for m in (1, 8, 48, 64, 200, 512):
                assert model.predict(form, m, shape) == pytest.approx(seconds_of(form, m, shape), rel=0.25), (form, m)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.floats(0, 1e7), min_size=3, max_size=3), min_size=1, max_size=6),
    st.lists(st.floats(1e-6, 1.0), min_size=6, max_size=6),
)
def test_coefficients_are_finite_and_not_negative(counts, seconds):
    found = fit([(1, (1.0, *c), t) for c, t in zip(counts, seconds, strict=False)])
    assert all(0 <= c < float("inf") for c in found.rows[0])
    assert sum(found.rows[0]) > 0


def test_prediction_between_and_beyond_the_measured_tokens():
    line = Fit((1, 16, 64), ((1e-6,), (4e-6,), (8e-6,)))
    assert line.predict(1, (1.0,)) == 1e-6
    assert line.predict(4, (1.0,)) == pytest.approx(2e-6)
    assert line.predict(32, (1.0,)) == pytest.approx(32e-6**0.5 * 1e-3)
    assert line.predict(128, (1.0,)) == pytest.approx(16e-6)


def test_unknown_form():
    with pytest.raises(ValueError, match="no figures for 'float32 csr'; there are bfloat16 bitmap"):
        cost_model.default_cost_model().predict("csr", 1, SHAPE)


# ---- choosing ----


def flat(**seconds):
    """A model in which a form takes so long whatever the shape; a number or {M: seconds}."""
    fits = {}
    for form, value in seconds.items():
        table = value if isinstance(value, dict) else {1: value, 10**6: value}
        width = len(SHAPE.counts(form)) - 1
        fits["float32", form] = Fit(tuple(table), tuple((t, *[0.0] * width) for t in table.values()))
    return CostModel(fits, threads=1, measured=frozenset(("float32",)))


def test_choice_covers_every_m_and_is_merged():
    model = flat(bitmap={1: 1e-6, 10**6: 1.0}, index=3e-6, dense=1.0)
    choice = model.choose(SHAPE)
    assert [code for _, code in pairs(choice)] == [0, 1]
    assert choice[-2] == ANY_M
    assert cost_model.describe_choice(choice).endswith(", index")
    for m in (1, 7, 100, 10**9):
        assert cost_model.form_at(choice, m) in FORMS


@pytest.mark.parametrize("best", FORMS)
def test_the_fastest_is_chosen(best):
    model = flat(**{form: 1e-6 if form == best else 2e-6 for form in FORMS})
    assert model.choose(SHAPE) == (ANY_M, FORMS.index(best))


def test_a_few_percent_spare_the_memory_of_dense():
    assert flat(bitmap=1.02e-6, index=5e-6, dense=1e-6).choose(SHAPE) == (ANY_M, 0)
    assert flat(bitmap=1.05e-6, index=5e-6, dense=1e-6).choose(SHAPE) == (ANY_M, 2)


def test_tokens_that_matter():
    model = flat(bitmap={1: 1e-6, 8: 8e-6, 10**6: 1.0}, index=5e-6, dense=1.0)
    assert model.choose(SHAPE, tokens=(1,)) == (ANY_M, 0)
    assert model.choose(SHAPE, tokens=(64, 128)) == (ANY_M, 1)
    assert model.choose(SHAPE, tokens=(1, 64)) == model.choose(SHAPE)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 4096),
    st.integers(1, 4096),
    st.floats(0.0, 1.0),
    st.integers(1, 5000),
)
def test_never_predicted_much_slower_than_the_best(dtype, n, k, sparsity, m):
    """Within a bucket the ends decide, so at these no other form is better than the choice by more than the slack."""
    model, shape = cost_model.default_cost_model(), Shape.random(n, k, sparsity, dtype)
    choice = model.choose(shape)
    assert [most for most, _ in pairs(choice)] == sorted({most for most, _ in pairs(choice)})
    high = next(b for b in BUCKETS if m <= b)
    if high < ANY_M:
        low = ([0, *BUCKETS])[BUCKETS.index(high)] + 1
        times = [{form: model.predict(form, end, shape) for form in FORMS} for end in (low, high)]
        losses = {form: max(t[form] / min(t.values()) for t in times) for form in FORMS}
        assert losses[cost_model.form_at(choice, high)] <= cost_core.SLACK * min(losses.values()) * (1 + 1e-9)


# ---- corrections ----


def test_a_measured_time_takes_the_place_of_the_prediction():
    model = flat(bitmap=1e-6, index=2e-6, dense=1.5e-6)
    model.correct("bitmap", 64, SHAPE, 4e-6)
    model.correct("bitmap", 512, SHAPE, 1e-6)
    assert model.predict("bitmap", 64, SHAPE) == pytest.approx(4e-6)
    assert model.predict("bitmap", 1, SHAPE) == pytest.approx(4e-6)
    assert model.predict("bitmap", 181, SHAPE) == pytest.approx(2e-6, rel=0.01)
    assert model.predict("bitmap", 64, SHAPE, corrected=False) == pytest.approx(1e-6)
    other = Shape.random(768, 768, 0.5, "float32")
    assert model.predict("bitmap", 64, other) == pytest.approx(1e-6)
    assert cost_model.form_at(model.choose(SHAPE), 64) == "dense"
    assert model.is_corrected("bitmap", 64, SHAPE)
    assert not model.is_corrected("index", 64, SHAPE)


# ---- calibrating ----


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """No override, an empty cache of its own, and nothing remembered in the process."""
    monkeypatch.delenv("PYCOMPRESS_COST_MODEL")
    monkeypatch.setenv("PYCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cost_model, "_models", {})
    monkeypatch.setattr(cost_model, "_gave_up", set())
    monkeypatch.setattr(cost_model, "settle_ties", lambda *args, **kwargs: None)  # its tests call it by itself
    return tmp_path / "cache"


@pytest.fixture
def calibrations(monkeypatch):
    """Calibrations answer at once; the list holds the dtypes that were measured."""
    measured = []

    def measure_fits(dtype, *, progress=None):
        measured.append(dtype)
        return dict(model_of(dtype).fits)

    monkeypatch.setattr(cost_calibration, "measure_fits", measure_fits)
    return measured


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


# ---- a layer's own choice ----


def pruned_layer(n=32, k=48, sparsity=0.8, dtype="float32", bias=True, **options):
    linear = nn.Linear(k, n, bias)
    mask = torch.rand(n, k) >= sparsity
    return SparseLinear.from_dense(linear, mask, dtype=dtype, **options)


@pytest.mark.parametrize(
    ("dtype", "bias", "expected"),
    [
        ("float32", torch.float32, "float32"),
        ("float32", torch.bfloat16, "float32"),
        ("bfloat16", torch.bfloat16, "bfloat16"),
        ("bfloat16", torch.float32, "float32"),
        ("bfloat16", None, "float32"),
        ("int8", torch.float32, "int8"),
    ],
)
def test_the_dense_layer_it_competes_with(dtype, bias, expected):
    layer = pruned_layer(dtype=dtype, bias=bias is not None)
    if bias is not None:
        layer.to(bias)
    shape = Shape.of_layer(layer)
    assert (shape.dtype, shape.dense) == (dtype, expected)
    dense = cost_calibration.variant(layer, "dense", expected)
    assert isinstance(dense, Int8Linear if expected == "int8" else nn.Linear)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_variants_compute_the_same(dtype, activation):
    layer = pruned_layer(dtype=dtype, activation=activation)
    x = torch.randn(5, 48)
    expected = layer(x)
    for form in FORMS:
        other = cost_calibration.variant(layer, form, "int8" if dtype == "int8" else "float32")
        torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="unknown form 'csr'"):
        cost_calibration.variant(layer, "csr", "float32")


@pytest.fixture
def fake_variants(monkeypatch):
    """Layers of a made-up machine in the place of the real ones, whose index form is slower than predicted."""
    machine = FakeMachine(slower={"index": 1.5})
    made = []

    def variant(layer, form, dense):
        made.append(form)
        return machine.module(form, Shape.of_layer(layer))

    monkeypatch.setattr(cost_calibration, "variant", variant)
    return machine, made


def test_ties_are_settled_by_measuring_once(own_cache, fake_variants):
    machine, made = fake_variants
    layer = pruned_layer(64, 256, 0.6, format="bitmap")
    shape = Shape.of_layer(layer)
    model = model_of("float32")
    near = [m for m in BUCKETS[:-1] if len(_near(model, m, shape)) > 1]
    assert near, "the made-up machine has a break-even point"
    settle_ties(model, layer, shape, (1, 512), seconds=1e9, clock=machine.clock)
    assert set(made) >= {"index"}
    for m in near:
        for form in FORMS:
            if model.is_corrected(form, m, shape):
                real = seconds_of(form, m, shape) * machine.slower.get(form, 1.0)
                assert model.predict(form, m, shape) == pytest.approx(real)
    calls = machine.calls
    again = cost_cache.load(model.threads)
    assert again is None or again.corrections == model.corrections
    settle_ties(model, layer, shape, (1, 512), seconds=1e9, clock=machine.clock)
    settle_ties(model, layer, shape, (1, 512), seconds=1e9, clock=machine.clock)
    settled = machine.calls
    settle_ties(model, layer, shape, (1, 512), seconds=1e9, clock=machine.clock)
    assert machine.calls == settled, "what was measured is not measured again"
    assert settled >= calls


def _near(model, m, shape):
    times = {form: model.predict(form, m, shape) for form in FORMS}
    return [form for form in FORMS if times[form] <= cost_model.TIE * min(times.values())]


def test_ties_have_a_limit_in_time(own_cache, fake_variants):
    machine, _ = fake_variants
    layer = pruned_layer(64, 256, 0.6, format="bitmap")
    shape = Shape.of_layer(layer)
    model = model_of("float32")
    settle_ties(model, layer, shape, (1, 512), seconds=-1.0, clock=machine.clock)
    assert model.corrections == []


def test_making_a_layer_calibrates_and_loading_does_not(own_cache, calibrations, fake_variants):
    linear = nn.Linear(48, 32)
    mask = torch.rand(32, 48) >= 0.8
    layer = SparseLinear.from_dense(linear, mask)
    assert calibrations == ["float32"]
    fresh = SparseLinear(48, 32)
    fresh.load_state_dict(layer.state_dict())
    fresh(torch.randn(2, 48))
    SparseLinear.from_dense(linear, mask, dtype="bfloat16", cost_model=model_of("float32"), format="bitmap")
    assert calibrations == ["float32"]
    SparseLinear.from_dense(linear, mask, dtype="bfloat16")
    assert calibrations == ["float32", "bfloat16"]


def test_a_model_that_was_passed_decides_alone(own_cache, calibrations):
    layer = pruned_layer(cost_model=flat(bitmap=2e-6, index=1e-6, dense=3e-6))
    assert layer.choice == (ANY_M, 1)
    assert calibrations == []


# ---- explain ----


def test_explain_without_measuring():
    layer = pruned_layer(cost_model=flat(bitmap=2e-6, index=1e-6, dense=3e-6))
    explanation = layer.explain(tokens=(1, 300), measure=False)
    assert [(t.m, t.form, t.measured, t.dense_measured) for t in explanation.tokens] == [
        (1, "index", None, None),
        (300, "index", None, None),
    ]
    assert explanation.tokens[0].why == "predicted 3.00x as fast as dense"
    assert (explanation.tokens[0].predicted, explanation.tokens[0].dense_predicted) == (1e-6, 3e-6)
    text = str(explanation)
    assert "dense us predicted" in text
    assert "32x48 float32" in text
    console = Console(file=io.StringIO(), width=200)
    console.print(explanation)
    assert "3.00x as fast" in console.file.getvalue()


def test_explain_measures_both():
    explanation = pruned_layer().explain(tokens=(1, 5))
    assert [t.m for t in explanation.tokens] == [1, 5]
    assert all(t.measured > 0 and t.dense_measured > 0 for t in explanation.tokens)
    assert "built-in figures" in explanation.summary()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"format": "index"}, "format='index' was asked for"),
        ({"cost_model": "slow"}, "index is predicted to take 2.00x as long"),
    ],
)
def test_explain_says_why(options, why):
    if "cost_model" in options:
        options = {"cost_model": flat(bitmap=9e-6, index=2e-6, dense=1e-6)}
    assert pruned_layer(**options).explain(tokens=(8,), measure=False).tokens[0].why == why


@pytest.mark.parametrize("tokens", [(0,), (1.5,), ("8",)])
def test_explain_refuses(tokens):
    with pytest.raises(ValueError, match="expected integers of at least 1"):
        pruned_layer().explain(tokens=tokens)


def test_times_that_are_far_off_correct_nothing(own_cache, fake_variants):
    machine, _ = fake_variants
    machine.slower["index"] = 30.0
    layer = pruned_layer(64, 256, 0.6, format="bitmap")
    shape = Shape.of_layer(layer)
    model = model_of("float32")
    settle_ties(model, layer, shape, (1, 512), seconds=1e9, clock=machine.clock)
    assert not any("index" in key for key, _, _ in model.corrections)
