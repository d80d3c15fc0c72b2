"""The CUDA kernels as nvcc makes them, for every target of a release: registers, stack, spills and machine code.

Sources and flags are those of the CUDA module: CMake configures it and says how it would compile each file. What
differs is that nothing is made for the host, and that ptxas tells what it did (``-Xptxas -v``). The machine code is
read with the ``cuobjdump`` in Triton's wheel, so that a toolkit of nvcc alone is enough.

``python -m tests.cuda_compile`` prints the table.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "cuda-compiled"
TARGETS = ("80", "86", "89", "90a", "100", "120")  # and PTX of the last; see cmake/cuda.cmake
REGISTERS_PER_SM = 65536


class NoCompilerError(RuntimeError):
    """What is missing here to compile the kernels, or to read what came out."""


@dataclass(frozen=True)
class Compiled:
    """One kernel, as a template's arguments make it, for one target.

    name: as short as it stays clear, e.g. "tile<bf16, 128>". stack and spills in bytes; threads: the most that a block
    of it may have (``__launch_bounds__``), None where it does not say. instructions: opcodes in its machine code, with
    their suffixes, and how often each occurs.
    """

    source: str
    name: str
    target: str
    registers: int
    shared: int
    stack: int
    spills: int
    threads: int | None
    instructions: dict[str, int]

    def count(self, opcode: str) -> int:
        """Occurrences of opcode with any suffixes: "IMMA" counts IMMA.16832.S8.S8 too, "IMMA.SP" the sparse ones."""
        base, *suffixes = opcode.split(".")
        return sum(
            times
            for found, times in self.instructions.items()
            if found.split(".")[0] == base and set(suffixes) <= set(found.split(".")[1:])
        )


# ---- tools ----


def _tool(name: str, *hints: Path) -> str:
    for hint in hints:
        if (hint / name).is_file():
            return str(hint / name)
    found = shutil.which(name)
    if found is None:
        raise NoCompilerError(f"{name} is not installed")
    return found


def cmake() -> str:
    return _tool("cmake", Path(sys.executable).parent)


def cuobjdump() -> str:
    """That of Triton's wheel, which knows every target; else the toolkit's."""
    triton = importlib.util.find_spec("triton")
    folders = (triton.submodule_search_locations or ()) if triton else ()
    return _tool("cuobjdump", *(Path(folder) / "backends" / "nvidia" / "bin" for folder in folders))


def configure(build: Path, *options: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Configures the Python modules in `build`; its output is in .stdout."""
    import pybind11

    ninja = _tool("ninja", Path(sys.executable).parent)
    command = [
        cmake(), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options,
    ]  # fmt: skip
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=env
    )  # fmt: skip


@functools.cache
def commands() -> dict[tuple[str, str], list[str]]:
    """(source, target) -> the command that compiles it to device code alone, verbosely; one a target, as their output
    would be mixed up. The source is relative to the repository."""
    done = configure(BUILD, "-DPYCOMPRESS_CUDA=ON", "-UCMAKE_CUDA_ARCHITECTURES")
    if done.returncode != 0:
        if "PYCOMPRESS_CUDA=ON:" in done.stdout:
            raise NoCompilerError(re.split("PYCOMPRESS_CUDA=ON: ", done.stdout)[1].split("\n\n")[0])
        raise RuntimeError(f"CMake failed:\n{done.stdout[-4000:]}")
    found = {}
    for entry in json.loads((BUILD / "compile_commands.json").read_text()):
        if not entry["file"].endswith(".cu"):
            continue
        command = _without(shlex.split(entry["command"]))
        for target in TARGETS:
            code = f"-gencode=arch=compute_{target},code=[sm_{target},compute_{target}]"
            found[os.path.relpath(entry["file"], ROOT), target] = [*command, code, "-Xptxas=-v", "-fatbin"]
    return found


def _without(words: list[str]) -> list[str]:
    """A command for nvcc without what it makes for the host, where that goes to, and its targets."""
    kept, words = [], words[:]
    while words:
        word = words.pop(0)
        if word in ("-o", "-x", "-MT", "-MF"):
            words.pop(0)
        elif word not in ("-c", "-MD") and not word.startswith(("--threads", "--generate-code", "--compress-mode")):
            kept.append(word)
    return kept


# ---- compiling ----


def sources() -> list[Path]:
    return sorted(ROOT.glob("csrc/*/kernel_cuda*.cu"))


def _key(source: str, command: list[str]) -> str:
    """Changes with the command, the source, and what it includes of this repository."""
    digest = hashlib.sha256("\0".join(command).encode())
    due, seen = [ROOT / source], set[Path]()
    while due:
        path = due.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        text = path.read_bytes()
        digest.update(text)
        due += [ROOT / "csrc" / name.decode() for name in re.findall(rb'^#include "(.+)"', text, re.MULTILINE)]
    return digest.hexdigest()


def _compile(source: str, target: str, command: list[str]) -> list[Compiled]:
    """What was compiled before from the same sources stays in build/, so that a second run is quick."""
    stem = source.removeprefix("csrc/").removesuffix(".cu").replace("/", "-") + f"-{target}"
    kept, key = BUILD / f"{stem}.json", _key(source, command)
    if kept.is_file():
        earlier = json.loads(kept.read_text())
        if earlier["key"] == key:
            return [Compiled(**entry) for entry in earlier["kernels"]]
    image = BUILD / f"{stem}.fatbin"
    done = subprocess.run([*command, "-o", str(image)], capture_output=True, text=True, check=False, cwd=BUILD)
    if done.returncode != 0:
        raise RuntimeError(f"{source} does not compile for sm_{target}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    found = read(source, done.stdout + done.stderr, _dump("-sass", image), _dump("-ptx", image))
    kept.write_text(json.dumps({"key": key, "kernels": [asdict(k) for k in found]}, indent=1))
    return found


def _dump(what: str, image: Path) -> str:
    return subprocess.run([cuobjdump(), what, str(image)], capture_output=True, text=True, check=True).stdout


@functools.cache
def compiled() -> tuple[Compiled, ...]:
    """Every kernel for every target.

    Raises:
        NoCompilerError: no CUDA compiler, or no cuobjdump.
    """
    cuobjdump()
    jobs = [(*of, command) for of, command in commands().items()]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = [kernel for kernels in pool.map(lambda job: _compile(*job), jobs) for kernel in kernels]
    return tuple(sorted(found, key=lambda k: (k.source, k.name, TARGETS.index(k.target))))


# ---- reading ----

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_MAXNTID = re.compile(
    r"\.entry (\w+)\([^{]*?\)\s*(?:\.\w+ [\d, ]+\s*)*?\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", re.DOTALL
)


def read(source: str, said: str, sass: str, ptx: str) -> list[Compiled]:
    """said: by ptxas -v. sass, ptx: cuobjdump's of the image that it made."""
    opcodes = _instructions(sass)
    threads = {found[1]: _product(found.groups()[1:]) for found in _MAXNTID.finditer(ptx)}
    parts = _ENTRY.split(said)[1:]
    blocks = list(zip(parts[0::3], parts[1::3], parts[2::3], strict=True))
    names = _shortened([mangled for mangled, _, _ in blocks])
    found = []
    for mangled, target, text in blocks:
        stack, stores, loads = map(int, _needed(_STACK, text, mangled).groups())
        shared = _SHARED.search(text)
        found.append(
            Compiled(
                source,
                names[mangled],
                target,
                int(_needed(_USED, text, mangled)[1]),
                int(shared[1]) if shared else 0,
                stack,
                stores + loads,
                threads.get(mangled),
                dict(opcodes[mangled, target]),
            )
        )
    return found


def _needed(pattern: re.Pattern[str], text: str, mangled: str) -> re.Match[str]:
    found = pattern.search(text)
    if found is None:
        raise RuntimeError(f"ptxas -v said nothing like {pattern.pattern!r} of {mangled}: {text[:400]!r}")
    return found


def _product(sizes: tuple[str | None, ...]) -> int:
    product = 1
    for size in sizes:
        product *= int(size or 1)
    return product


def _instructions(sass: str) -> dict[tuple[str, str], Counter[str]]:
    """(mangled name, target) -> opcodes."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for image in re.split(r"^arch = sm_", sass, flags=re.MULTILINE)[1:]:
        target = image[: image.index("\n")].strip()
        for function in re.split(r"^\s*Function : ", image, flags=re.MULTILINE)[1:]:
            name, _, code = function.partition("\n")
            found[name.strip(), target] = Counter(_OPCODE.findall(code))
    return found


def _shortened(mangled: list[str]) -> dict[str, str]:
    """Mangled names to short ones: without namespaces, the arguments of the function and CUDA's names of types."""
    unique = sorted(set(mangled))
    said = subprocess.run(
        [_tool("c++filt"), *unique], capture_output=True, text=True, check=True
    ).stdout.splitlines() if unique else []  # fmt: skip
    return {name: short(whole) for name, whole in zip(unique, said, strict=True)}


def short(whole: str) -> str:
    """ "void pycompress::cuda::tile<__nv_bfloat16, (int)128, true>(Params)" -> "tile<bf16, 128, true>"."""
    name = whole.removeprefix("void ")
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        before = name[:i].endswith(("(anonymous namespace", ")")) or name[i:].startswith("(anonymous")
        if letter == "(" and depth == 0 and not before:
            end = i
            break
    name = re.sub(r"\((?:int|bool|unsigned int|long|[\w:]+)\)(?=-?[\dtf])", "", name[:end])
    name = re.sub(r"(?:\w+::|\(anonymous namespace\)::)+", "", name).replace(" >", ">")
    for long, brief in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32"), ("signed char", "int8")):
        name = name.replace(long, brief)
    return name


def rows() -> list[dict[str, object]]:
    """The table without the machine code, for docs/gpu.md."""
    return [{k: v for k, v in asdict(kernel).items() if k != "instructions"} for kernel in compiled()]


def main() -> int:
    try:
        found = compiled()
    except NoCompilerError as error:
        print(f"nothing compiled: {error}", file=sys.stderr)
        return 1
    width = max(len(k.name) for k in found)
    print(f"{'kernel':{width}} {'target':>7} {'registers':>9} {'threads':>7} {'shared':>6} {'stack':>5} {'spills':>6}")
    for k in found:
        print(
            f"{k.name:{width}} {'sm_' + k.target:>7} {k.registers:9} {k.threads or '-':>7} {k.shared:6} {k.stack:5} "
            f"{k.spills:6}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
