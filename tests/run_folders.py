"""RUN folders made by hand, with numbers that a test can recompute."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pycompress.workflow.records import StageRecord
from pycompress.workflow.run_state import RunState

PARTS = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
)  # fmt: skip
MACHINE: dict[str, Any] = {
    "versions": {"pycompress": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "platform": "Linux"},
    "cpu": {"name": "A CPU", "architecture": "x86_64", "logical_cores": 2, "features": ["avx2", "avx512_vnni"]},
    "isa": {"available": ["avx512vnni", "scalar"], "forced": None, "selected": "avx512vnni"},
    "threads": {"torch": 2, "cores_usable": 2, "OMP_NUM_THREADS": None},
    "gpu": {"devices": []},
    "peaks": {
        "device": "A CPU", "threads": 2, "int8_gops": 1450.0, "fp32_gflops": 290.0, "bf16_gflops": 560.0,
        "read_gbps": 22.0,
    },
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "stages": [
        {"prune": {"sparsity": 0.9, "pattern": "4x4", "train": {"steps": 300, "lr": 0.001}}},
        {"distill": {"train": {"steps": 200, "lr": 0.0003}}},
        {"sparsify": {"dtype": "int8"}},
    ],
    "seed": 3,
    "measure": {"batch_sizes": [1, 512]},
}


def layer(index: int, name: str, n: int, k: int) -> dict[str, Any]:
    flops, tokens = 2 * 64 * n * k, 64
    before = {
        "kind": "Linear", "form": "float32", "precision": "float32", "sparsity": 0.0, "bytes": 4 * n * k,
        "seconds": 1e-6 * (40 + 3 * index), "flops": flops, "moved": 4 * (n * k + 64 * (n + k)),
    }  # fmt: skip
    after = {
        "kind": "SparseLinear", "form": "int8 bitmap+index", "precision": "int8", "sparsity": 0.9,
        "bytes": n * k // 5, "seconds": 1e-6 * (11 + index), "flops": flops // 10, "moved": n * k // 5 + 256 * (n + k),
    }  # fmt: skip
    for side in (before, after):
        side["intensity"] = side["flops"] / side["moved"]
    return {
        "name": name, "shape": [n, k], "activation": "gelu" if "intermediate" in name else "", "calls": 1,
        "tokens": tokens, "error": 0.01 + 0.002 * (index % 7), "note": "", "flops": flops, "before": before,
        "after": after,
    }  # fmt: skip


def layers(blocks: int) -> list[dict[str, Any]]:
    """6 * blocks rows, named as a transformer's."""
    names = [f"bert.encoder.layer.{i}.{part}" for i in range(blocks) for part in PARTS]
    return [layer(i, name, 1536 if "interm" in name else 384, 384) for i, name in enumerate(names)]


def records() -> list[StageRecord]:
    sizes = {"parameters": 1_000_000, "memory_bytes": 4_000_000}
    return [
        StageRecord(
            index=0, name="baseline", metrics={"accuracy": 0.981, "loss": 0.0712}, nonzero=1_000_000, sparsity=0.0,
            file_bytes=4_010_000, latency={"1": 0.00042, "512": 0.0612}, **sizes,
        ),
        StageRecord(
            index=1, name="prune", options=RECIPE["stages"][0]["prune"], seconds=41.2, steps=300,
            metrics={"accuracy": 0.962, "loss": 0.1301}, nonzero=120_000, sparsity=0.9, file_bytes=530_000,
            latency={"1": 0.00043, "512": 0.0615}, summary="prune_ sparsity=0.9 pattern=4x4: 12 layers", **sizes,
        ),
        StageRecord(
            index=2, name="distill", options=RECIPE["stages"][1]["distill"], seconds=71.0, steps=200,
            metrics={"accuracy": 0.979, "loss": 0.0802}, nonzero=120_000, sparsity=0.9, file_bytes=530_000,
            latency={"1": 0.00043, "512": 0.0613}, **sizes,
        ),
        StageRecord(
            index=3, name="sparsify", options=RECIPE["stages"][2]["sparsify"], seconds=0.8,
            metrics={"accuracy": 0.9786, "loss": 0.0811}, parameters=1_000_000, nonzero=119_000, sparsity=0.901,
            memory_bytes=420_000, file_bytes=180_000, latency={"1": 0.00047, "512": 0.018},
            summary="sparsify_ dtype=int8: 12 swapped",
        ),
    ]  # fmt: skip


def quartiles(p50: float) -> dict[str, float]:
    return {"p25": 0.97 * p50, "p50": p50, "p75": 1.04 * p50}


LATENCY = {
    "1": {"before": quartiles(0.00042), "after": quartiles(0.00047), "speedup": quartiles(0.8936), "rounds": 15},
    "512": {"before": quartiles(0.0612), "after": quartiles(0.018), "speedup": quartiles(3.4), "rounds": 15},
}


def history() -> list[dict[str, Any]]:
    found = []
    for stage, name, steps, lr in ((1, "prune", 300, 1e-3), (2, "distill", 200, 3e-4)):
        for step in range(1, steps + 1, 3):
            loss = 2.3 * math.exp(-step / 60) + 0.08 + 0.02 * math.sin(step)
            found.append({
                "stage": stage, "name": name, "step": step, "loss": loss,
                "terms": {"task": 0.5 * loss} if stage == 1 else {"task": 0.4 * loss, "kl": 0.6 * loss},
                "lr": lr * (1 - step / steps), "seconds": 0.1 * step,
                "sparsity": 0.9 * (1 - (1 - min(1.0, step / 210)) ** 3) if stage == 1 else 0.9,
            })  # fmt: skip
    return found


def state(blocks: int = 2, **changes: Any) -> RunState:
    """A finished run; changes: of RunState's fields."""
    values: dict[str, Any] = {
        "recipe": RECIPE, "model": {"class": "Classifier", "parameters": 1_000_000, "fingerprint": "0f" * 16},
        "teacher": None, "machine": MACHINE, "status": "finished", "stages": records(), "layers": layers(blocks),
        "latency": LATENCY,
    }  # fmt: skip
    return RunState(**{**values, **changes})


def make_run(folder: Path, blocks: int = 2, model_bytes: int | None = 175_000, **changes: Any) -> Path:
    """Writes a run into `folder`, which is made, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(state(blocks, **changes).to_json(), encoding="utf-8")
    lines = "".join(json.dumps(line) + "\n" for line in history())
    (folder / "history.jsonl").write_text(lines, encoding="utf-8")
    if model_bytes is not None:
        (folder / "model.safetensors").write_bytes(b"\0" * model_bytes)
    return folder
