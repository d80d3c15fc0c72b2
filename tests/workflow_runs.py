"""A tiny real run for the workflow's tests, and a process that kills copies of itself while they do it.

    python -m tests.workflow_runs FOLDER SEED

    moments   ten runs, each killed at a random moment
    writes    eight runs, each killed before a random operation on a file
    chain     one run, killed ten times
    limits    four runs that may not write files of more than so many bytes

Each is gone on with to its end. Printed is a line of JSON with the digests of all final models, and "whole", that of a
run nobody interrupted. The process imports everything and computes nothing, so that its forks start in a moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

SEED = 5
QUIET = {"measure": {"rounds": 0, "layers": False}, "checkpoint_seconds": 0.0}


def make_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        first, middle, last = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        return nn.Sequential(first, nn.ReLU(), nn.Dropout(0.1), middle, nn.BatchNorm1d(32), nn.ReLU(), last)


def make_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(40, 16, generator=generator)
    return x, (x[:, :4] + 0.1 * torch.randn(40, 4, generator=generator)).argmax(1)


def make_loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*make_data()), batch_size=8, shuffle=True)


def accuracy(model: nn.Module) -> dict[str, float]:
    x, labels = make_data()
    with torch.no_grad():
        return {"accuracy": float((model(x).argmax(1) == labels).double().mean())}


STAGES: list[Any] = [
    {"prune": {"sparsity": 0.75, "pattern": "4x1", "train": {"steps": 6, "lr": 0.01}, "schedule": {"every": 2}}},
    {"distill": {"train": {"epochs": 1, "lr": 0.01, "clip_norm": 1.0}}},
    {"qat": {"train": {"steps": 4, "optimizer": "sgd", "lr": 0.01}}},
    {"sparsify": {"dtype": "int8"}},
]
RECIPE: dict[str, Any] = {"stages": STAGES, **QUIET}


def run(out: Path | None, **options: Any) -> Any:
    from pycompress.workflow import compress

    arguments: dict[str, Any] = {"train_batches": make_loader(), "eval_fn": accuracy, "progress": False, **options}
    return compress(arguments.pop("model", None) or make_model(), arguments.pop("recipe", RECIPE), out=out, **arguments)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- killing ----------------------------------------------------------------------------------------------------


def fork(work: Callable[[], object]) -> int:
    """The number of a child that does the work; its exit code is 0 where nothing was raised."""
    if number := os.fork():
        return number
    code = 1
    try:
        work()
        code = 0
    except BaseException as error:
        print(f"child: {error!r}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(out: Path) -> str:
    timed(out)
    return digest(out / "model.safetensors")


def timed(out: Path) -> float:
    """The processor's seconds for a run, up to its end."""
    _, status, usage = os.wait4(fork(lambda: run(out)), 0)
    if status:
        raise RuntimeError(f"the run in {out} ended with {status}")
    return usage.ru_utime + usage.ru_stime


def kill_after(out: Path, seconds: float) -> bool:
    """Whether the child was still at work after so many seconds of the processor's, not of the clock's."""

    def work() -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # nobody handles SIGPROF: it kills, as SIGKILL does
        run(out)

    return os.waitpid(fork(work), 0)[1] == signal.SIGPROF


def counting_writes(work: Callable[[], object], last: int | None) -> int:
    """Do the work, and be killed before operation number `last` that changes a file; returns how many there were."""
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    work()
    return count


def kill_at_write(out: Path, number: int) -> bool:
    child = fork(lambda: counting_writes(lambda: run(out), number))
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def count_writes(out: Path) -> int:
    reader, writer = os.pipe()
    child = fork(lambda: os.write(writer, str(counting_writes(lambda: run(out), None)).encode()))
    os.waitpid(child, 0)
    return int(os.read(reader, 20))


def limited(out: Path, size: int) -> str:
    """The message of a run that may not write more than `size` bytes into a file."""
    reader, writer = os.pipe()

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            run(out)
        except Exception as error:
            os.write(writer, str(error).encode())

    os.waitpid(fork(work), 0)
    os.close(writer)
    return os.read(reader, 10_000).decode()


def main(folder: Path, seed: int) -> None:
    # What a run imports when it needs it, once for all forks; torch's optimizers want dynamo at their first step.
    import torch._dynamo

    import pycompress.qat
    import pycompress.workflow  # noqa: F401
    from pycompress import info

    info.collect = dict  # asks every backend, which takes longer than a run
    torch.set_num_threads(1)
    draw = random.Random(seed)
    digests, messages = {"whole": [finish(folder / "whole")]}, []
    seconds = timed(folder / "timed")
    killed = {"moments": 0, "writes": 0, "chain": 0}
    writes = count_writes(folder / "counted")
    for i in range(10):
        out = folder / f"moments-{i}"
        killed["moments"] += kill_after(out, draw.uniform(0, seconds))
        digests.setdefault("moments", []).append(finish(out))
    for i in range(8):
        out = folder / f"writes-{i}"
        killed["writes"] += kill_at_write(out, draw.randint(1, writes))
        digests.setdefault("writes", []).append(finish(out))
    for _ in range(10):
        killed["chain"] += kill_after(folder / "chain", draw.uniform(0.2, 0.4) * seconds)
    digests["chain"] = [finish(folder / "chain")]
    for i in range(4):
        out = folder / f"limits-{i}"
        messages.append(limited(out, draw.randint(200, 20_000)))
        digests.setdefault("limits", []).append(finish(out))
    print(json.dumps({"digests": digests, "killed": killed, "messages": messages, "writes": writes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
