"""The installed package: what it is linked with, what importing it does, and that its instruction sets stay apart."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pycompress
from pycompress import _C

ROOT = Path(__file__).parent.parent
ISA_SOURCES = sorted(ROOT.glob("csrc/*/*_avx*.cpp"))
ISA_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mavxvnni", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISA_FLAGS += ["-mavx512vnni", "-mavx512bf16", "-mavx512vbmi", "-mavx512vbmi2"]


def test_module_is_small_and_knows_nothing_of_torch() -> None:
    module = Path(_C.__file__)
    assert module.stat().st_size < 5 << 20
    content = module.read_bytes()
    for library in (b"libtorch", b"libc10", b"libpython", b"libcuda"):  # a name that the loader would look for
        assert library not in content


def test_metadata() -> None:
    assert importlib.metadata.version("pycompress") == pycompress.__version__
    assert (Path(pycompress.__file__).parent / "py.typed").is_file()
    requires = importlib.metadata.requires("pycompress") or []
    needed = {r.split(">")[0].split(";")[0].strip() for r in requires if "extra ==" not in r}
    assert needed == {"torch", "numpy", "rich", "typer", "pydantic", "pyyaml", "jinja2"}


def run_python(code: str, folder: Path) -> str:
    """In a fresh interpreter, away from the repository."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light(tmp_path: Path) -> None:
    run_python(
        "import sys, pycompress, torch\n"
        "heavy = {'triton', 'transformers', 'matplotlib', 'onnxruntime', 'openvino', 'torchao'} & set(sys.modules)\n"
        "heavy |= {'pydantic', 'yaml', 'jinja2', 'pycompress.workflow', 'pycompress.recipe'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert torch.get_num_threads() >= 1\n",
        tmp_path,
    )


def test_kernels_are_a_part_of_the_package(tmp_path: Path) -> None:
    run_python("import pycompress.kernels, sys; assert 'kernels' not in sys.modules", tmp_path)


def test_one_thread_pool(tmp_path: Path) -> None:
    """The kernels run on the OpenMP library that torch has loaded."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("no /proc/self/maps to read the loaded libraries from")
    libraries = run_python(
        "import pycompress.ops\n"
        "for path in {line.split()[-1] for line in open('/proc/self/maps') if '.so' in line}: print(path)\n",
        tmp_path,
    ).split()
    openmp = [p for p in libraries if Path(p).name.startswith(("libgomp", "libomp", "libiomp"))]
    assert len(openmp) == 1, openmp


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX sources are built on x86-64 only")
@pytest.mark.parametrize("source", ISA_SOURCES, ids=lambda path: path.name)
def test_isa_files_share_no_code(source: Path, tmp_path: Path) -> None:
    """An inline function or a std template in such a file is a weak symbol, and the linker may pick it for everyone.

    Built without optimisation, where inlining hides none of them.
    """
    compiler, nm = shutil.which("g++"), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("needs g++ and nm")
    out = tmp_path / "out.o"
    command = [compiler, "-std=c++17", "-O0", "-w", "-fopenmp", "-fno-exceptions", *ISA_FLAGS, "-I", str(ROOT / "csrc")]
    subprocess.run([*command, "-c", str(source), "-o", str(out)], check=True)
    lines = subprocess.run([nm, "-C", "--defined-only", str(out)], capture_output=True, text=True, check=True).stdout
    shared = [line for line in lines.splitlines() if line.split(maxsplit=2)[1] in "WVu"]
    assert shared == []


def test_every_isa_has_its_sources() -> None:
    assert {p.stem.removeprefix("kernel_") for p in ISA_SOURCES if p.stem.startswith("kernel_")} == {
        "avx2", "avxvnni", "avx512", "avx512bf16", "avx512vbmi2", "avx512vnni",
    }  # fmt: skip
