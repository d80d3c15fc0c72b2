"""Compiles every shipped configuration of the Triton kernels for GPUs that are not there, and says what came out.

``python -m tests.triton_compile [--out FILE] [--modules NAME ...]`` prints a line a kernel and writes JSON: a list of
rows as :class:`Row` holds them. A program of its own: where kernels are to be compiled, TRITON_INTERPRET must not be
set when they are imported.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Modules of pycompress.kernels that have shipped().
MODULES = ("int8_matmul_shipped", "int4_matmul", "sparse_linear", "distill_loss")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block may have
_INSTRUCTION = re.compile(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|cp\.async\.c[ag])[\w.:]*")
_USAGE = re.compile(r"(REG|STACK|LOCAL):(\d+)")


@dataclass
class Row:
    """What the compilers made of one configuration.

    stack: bytes a thread keeps in memory, spills among them. shared: bytes a block. instructions: those for matrices
    and asynchronous copies in the PTX. wants: a regular expression that one of them must match. error: why there is
    nothing to tell.
    """

    module: str
    name: str
    arch: int
    num_warps: int
    num_stages: int
    wants: str | None
    registers: int = 0
    stack: int = 0
    shared: int = 0
    instructions: tuple[str, ...] = ()
    error: str | None = None


def configurations(modules: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(module, index in its shipped(), architecture)."""
    for module in modules:
        for index, shipped in enumerate(_shipped(module)):
            for arch in shipped.arches:
                yield module, index, arch


def _shipped(module: str) -> list[Any]:
    return list(importlib.import_module(f"pycompress.kernels.{module}").shipped())


def compile_one(which: tuple[str, int, int]) -> Row:
    import triton
    from pycompress.kernels.common import OPTIONS
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, index, arch = which
    shipped = _shipped(module)[index]
    wants = shipped.wants.get(arch) if shipped.wants else None
    row = Row(module, shipped.name, arch, shipped.num_warps, shipped.num_stages, wants)
    source = ASTSource(
        fn=shipped.fn, signature=dict(shipped.signature), constexprs=dict(shipped.constexprs), attrs=dict(shipped.attrs)
    )
    options = {"num_warps": shipped.num_warps, "num_stages": shipped.num_stages, **OPTIONS}
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # whatever a compiler throws is the finding
        row.error = f"{type(error).__name__}: {error}"[-2000:]
        return row
    row.shared = kernel.metadata.shared
    row.instructions = tuple(sorted(set(_INSTRUCTION.findall(kernel.asm["ptx"]))))
    usage = resource_usage(kernel.asm["cubin"])
    row.registers, row.stack = usage["REG"], usage["STACK"] + usage["LOCAL"]
    return row


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of the kernel in a cubin, by the cuobjdump that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return usage_of(said.stdout)


def usage_of(said: str) -> dict[str, int]:
    return {key: int(value) for key, value in _USAGE.findall(said)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--modules", nargs="+", default=MODULES, help="of pycompress.kernels")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("triton_compile: TRITON_INTERPRET is set, kernels would be interpreted; unset it")
    rows = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        for row in pool.map(compile_one, configurations(options.modules)):
            rows.append(row)
            print(
                f"sm_{row.arch} {row.name}: {row.registers} registers, {row.stack} bytes of stack, {row.shared} of "
                f"shared memory{'; ' + row.error if row.error else ''}"
            )
    if options.out:
        options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
