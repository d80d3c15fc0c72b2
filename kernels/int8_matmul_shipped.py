"""Every configuration in which the Triton kernels of the int8 linear layer run, for compilers without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import triton

from .common import ARCHES, Shipped
from .common import shipped as configuration
from .int8_matmul import _finish, _multiply, _quantize_rows, _sum_weight_rows
from .int8_matmul_tuning import FINISH_COLUMNS, TILINGS, Tiling, ladder

TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


def shipped() -> Iterator[Shipped]:
    """Every tiling in every mode and type of x, with the most costly epilogue; and in one of them split, with a K that
    ends inside a step, and one that is no multiple of 16, which the widest loads cannot take.
    """
    for kind in TILINGS:
        x_type, mode = _modes(kind)[-1]
        for tiling in ladder(kind, narrow=False):
            for each_type, each_mode in _modes(kind):
                yield _shipped_multiply(kind, tiling, each_type, each_mode, False, "whole k")
            if tiling.block_m <= 64:
                yield _shipped_multiply(kind, tiling, x_type, mode, True, "whole k")
            yield _shipped_multiply(kind, tiling, x_type, mode, False, "ragged k")
        for tiling in ladder(kind, narrow=True):
            yield _shipped_multiply(kind, tiling, x_type, mode, False, "odd k")
    for x_type in ("fp32", "bf16", "fp16"):
        yield from _shipped_rows(x_type)
    yield configuration(
        "sum_weight_rows", _sum_weight_rows, {"weight": "*i8:16", "sums": "*i32:16", "K": "i32:16"}, {"BLOCK": 4096},
        num_warps=8,
    )  # fmt: skip
    for mode, sum_type in (("dynamic", "i32"), ("weight_only", "fp32")):
        types = _epilogue_types("bf16", mode)
        types |= {"partial": f"*{sum_type}:16", "M": "i32", "N": "i32:16", "splits": "i32"}
        constants = {"MODE": mode, "ACTIVATION": "gelu", "HAS_BIAS": True, "BN": FINISH_COLUMNS}
        constants |= {} if "x_scale" in types else {"x_scale": None}
        yield configuration(f"finish_{mode}", _finish, types, constants, num_warps=2)


def _modes(kind: str) -> list[tuple[str, str]]:
    """(type of x, mode) of a key of TILINGS."""
    if kind == "int8":
        return [("i8", "dynamic"), ("i8", "static")]
    return [(x_type, "weight_only") for x_type in (("fp16", "bf16") if kind == "half" else ("fp32",))]


def _epilogue_types(y_type: str, mode: str) -> dict[str, str]:
    types = {"y": f"*{y_type}:16", "weight_scale": "*fp32:16", "bias": "*fp32:16"}
    return types if mode == "weight_only" else {**types, "x_scale": "*fp32:16"}


def _shipped_multiply(kind: str, tiling: Tiling, x_type: str, mode: str, split: bool, k: str) -> Shipped:
    multiple = "" if k == "odd k" else ":16"
    sum_weight = mode == "static" and tiling.block_m <= 64
    types = _epilogue_types("bf16" if x_type == "i8" else x_type, mode)
    types |= {"x": f"*{x_type}:16", "weight": "*i8:16", "M": "i32", "N": "i32:16", "K": "i32" + multiple}
    types |= {
        "inner_rows": "i32",
        "outer_stride": "i32:16",
        "row_stride": "i32" + (":16" if x_type == "i8" else multiple),
    }
    if mode == "static":
        types |= {"zero_point": "*i32:16"} | ({} if sum_weight else {"weight_sums": "*i32:16"})
    if split:
        types |= {"partial": "*fp32:16" if mode == "weight_only" else "*i32:16", "k_per_split": "i32:16"}
        del types["y"]
    constants: dict[str, object] = {
        "MODE": mode, "ACTIVATION": "gelu", "HAS_BIAS": True, "EVEN_K": k == "whole k", "SPLIT": split,
        "SUM_WEIGHT": sum_weight, "BM": tiling.block_m, "BN": tiling.block_n, "BK": tiling.block_k,
        "GROUP": tiling.group,
    }  # fmt: skip
    for name in ("y", "partial", "x_scale", "zero_point", "weight_sums", "k_per_split"):
        if name not in types:
            constants[name] = 0 if name == "k_per_split" else None
    name = f"int8_matmul_{tiling.block_m}x{tiling.block_n}x{tiling.block_k}_{mode}_{x_type}"
    name += ("_split" if split else "") + ("" if k == "whole k" else "_" + k.replace(" ", "_"))
    return configuration(
        name, _multiply, types, constants, num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        wants=_instructions(kind, tiling.block_m),
    )  # fmt: skip


def _instructions(kind: str, block_m: int) -> dict[int, str] | None:
    """What multiplies, by architecture: fewer than 64 rows are too few for the instructions of a warp group."""
    if kind == "float":
        return None
    warp = r"mma\.sync\S*\.s32\.s8\.s8\.s32" if kind == "int8" else r"mma\.sync\S*\.f32\.(bf16\.bf16|f16\.f16)\.f32"
    if block_m < 64:
        return dict.fromkeys(ARCHES, warp)
    group = r"s32\.s8\.s8" if kind == "int8" else r"f32\.(bf16\.bf16|f16\.f16)"
    tensor_memory = rf"tcgen05\.mma\S*kind::{'i8' if kind == 'int8' else 'f16'}"
    if kind == "int8" and TRITON_VERSION < (3, 9):
        tensor_memory += f"|{warp}"  # Triton 3.6 multiplies bytes so on sm_100, 3.9 in tensor memory
    return {80: warp, 90: rf"wgmma\.mma_async\S*\.{group}", 100: tensor_memory}


def _shipped_rows(x_type: str) -> Iterator[Shipped]:
    types = {"x": f"*{x_type}:16", "q": "*i8:16", "x_scale": "*fp32:16", "K": "i32:16", "inner_rows": "i32"}
    types |= {"outer_stride": "i32:16", "row_stride": "i32:16", "ldq": "i32:16"}
    for static in (False, True) if x_type == "bf16" else (False,):
        statics = {"input_scale": "*fp32:16", "input_zero_point": "*i32:16"}
        constants: dict[str, object] = {"col_stride": 1, "STATIC": static, "BLOCK": 4096}
        if not static:
            constants |= dict.fromkeys(statics)
        yield configuration(
            f"quantize_rows_{'static' if static else 'dynamic'}_{x_type}", _quantize_rows,
            types | (statics if static else {}), constants, num_warps=8,
        )  # fmt: skip
