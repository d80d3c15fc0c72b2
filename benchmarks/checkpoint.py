"""How long a checkpoint takes to load, and how much memory, against safetensors' own load of the same file.

    python benchmarks/checkpoint.py [--megabytes 500] [--repeats 5] [--csv FILE]

The model: int8 linear layers of 4096 x 5120 behind a bfloat16 embedding, saved plain and compact. Every row is measured
in a fresh process, as a program that starts: its libraries are imported, the model stands on the meta device, the file
is in the page cache, and the memory that it will take was used and freed just before: a virtual machine gets memory
that it did not use, or not for a second or two, from its host first, which takes up to a second for 500 MB. "load" is
the call; "ready" also reads every byte of what it returned once, as the first use will: load_file returns mapped
memory, which is read from the file only then. Peak is resident memory at most during both, less what was resident
before, relative to the bytes of the file.
"""

from __future__ import annotations

import argparse
import csv
import json
import mmap
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

from pycompress.bench.memory import peak_extra_bytes
from pycompress.checkpoint import load_pretrained, save_pretrained
from pycompress.nn import Int8Linear

N, K, VOCABULARY, WIDTH = 5120, 4096, 16384, 2048
FIELDS = ("provider", "form", "file_bytes", "load_ms", "ready_ms", "ready_best_ms", "peak_of_file")


def model_of(megabytes: int) -> nn.Module:
    """On the meta device; the bytes of its weights are about those."""
    layers = max(1, (megabytes * 10**6 - VOCABULARY * WIDTH * 2) // (N * K))
    with torch.device("meta"):
        embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.bfloat16)
        return nn.Sequential(embedding, *(Int8Linear(K, N, device="meta") for _ in range(layers))).eval()


def fresh_of(megabytes: int) -> nn.Module:
    """What a program builds before it loads: float layers, on the meta device."""
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(K, N) if isinstance(m, Int8Linear) else m for m in model_of(megabytes)))


def save(folder: Path, megabytes: int, compact: bool) -> None:
    model = model_of(megabytes)
    torch.manual_seed(0)
    for module in model:
        if isinstance(module, Int8Linear):  # normal weights: what a coder finds in trained ones
            weight = torch.randn(N, K).mul_(30).clamp_(-127, 127).to(torch.int8)
            state = {"weight": weight, "weight_scale": torch.rand(N) / 100, "bias": torch.randn(N)}
            module.load_state_dict(state, assign=True)
        else:
            module.load_state_dict({"weight": torch.randn(VOCABULARY, WIDTH).bfloat16()}, assign=True)
    print(save_pretrained(model, folder, compact=compact).summary())


# ---- in a process of its own ----------------------------------------------------------------------------------------


def _read_all(tensors: object) -> None:
    for tensor in tensors:  # type: ignore[attr-defined]
        tensor.detach().contiguous().view(-1).view(torch.uint8).view(torch.int64).sum()


def _state(model: nn.Module) -> list[torch.Tensor]:
    return [t for t in (*model.parameters(), *model.buffers()) if t.numel()]


def loader(provider: str, folder: Path, megabytes: int) -> Callable[[], object]:
    """The call that is timed."""
    from safetensors.torch import load_file

    if provider == "pycompress":
        fresh = fresh_of(megabytes)
        return lambda: load_pretrained(folder, fresh)
    backend = provider.removeprefix("safetensors ")
    return lambda: load_file(folder / "model.safetensors", backend=backend)


def measure(provider: str, folder: str, megabytes: int) -> dict[str, float]:
    call = loader(provider, Path(folder), megabytes)
    times = []

    def run() -> object:
        start = time.perf_counter()
        loaded = call()
        times.append(time.perf_counter() - start)
        _read_all(_state(loaded) if isinstance(loaded, nn.Module) else loaded.values())  # type: ignore[attr-defined]
        times.append(time.perf_counter() - start)
        return loaded

    _use_memory(3 * megabytes * 10**6)
    peak = peak_extra_bytes(run)
    return {"load": times[0], "ready": times[1], "peak": peak}


def _use_memory(size: int) -> None:
    """Give the system pages that it has had from the host, small ones and huge ones."""
    for huge in (False, True):
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            if huge:
                memory.madvise(mmap.MADV_HUGEPAGE)
            for page in range(0, size, mmap.PAGESIZE):
                memory[page] = 1


def in_fresh_process(provider: str, folder: Path, megabytes: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", json.dumps([provider, str(folder), megabytes])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def row(provider: str, form: str, folder: Path, megabytes: int, repeats: int) -> dict[str, object]:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    found = [in_fresh_process(provider, folder, megabytes) for _ in range(repeats)]
    loads, readies = [run["load"] for run in found], [run["ready"] for run in found]
    peak = max(run["peak"] for run in found)
    values = (median(loads), median(readies), min(readies))
    return dict(
        zip(FIELDS, (provider, form, size, *(f"{1e3 * v:.0f}" for v in values), f"{peak / size:.2f}"), strict=True)
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are, or are written; kept")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(measure(*json.loads(options.measure))))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        base = options.folder or Path(temporary)
        for compact in (False, True):
            folder = base / ("compact" if compact else "plain")
            if not (folder / "pycompress.json").exists():
                save(folder, options.megabytes, compact)
        plan = [(who, "plain") for who in ("safetensors mmap", "safetensors pread", "pycompress")]
        plan.append(("pycompress", "compact"))
        print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        rows = [row(who, form, base / form, options.megabytes, options.repeats) for who, form in plan]
    for each in rows:
        print("  ".join(f"{key}={value}" for key, value in each.items()))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
