"""The tables of docs/gpu.md: what is read, what is added up, and that the page has its marks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import cuda_compile, gpu_tables
from tests.cuda_compile import TARGETS, Compiled

LOG = """
3: counted op=distill_loss kernel=distill_loss_rows case=warp,T=8,V=1000,bf16,grad bytes=50000 sectors=48960 floor=48000
counted op=int8_matmul kernel=quantize_rows case=M=16,K=64,N=32,bf16,dynamic bytes=3072 sectors=3072 floor=5000 shared=64 conflicts=0
counted op=int8_matmul kernel=tile<1> case=M=16,K=64,N=32,bf16,dynamic bytes=4000 sectors=3000 floor=5000 shared=128 conflicts=2
counted op=sparse_linear kernel=bitmap case=M=1,K=100,N=50,bf16,kept=0.2 bytes=2000 sectors=1984 floor=1900
all passed
"""  # noqa: E501


def test_counts_are_read_by_call() -> None:
    loss, layer, sparse = gpu_tables.read_counts(LOG)
    assert (loss.moved, loss.asked, loss.floor, loss.conflicts) == (48960, 50000, 48000, None)
    assert [launch.kernel for launch in layer.launches] == ["quantize_rows", "tile"]
    assert (layer.moved, layer.asked, layer.floor, layer.conflicts) == (6072, 7072, 5000, 2)
    assert layer.sizes == {"M": 16, "K": 64, "N": 32}
    assert gpu_tables.work(loss) == (48960 * 4096 / 8, 0.0, "bf16")
    assert gpu_tables.work(layer) == (6072, 2.0 * 16 * 64 * 32, "int8")
    assert gpu_tables.work(sparse) == (1984, pytest.approx(2.0 * 100 * 50 * 0.2), "bf16")


def test_estimates_are_of_what_takes_longer() -> None:
    table = gpu_tables.estimate_table(gpu_tables.read_counts(LOG))
    assert "distill_loss warp, T=4096, V=1000, bf16, grad | 25.1 | - | 12.5 (memory) | 7.5 (memory) |" in table
    big = "counted op=int8_matmul kernel=t case=M=8192,K=8192,N=8192,int8 bytes=1 sectors=1000000 floor=1"
    assert "(products)" in gpu_tables.estimate_table(gpu_tables.read_counts(big))


def test_compiled_kernels_are_a_line_each() -> None:
    kernels = [
        Compiled("csrc/int8_matmul/kernel_cuda.cu", name, target, registers, 0, 0, 0, 256, {})
        for name, registers in (("tile<1>", 100), ("tile<2>", 120))
        for target in TARGETS
    ]
    table = gpu_tables.compiled_table(kernels, gpu_tables.read_counts(LOG))
    assert table.splitlines()[2] == f"| int8_matmul: `tile` | 2 | 256 | {' | '.join(['100–120'] * 6)} | 0 | 128 |"


def test_triton_configurations_are_gathered() -> None:
    common = {"module": "int8_matmul_shipped", "stack": 0}
    first = {"name": "tile_16x64_dynamic_i8", "arch": 80, "registers": 90, "shared": 10, "instructions": ["mma.sync.x"]}
    second = {"name": "tile_16x64_static_i8", "arch": 90, "registers": 80, "shared": 20, "instructions": ["wgmma.x"]}
    rows = [common | first, common | second]
    line = gpu_tables.triton_table(rows).splitlines()[2]
    assert line == "| int8_matmul: `tile_16x64` | 2 | 90 | 10 | 80 | 20 | 0 | mma.sync, wgmma |"


def test_the_page_is_rewritten_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, log, triton = tmp_path / "gpu.md", tmp_path / "log", tmp_path / "triton.json"
    page.write_text(gpu_tables.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    log.write_text(LOG)
    triton.write_text(json.dumps([]))
    kernel = Compiled("csrc/int8_matmul/kernel_cuda.cu", "tile", "80", 1, 0, 0, 0, 32, {})
    monkeypatch.setattr(
        cuda_compile, "compiled", lambda: tuple(Compiled(**{**vars(kernel), "target": t}) for t in TARGETS)
    )
    arguments = ["--page", str(page), "--counted", str(log), "--triton", str(triton)]
    assert gpu_tables.main(arguments) == 0
    once = page.read_text(encoding="utf-8")
    assert "int8_matmul: `tile`" in once
    assert "distill_loss warp, T=8" in once
    assert gpu_tables.main(arguments) == 0
    assert page.read_text(encoding="utf-8") == once
    with pytest.raises(ValueError, match="once each"):
        gpu_tables.replaced("a page without marks", "counted", "")


def test_the_page_stays_where_there_is_nothing_to_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> tuple[Compiled, ...]:
        raise cuda_compile.NoCompilerError("no nvcc")

    monkeypatch.setattr(cuda_compile, "compiled", missing)
    page = tmp_path / "gpu.md"
    page.write_text(gpu_tables.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    before = page.read_text(encoding="utf-8")
    nothing = str(tmp_path / "nothing")
    assert gpu_tables.main(["--page", str(page), "--counted", nothing, "--triton", nothing]) == 0
    assert page.read_text(encoding="utf-8") == before


def test_the_page_promises_no_speed() -> None:
    text = gpu_tables.PAGE.read_text(encoding="utf-8")
    assert "None of this has been timed on a GPU yet" in text
    for name in ("compiled", "triton", "counted", "estimated"):
        assert f"<!-- {name} -->" in text
