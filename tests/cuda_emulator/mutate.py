"""Plants faults in the CUDA kernels and sees whether the emulator's tests fail.

Every statement that keeps threads in order (barriers, waits for copies, flags between blocks) is taken out in turn, in
a copy of the sources under ``build/mutants``; then the tests of its operation are built and run. One that still passes
is reported as missed, and the exit status is 1: the statement is superfluous, or the tests too weak. Takes 10 to 40
seconds a fault.

Here every warp operation puts the lanes' accesses to memory in order, on a GPU only ``__syncwarp`` does. One that is
there for that alone says so, ``// order of memory: ...``, and no test can miss it; it is counted apart, as unseen.

    python tests/cuda_emulator/mutate.py                     all
    python tests/cuda_emulator/mutate.py sparse_linear       one operation
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "mutants"
OPERATIONS = ("distill_loss", "int8_matmul", "sparse_linear")
COMMON = "csrc/common/cuda/device.h"  # tried with the tests of those that need its barriers
NEEDS_COMMON = ("distill_loss", "int8_matmul")
TEST_SECONDS = 600  # a kernel that hangs without the statement is caught too
UNSEEN = "// order of memory: "
# What to take out, and what to put there.
FAULTS = (
    (re.compile(r"__syncthreads\(\);"), ";"),
    (re.compile(r"__syncwarp\([\w:]*\);"), ";"),
    (re.compile(r"(?:cuda::)?cp_async_wait<[^;]*>\(\);"), ";"),
    (re.compile(r"(?:cuda::)?cp_async_commit\(\);"), ";"),
    (re.compile(r"cp_async_wait<(k?\w+) - 2>"), r"cp_async_wait<\1 - 1>"),
    (re.compile(r"while \([^;]*load_acquire[^;]*;"), ";"),
)


@dataclass(frozen=True)
class Mutant:
    """One place in one file, and the file without and with the fault."""

    file: Path
    line: int
    statement: str
    text: str
    mutated: str
    is_seen: bool


def mutants(copy: Path, operation: str) -> Iterator[Mutant]:
    """Every fault that can be planted in an operation's kernels. A comment is none."""
    folder = copy / "csrc" / operation
    common = (copy / COMMON,) if operation in NEEDS_COMMON else ()
    for file in (*sorted((*folder.glob("*.cu"), *folder.glob("*.cuh"))), *common):
        text = file.read_text()
        for pattern, instead in FAULTS:
            for match in pattern.finditer(text):
                start = text.rfind("\n", 0, match.start()) + 1
                if "//" in text[start : match.start()]:
                    continue
                mutated = text[: match.start()] + match.expand(instead) + text[match.end() :]
                line = text.count("\n", 0, match.start()) + 1
                is_seen = UNSEEN not in text[match.end() : text.find("\n", match.end())]
                yield Mutant(file.relative_to(copy), line, match.group(), text, mutated, is_seen)


def prepare() -> Path:
    """A copy of the sources with a build folder; returns the copy."""
    copy = WORK / "source"
    shutil.rmtree(copy, ignore_errors=True)
    for name in ("csrc", "cmake", "tests/cpp", "tests/cuda_emulator"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "CMakeLists.txt", copy)
    subprocess.run(
        ["cmake", "-S", copy, "-B", WORK / "build", "-G", "Ninja", "--log-level=WARNING", "-DCMAKE_BUILD_TYPE=Release",
         "-DPYCOMPRESS_BUILD_PYTHON=OFF", "-DPYCOMPRESS_BUILD_TESTS=ON", "-DPYCOMPRESS_CUDA=OFF"],
        check=True,
    )  # fmt: skip
    return copy


def failure_of(operation: str) -> str | None:
    """Builds and runs an operation's tests. Returns how they failed, None where they pass."""
    target = f"test_cuda_{operation}"
    built = subprocess.run(["cmake", "--build", WORK / "build", "--target", target], capture_output=True, text=True)
    if built.returncode != 0:
        raise RuntimeError(f"{target} does not compile: {built.stdout[-2000:]}")
    program = next(path for path in (WORK / "build").rglob(target) if path.is_file())
    try:
        done = subprocess.run([program], capture_output=True, text=True, errors="replace", timeout=TEST_SECONDS)
    except subprocess.TimeoutExpired:
        return f"runs for more than {TEST_SECONDS} s"
    if done.returncode == 0:
        return None
    last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return last[-1][:120] if last else f"exit status {done.returncode}"


def main() -> int:
    operations = tuple(sys.argv[1:]) or OPERATIONS
    if unknown := set(operations) - set(OPERATIONS):
        print(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(OPERATIONS)}")
        return 2
    copy = prepare()
    missed = unseen = planted = 0
    for operation in operations:
        failure = failure_of(operation)
        if failure is not None:
            print(f"{operation}: the tests fail as they are: {failure}")
            return 2
        for mutant in mutants(copy, operation):
            begin = time.monotonic()
            (copy / mutant.file).write_text(mutant.mutated)
            failure = failure_of(operation)
            (copy / mutant.file).write_text(mutant.text)
            planted += 1
            missed += failure is None and mutant.is_seen
            unseen += failure is None and not mutant.is_seen
            what = "caught" if failure is not None else "MISSED" if mutant.is_seen else "unseen"
            print(f"{what}  {mutant.file}:{mutant.line}  {mutant.statement}  ({time.monotonic() - begin:.0f} s)  "
                  f"{failure or ''}", flush=True)  # fmt: skip
    print(f"{planted - missed - unseen} of {planted} planted faults caught, {unseen} that the emulator cannot show")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
