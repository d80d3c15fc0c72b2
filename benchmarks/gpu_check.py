"""`make gpu-check`: everything that only a GPU can show, in one command, with the interpreter's own torch.

    python3 benchmarks/gpu_check.py [--only STEP,...] [--full] [--targets 90a] [--out FOLDER]

Steps, each with the ones before it done once:

    build      an environment of its own in build/gpu-check that sees the packages of this interpreter, and pycompress
               in it, editable, with PYCOMPRESS_CUDA=ON
    info       the GPU, its driver, what was built and what is usable
    tests      the tests of the GPU backends, on the device: against the float64 formulas, streams, graphs, no waiting
    sanitize   compute-sanitizer (memcheck, racecheck, synccheck) over every CUDA kernel; skipped where it is missing
    bench      the benchmarks with --device cuda; rivals that are not installed are named. CSV and tables in FOLDER

A step that fails does not keep the next ones from running; the exit status tells. Nothing of the interpreter is
changed, and nothing is downloaded where it has torch, numpy, typer, rich, pytest, hypothesis, scikit-build-core,
pybind11, cmake and ninja. Where one is missing: `python3 -m pip install` it, or into build/gpu-check/venv.
"""

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "gpu-check"
PYTHON = PLACE / "venv" / "bin" / "python"
STEPS = ("build", "info", "tests", "sanitize", "bench")
BENCHMARKS = ("int8_matmul", "distill_loss", "sparse_linear")
TOOLS = ("memcheck", "racecheck", "synccheck")
# Module -> the name that pip knows.
NEEDED = {
    "torch": "torch", "numpy": "numpy", "typer": "typer", "rich": "rich", "pytest": "pytest",
    "hypothesis": "hypothesis", "scikit_build_core": "scikit-build-core", "pybind11": "pybind11", "pip": "pip",
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """environment: in addition to this process's. optional: a failure is told and does not count."""

    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    optional: bool = False

    def __str__(self) -> str:
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment), shlex.join(self.words)])


def missing_packages(has: Callable[[str], bool]) -> list[str]:
    found = [pip for module, pip in NEEDED.items() if not has(module)]
    found += [tool for tool in ("cmake", "ninja") if not (has(tool) or shutil.which(tool))]
    return found


# ---- the steps ----


def make_environment() -> None:
    """A venv without packages, which also sees those of this interpreter, a venv or not."""
    venv = PLACE / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(venv)], check=True)
    here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    ask = [str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    (own / "parent.pth").write_text("".join(f"{path}\n" for path in here))


def build_commands(targets: str) -> list[Command]:
    options = ["build-dir=build/gpu-check/editable", "cmake.define.PYCOMPRESS_CUDA=ON"]
    options += [f"cmake.define.CMAKE_CUDA_ARCHITECTURES={targets}"] if targets else []
    words = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-build-isolation"]
    words += ["--no-deps", "--no-index", *(f"--config-settings={option}" for option in options)]
    return [Command((*words, "--editable", str(ROOT)))]


def info_commands() -> list[Command]:
    smi = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader")
    return [Command(smi, optional=True), Command((str(PYTHON), "-m", "pycompress.cli", "info"))]


def test_commands() -> list[Command]:
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_*gpu*.py"))
    return [Command((str(PYTHON), "-m", "pytest", "-rs", *files, "tests/test_triton_compiled.py"))]


def sanitize_commands(sanitizer: str) -> list[Command]:
    """Every tensor in an allocation of its own, so that an access past its end is one past the allocation's."""
    environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return [
        Command(
            (
                sanitizer, "--tool", tool, "--error-exitcode", "99", "--kernel-name", "kns=pycompress",
                str(PYTHON), "-m", "tests.gpu_once",
            ),
            environment,
        )
        for tool in TOOLS
    ]  # fmt: skip


def bench_commands(out: Path, full: bool) -> list[Command]:
    options = [] if full else ["--quick"]
    return [
        Command((str(PYTHON), "-m", "pycompress.cli", "bench", name, "--device", "cuda", "--out", str(out), *options))
        for name in BENCHMARKS
    ]


# ---- the command ----

Runner = Callable[[Command], int]


def run(command: Command) -> int:
    print(f"$ {command}", flush=True)
    try:
        done = subprocess.run(command.words, cwd=ROOT, env={**os.environ, **dict(command.environment)}, check=False)
    except FileNotFoundError as error:
        print(f"{error.filename} is not installed", flush=True)
        return 127
    return done.returncode


def check(step: str, options: argparse.Namespace, runner: Runner) -> str:
    """Runs one step: "ok", "FAILED: ..." or "skipped: ..."."""
    if step == "build":
        missing = missing_packages(lambda module: importlib.util.find_spec(module) is not None)
        if missing:
            return f"FAILED: not installed beside {sys.executable}: {' '.join(missing)}; python3 -m pip install them"
        options.environment()
        commands = build_commands(options.targets)
    elif step == "sanitize":
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            return "skipped: no compute-sanitizer on PATH; it comes with the CUDA toolkit"
        commands = sanitize_commands(sanitizer)
    else:
        commands = {
            "info": info_commands, "tests": test_commands, "bench": lambda: bench_commands(options.out, options.full)
        }[step]()  # fmt: skip
    failed = [c for c in commands if runner(c) != 0 and not c.optional]
    return f"FAILED: {'; '.join(map(str, failed))}" if failed else "ok"


def steps(text: str) -> list[str]:
    """ "build,tests" -> ["build", "tests"]; ValueError, which argparse reports, for anything else."""
    found = text.split(",")
    for name in found:
        if name not in STEPS:
            raise ValueError(f"unknown step {name!r}")
    return found


def main(argv: Sequence[str] | None = None, runner: Runner = run, environment: Callable[[], None] | None = None) -> int:
    """Returns 0 where no step failed. runner, environment: what runs a command and makes the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", type=steps, default=list(STEPS), metavar="STEP,...", help=f"of {', '.join(STEPS)}")
    add("--full", action="store_true", help="the whole benchmarks; else a few cases of each")
    add("--targets", default="", help="CMAKE_CUDA_ARCHITECTURES; default: all that a release is built for")
    add("--out", type=Path, default=ROOT / "bench-out", help="folder for the benchmarks' files")
    options = parser.parse_args(argv)
    options.environment = environment or make_environment
    results = {}
    for step in options.only:
        print(f"\n==> {step}", flush=True)
        start = time.perf_counter()
        results[step] = f"{check(step, options, runner)} ({time.perf_counter() - start:.0f} s)"
        if step == "build" and results[step].startswith("FAILED"):
            break
    print("\n==> gpu-check")
    for step, result in results.items():
        print(f"{step:10} {result}")
    return 1 if any(result.startswith("FAILED") for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
