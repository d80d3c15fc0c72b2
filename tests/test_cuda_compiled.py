"""The CUDA kernels as nvcc compiles them for every target, and what the build does with and without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import cuda_compile
from tests.cuda_compile import REGISTERS_PER_SM, TARGETS, Compiled, NoCompilerError

# ---- compiled kernels ----


@pytest.fixture(scope="module")
def kernels() -> tuple[Compiled, ...]:
    try:
        return cuda_compile.compiled()
    except NoCompilerError as error:
        pytest.skip(f"needs nvcc and cuobjdump: {error}")


def wrong(kernels: tuple[Compiled, ...], what: str, is_wrong: object) -> list[str]:
    assert callable(is_wrong)
    return [f"{k.source} {k.name} sm_{k.target}: {what} {getattr(k, what)}" for k in kernels if is_wrong(k)]


def test_every_kernel_is_there_for_every_target(kernels: tuple[Compiled, ...]) -> None:
    by_target = {target: {(k.source, k.name) for k in kernels if k.target == target} for target in TARGETS}
    assert by_target["80"]
    assert {k.source for k in kernels} == {str(p.relative_to(cuda_compile.ROOT)) for p in cuda_compile.sources()}
    for target, found in by_target.items():
        assert found == by_target["80"], target


def test_nothing_is_spilled(kernels: tuple[Compiled, ...]) -> None:
    assert wrong(kernels, "spills", lambda k: k.spills) == []
    assert wrong(kernels, "stack", lambda k: k.stack) == []  # an array that no register can hold


def test_a_block_fits_a_multiprocessor(kernels: tuple[Compiled, ...]) -> None:
    """Registers are given to warps in units of 256. Without __launch_bounds__ the launch could fail on a GPU."""
    assert wrong(kernels, "threads", lambda k: k.threads is None) == []

    def too_many(k: Compiled) -> bool:
        return -(-k.registers // 8) * 8 * (k.threads or 0) > REGISTERS_PER_SM

    assert wrong(kernels, "registers", too_many) == []
    assert wrong(kernels, "shared", lambda k: k.shared > 1024) == []  # all else is asked for at the launch


# A pattern of kernels' names -> the instructions that the machine code of all of them must have.
EXPECTED = {
    # products on tensor cores, fed by asynchronous copies
    r"multiply_tile<\d+, true>": ("IMMA", "LDGSTS", "LDSM"),
    r"sparse_2to4<(Bf16|F16), .+>": ("HMMA.SP", "LDGSTS"),
    r"sparse_2to4<S8, .+>": ("IMMA.SP", "LDGSTS"),
    # streams: 16 bytes a load
    r"stream_weight<\d+, \w+, true>": ("LDG.E.128",),
    r"stream_weight<\d+, false, true>": ("IDP.4A",),
    r"sparse_bitmap<.+>": ("LDGSTS",),
    r"distill_loss_rows<VectorSlots<.+>": ("LDGSTS", "STG.E.128"),
    r"distill_loss_scale<.+>": ("LDG.E.128", "STG.E.128"),
    r"quantize_rows<.+>": ("LDG.E.128",),
    r"add_splits": ("LDG.E.128",),
}


@pytest.mark.parametrize("pattern", EXPECTED)
def test_machine_code(kernels: tuple[Compiled, ...], pattern: str) -> None:
    found = [k for k in kernels if re.fullmatch(pattern, k.name)]
    assert found, f"no kernel {pattern}; there are {sorted({k.name for k in kernels})}"
    for kernel in found:
        for opcode in EXPECTED[pattern]:
            assert kernel.count(opcode) > 0, f"{kernel.name} sm_{kernel.target}: no {opcode} in {kernel.instructions}"


# ---- reading what the tools say ----


@pytest.mark.parametrize(
    ("whole", "brief"),
    [
        ("void pycompress::int8_matmul::tile<__nv_bfloat16, (int)128, (bool)1>(Params)", "tile<bf16, 128, 1>"),
        ("void pycompress::(anonymous namespace)::rows<float, __half>(pycompress::Params<float>)", "rows<fp32, fp16>"),
        ("pycompress::sparse_linear::cuda::expand(int)", "expand"),
        ("void a::b<a::Tile<(int)16, (a::Kind)2> >(a::P<a::Tile<(int)16, (a::Kind)2> >)", "b<Tile<16, 2>>"),
    ],
)
def test_names_are_shortened(whole: str, brief: str) -> None:
    assert cuda_compile.short(whole) == brief


def test_ptxas_and_sass_are_read() -> None:
    said = (
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : Compiling entry function '_Z4tileIfEvi' for 'sm_90a'\n"
        "ptxas info    : Function properties for _Z4tileIfEvi\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers, 16 bytes cumulative stack size, 64 bytes smem\n"
    )
    sass = (
        "Fatbin elf code:\n================\narch = sm_90a\ncode version = [1,8]\n"
        "\tcode for sm_90a\n\t\tFunction : _Z4tileIfEvi\n"
        "        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */\n"
        "                                                               /* 0x000fe40000000800 */\n"
        "        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ; /* 0x0000000402040981 */\n"
        "        /*0020*/                   IMMA.SP.16864.S8.S8 R4, R4, R6, R4, R8, 0x0 ; /* 0x00 */\n"
    )
    ptx = ".visible .entry _Z4tileIfEvi(\n\t.param .u32 _Z4tileIfEvi_param_0\n)\n.maxntid 64, 2, 1\n{\n"
    (kernel,) = cuda_compile.read("a.cu", said, sass, ptx)
    assert (kernel.name, kernel.target, kernel.threads) == ("tile<fp32>", "90a", 128)
    assert (kernel.registers, kernel.shared, kernel.stack, kernel.spills) == (168, 64, 16, 20)
    counts = [kernel.count(opcode) for opcode in ("IMMA", "IMMA.SP", "LDG.E.128", "LDG.SP", "LDC")]
    assert counts == [1, 1, 1, 0, 1]


# ---- the build ----

PROJECT = """
cmake_minimum_required(VERSION 3.18)
project(configured LANGUAGES CXX)
include({cmake}/cuda.cmake)
message(STATUS "architectures: ${{CMAKE_CUDA_ARCHITECTURES}}")
message(STATUS "have: ${{PYCOMPRESS_HAVE_CUDA}}")
"""


def configured(folder: Path, *options: str, nvcc: str | None = None) -> tuple[int, str]:
    """Status and output of CMake with these options; nvcc: text of a script that stands for it, or no nvcc at all."""
    (folder / "CMakeLists.txt").write_text(PROJECT.format(cmake=(cuda_compile.ROOT / "cmake").as_posix()))
    tools = folder / "bin"
    tools.mkdir()
    for name in ("c++", "cc", "g++", "ld", "ar", "ranlib", "make", "sh", "as", "uname"):
        if (there := shutil.which(name)) is not None:
            (tools / name).symlink_to(there)
    if nvcc is not None:
        (tools / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
        (tools / "nvcc").chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CXX", "CC")}
    env["PATH"] = str(tools)
    command = [cuda_compile.cmake(), "-G", "Unix Makefiles", "-S", str(folder), "-B", str(folder / "build"), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, check=False)
    return done.returncode, " ".join(done.stdout.split())


@pytest.fixture(autouse=True)
def _has_cmake(request: pytest.FixtureRequest) -> None:
    if "tmp_path" in request.fixturenames:
        try:
            cuda_compile.cmake()
        except NoCompilerError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize("wanted", [(), ("-DPYCOMPRESS_CUDA=AUTO",), ("-DPYCOMPRESS_CUDA=auto",)])
def test_auto_goes_on_without_a_compiler(tmp_path: Path, wanted: tuple[str, ...]) -> None:
    status, said = configured(tmp_path, *wanted)
    assert status == 0, said
    assert "pycompress: no CUDA module (no nvcc on PATH" in said
    assert "have: OFF" in said


def test_off_looks_for_nothing(tmp_path: Path) -> None:
    status, said = configured(tmp_path, "-DPYCOMPRESS_CUDA=OFF", nvcc="echo called > called; exit 1")
    assert status == 0, said
    assert "pycompress: no CUDA module (PYCOMPRESS_CUDA=OFF)" in said
    assert not list(tmp_path.rglob("called"))


def test_on_without_a_compiler_stops_and_tells_the_remedy(tmp_path: Path) -> None:
    status, said = configured(tmp_path, "-DPYCOMPRESS_CUDA=ON")
    assert status != 0
    assert "PYCOMPRESS_CUDA=ON: no nvcc on PATH, nor under CUDA_HOME or CUDA_PATH, and CUDACXX is not set." in said
    assert "Install the CUDA toolkit 12.8 or newer" in said
    assert "PYCOMPRESS_CUDA=OFF" in said


def test_nonsense_is_refused(tmp_path: Path) -> None:
    status, said = configured(tmp_path, "-DPYCOMPRESS_CUDA=maybe")
    assert status != 0
    assert "PYCOMPRESS_CUDA=maybe: expected AUTO, ON or OFF" in said


OLD = "echo 'Cuda compilation tools, release 11.8, V11.8.89'"
FOREIGN = "echo 'no nvcc at all'"
BROKEN = "[ \"$1\" = --version ] && echo 'Cuda compilation tools, release 13.0, V13.0.88' || exit 1"


@pytest.mark.parametrize(
    ("nvcc", "why"),
    [
        (OLD, "nvcc is 11.8, 12.8 or newer is needed"),
        (FOREIGN, "nvcc --version does not answer as nvcc does"),
        (BROKEN, "nvcc 13.0 cannot compile with this host compiler"),
    ],
    ids=["old", "foreign", "broken"],
)
@pytest.mark.parametrize("wanted", ["AUTO", "ON"])
def test_a_compiler_that_will_not_do(tmp_path: Path, nvcc: str, why: str, wanted: str) -> None:
    status, said = configured(tmp_path, f"-DPYCOMPRESS_CUDA={wanted}", nvcc=nvcc)
    assert why in said
    if wanted == "AUTO":
        assert status == 0, said
        assert "have: OFF" in said
    else:
        assert status != 0
        assert "PYCOMPRESS_CUDA=ON:" in said


@pytest.mark.parametrize(
    ("wanted", "given", "architectures"),
    [
        ("AUTO", None, "80-real;86-real;89-real;90a-real;100-real;120"),
        ("ON", "80;90a-real", "80;90a-real"),
    ],
)
def test_a_compiler_is_taken(tmp_path: Path, wanted: str, given: str | None, architectures: str) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    options = [f"-DPYCOMPRESS_CUDA={wanted}", *([f"-DCMAKE_CUDA_ARCHITECTURES={given}"] if given else [])]
    status, said = configured(tmp_path, *options, nvcc=f'PATH="{os.environ["PATH"]}" exec {nvcc} "$@"')
    assert status == 0, said
    assert f"architectures: {architectures} -- have: ON" in said
    assert f"pycompress: CUDA module for {architectures.replace(';', ' ')} (nvcc " in said
