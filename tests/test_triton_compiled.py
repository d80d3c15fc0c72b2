"""Every shipped configuration of the Triton kernels, compiled for sm_80, sm_90 and sm_100, which needs no GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.triton_compile import MODULES, SHARED_LIMIT

pytest.importorskip("triton")

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("triton")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "tests.triton_compile", "--out", str(folder / "rows.json")],
        env=environment | {"TRITON_CACHE_DIR": str(folder / "cache")},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Warning" not in done.stderr
    return list(json.loads((folder / "rows.json").read_text()))


def named(row: Row) -> str:
    return f"sm_{row['arch']} {row['module']}.{row['name']}"


def test_everything_compiles(rows: list[Row]) -> None:
    assert {row["module"] for row in rows} == set(MODULES)
    assert {row["arch"] for row in rows} == set(SHARED_LIMIT)
    assert len({named(row) for row in rows}) == len(rows)
    assert [f"{named(row)}: {row['error']}" for row in rows if row["error"]] == []


def test_tensor_instructions(rows: list[Row]) -> None:
    """mma with s8, wgmma with s8, tcgen05 with i8, and their floating kin."""
    wanted = [row for row in rows if row["wants"]]
    assert any("wgmma" in row["wants"] for row in wanted)
    lacking = [row for row in wanted if not any(re.search(row["wants"], used) for used in row["instructions"])]
    assert [f"{named(row)}: wants {row['wants']}, has {row['instructions']}" for row in lacking] == []


def test_nothing_spills(rows: list[Row]) -> None:
    assert [f"{named(row)}: {row['stack']} bytes" for row in rows if row["stack"]] == []


def test_shared_memory_fits(rows: list[Row]) -> None:
    too_much = [row for row in rows if row["shared"] > SHARED_LIMIT[row["arch"]]]
    assert [f"{named(row)}: {row['shared']} bytes" for row in too_much] == []


def test_spills_would_be_seen() -> None:
    """cuobjdump's line for a kernel that keeps 656 bytes a thread in memory."""
    from tests.triton_compile import usage_of

    said = "Function _multiply:\n  REG:255 STACK:656 SHARED:0 LOCAL:0 CONSTANT[0]:464 TEXTURE:0 SURFACE:0 SAMPLER:0"
    assert usage_of(said) == {"REG": 255, "STACK": 656, "LOCAL": 0}
