"""What a run measures of a model: sizes, batches, latency, layers. No time is tested, only that it was taken."""

from __future__ import annotations

import json
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from pycompress import quantize_
from pycompress.bench.timing import Runner, time_round_robin
from pycompress.nn import (
    Int4Linear,
    Int8Conv2d,
    Int8Embedding,
    Int8Linear,
    Int8MultiheadAttention,
    MaskedLinear,
    SparseLinear,
)
from pycompress.report import model_bytes
from pycompress.workflow.measure import Quartiles, batch_of, in_eval_mode, latencies, latency, machine_peaks, sizes
from tests.measure_models import half_mask, mlp

# ---- sizes ----


def test_sizes_of_a_dense_model() -> None:
    model = mlp()
    found = sizes(model)
    assert found.parameters == 16 * 32 + 32 + 32 * 8 + 8
    assert found.nonzero == found.parameters
    assert found.sparsity == 0.0
    assert found.memory_bytes == model_bytes(model) == 4 * found.parameters


@pytest.mark.parametrize("gradient", ["masked", "dense"])
def test_sizes_count_what_a_mask_leaves(gradient: str) -> None:
    layer = MaskedLinear.from_linear(nn.Linear(16, 32), half_mask(32, 16), gradient=gradient)
    found = sizes(nn.Sequential(layer))
    assert found.parameters == 16 * 32 + 32
    assert found.nonzero == 16 * 32 // 2 + 32
    assert found.sparsity == 0.5


def test_sizes_of_our_layers_count_n_times_k() -> None:
    linear = nn.Linear(16, 32)
    with torch.no_grad():
        linear.weight[half_mask(32, 16)] = 0.0
    for layer in (SparseLinear.from_dense(linear), SparseLinear.from_dense(linear, dtype="int8")):
        found = sizes(nn.Sequential(layer))
        assert found.parameters == 16 * 32 + 32
        assert found.memory_bytes == layer.memory_bytes()
        assert found.sparsity >= 0.5
    quantised = Int8Linear.from_float(linear)
    found = sizes(nn.Sequential(quantised))
    assert found.parameters == 16 * 32 + 32
    assert found.sparsity == 1 - int((quantised.weight != 0).sum()) / (16 * 32)


@pytest.mark.parametrize("mode", ["int4", "nf4"])
def test_sizes_of_other_kinds_of_layers_count_every_weight(mode: str) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Conv2d(16, 8, 3), nn.Embedding(10, 16), nn.MultiheadAttention(16, 2))
    before = sizes(model)
    quantize_(model, {"*": mode, "1": "dynamic"}, layers="all", group_size=8)
    assert [type(layer) for layer in model] == [Int4Linear, Int8Conv2d, Int8Embedding, Int8MultiheadAttention]
    found = sizes(model)
    assert found.parameters == before.parameters
    assert found.memory_bytes == model_bytes(model) < before.memory_bytes / 2
    weight = model[0].to_float().weight
    assert sizes(model[:1]).nonzero == int(weight.count_nonzero()) + int(model[0].bias.count_nonzero())


def test_sizes_see_the_mask_of_torch_prune() -> None:
    linear = nn.Linear(16, 32)
    torch_prune.random_unstructured(linear, "weight", 0.25)
    found = sizes(nn.Sequential(linear))
    assert found.sparsity == 0.25
    assert found.parameters == 16 * 32 + 32


def test_sizes_count_tied_weights_once_and_take_a_model_without_linears() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False))
    model[1].weight = model[0].weight
    assert sizes(model).parameters == 80
    empty = sizes(nn.Sequential(nn.ReLU()))
    assert (empty.parameters, empty.nonzero, empty.sparsity, empty.memory_bytes) == (0, 0, 0.0, 0)


# ---- batches ----


Pair = namedtuple("Pair", "x lengths")


def test_batch_of_repeats_and_cuts_along_the_first_dimension() -> None:
    x = torch.arange(6).reshape(3, 2)
    assert batch_of(x, 2).tolist() == [[0, 1], [2, 3]]
    assert batch_of(x, 7)[:, 0].tolist() == [0, 2, 4, 0, 2, 4, 0]
    assert batch_of((x, None, [x]), 1)[2][0].tolist() == [[0, 1]]


def test_batch_of_keeps_what_is_no_sample() -> None:
    positions, scale = torch.arange(5)[None], torch.tensor(2.0)
    found = batch_of({"ids": torch.zeros(3, 5), "mask": torch.ones(3, 5), "positions": positions, "scale": scale}, 8)
    assert found["ids"].shape == found["mask"].shape == (8, 5)
    assert found["positions"] is positions
    assert found["scale"] is scale
    pair = batch_of(Pair(torch.zeros(3, 2), torch.tensor([1, 2, 3])), 4)
    assert isinstance(pair, Pair)
    assert pair.lengths.tolist() == [1, 2, 3, 1]


@pytest.mark.parametrize("sample", [torch.zeros(0, 3), torch.tensor(1.0), {"a": 1}, "text"])
def test_batch_of_refuses_a_sample_without_samples(sample: Any) -> None:
    with pytest.raises(ValueError, match="batch_of: the sample batch is"):
        batch_of(sample, 4)
    with pytest.raises(ValueError, match="size=0"):
        batch_of(torch.zeros(2, 2), 0)


# ---- latency ----


def test_latency_takes_turns_in_every_round() -> None:
    calls: list[str] = []

    def named(name: str) -> nn.Module:
        module = nn.Linear(4, 4)
        module.register_forward_pre_hook(lambda *_: calls.append(name))
        return nn.Sequential(module)

    found = latency(named("before"), named("after"), torch.zeros(1, 4), rounds=3)
    assert found.rounds == 3
    assert found.before.p25 <= found.before.p50 <= found.before.p75
    assert found.speedup.p25 > 0
    turns = [name for name, last in zip(calls, ["", *calls], strict=False) if name != last]
    assert len(turns) >= 5
    assert turns.count("before") >= 3
    json.dumps(found.to_dict(), allow_nan=False)


def test_latency_runs_in_eval_mode_without_gradients_and_puts_flags_back() -> None:
    seen: set[tuple[bool, bool, bool]] = set()
    model = mlp()
    model[2].eval()
    model[1].register_forward_hook(
        lambda m, x, y: seen.add((m.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
    )
    latency(mlp(), model, torch.zeros(2, 16), rounds=1)
    assert seen == {(False, False, False)}
    assert [module.training for module in model] == [True, True, False]


def test_flags_come_back_when_the_model_raises() -> None:
    model = mlp()
    with pytest.raises(RuntimeError, match="shapes"):
        latency(model, mlp(), torch.zeros(2, 15), rounds=1)
    assert model[0].training


def test_latencies_make_their_batches_and_may_be_left_out() -> None:
    shapes: set[int] = set()
    model = mlp()
    model[0].register_forward_hook(lambda m, args, y: shapes.add(len(args[0])))
    found = latencies(mlp(), model, torch.zeros(3, 16), (1, 8), rounds=1)
    assert list(found) == ["1", "8"]
    assert shapes == {1, 8}
    assert latencies(model, model, torch.zeros(3, 16), (1,), rounds=0) == {}
    with pytest.raises(ValueError, match="rounds=0"):
        latency(model, model, torch.zeros(3, 16), rounds=0)


def test_so_many_rounds_are_timed_as_are_asked_for() -> None:
    calls: list[str] = []
    runners = {name: Runner(lambda name=name: calls.append(name), "pool") for name in "ab"}  # type: ignore[misc]
    found = time_round_robin(runners, rounds=3, probe=lambda: calls.append("|"))
    assert len(found.probes) == 3
    assert {name: len(values) for name, values in found.by_round.items()} == {"a": 3, "b": 3}
    for name, stats in found.stats.items():
        assert min(found.by_round[name]) <= stats.p50 <= max(found.by_round[name])
        assert stats.samples == calls.count(name) - 5  # two that estimate the cost, and one untimed a round


def test_quartiles_interpolate() -> None:
    assert Quartiles.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Quartiles(2.0, 3.0, 4.0)


def test_in_eval_mode_puts_back_each_flag_by_itself() -> None:
    model = mlp()
    model[0].eval()
    with in_eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in (model, *model)] == [True, False, True, True]


def test_machine_peaks_are_json_ready() -> None:
    found = machine_peaks(seconds=0.01)
    json.dumps(found, allow_nan=False)
    assert found["fp32_gflops"] > 0
    assert found["read_gbps"] > 0
    assert found["threads"] == torch.get_num_threads()
