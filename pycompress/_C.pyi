from typing import Any

def available_isas() -> list[str]: ...
def selected_isa() -> str: ...
def cpu_features() -> list[str]: ...
def measure_peaks(threads: int, seconds: float, buffer_bytes: int) -> dict[str, Any]: ...

class Int8Plan:
    def __init__(
        self,
        weight: int,
        weight_bytes: int,
        weight_scale: int,
        n: int,
        bias: int,
        bias_dtype: int,
        input_scale: int,
        input_zero_point: int,
        mode: int,
        activation: int,
        /,
    ) -> None: ...
    def run(self, x: int, m: int, k: int, dtype: int, y: int, threads: int, /) -> None: ...
    def run_strided(
        self, x: int, layout: tuple[int, int, int, int, int, int], dtype: int, y: int, threads: int, /
    ) -> None: ...

def int8_kernel_name(packed: int, nbytes: int, /) -> str: ...
def int8_packed_bytes(n: int, k: int, /) -> int: ...
def int8_pack(weight: int, n: int, k: int, ld: int, dst: int, /) -> None: ...
def int8_packed_shape(packed: int, nbytes: int, /) -> tuple[int, int]: ...
def int8_unpack(packed: int, nbytes: int, weight: int, ld: int, /) -> None: ...

class Int4Plan:
    def __init__(
        self, weight: int, weight_bytes: int, bias: int, bias_dtype: int, activation: int, /
    ) -> None: ...
    def run(self, x: int, m: int, k: int, dtype: int, y: int, threads: int, /) -> None: ...
    def run_strided(
        self, x: int, layout: tuple[int, int, int, int, int, int], dtype: int, y: int, threads: int, /
    ) -> None: ...

def int4_kernel_name(packed: int, nbytes: int, /) -> str: ...
def int4_packed_bytes(n: int, k: int, group_size: int, format: int, has_zero_point: bool, /) -> int: ...
def int4_pack(
    weight: int, scale: int, zero_point: int, n: int, k: int, group_size: int, format: int, has_zero_point: bool,
    dst: int, /
) -> None: ...
def int4_packed_info(packed: int, nbytes: int, /) -> tuple[int, int, int, int, bool]: ...
def int4_unpack(packed: int, nbytes: int, weight: int, scale: int, zero_point: int, /) -> None: ...

class Int8ConvPlan:
    def __init__(
        self,
        weight: int,
        weight_bytes: int,
        weight_scale: int,
        bias: int,
        bias_dtype: int,
        input_scale: int,
        input_zero_point: int,
        mode: int,
        activation: int,
        window: tuple[int, int, int, int, int, int],
        /,
    ) -> None: ...
    def run(
        self,
        x: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: int,
        y: int,
        out: tuple[int, ...],
        channels_last: bool,
        threads: int,
        /,
    ) -> None: ...

def conv_refuses(per_group: int, kh: int, kw: int, /) -> str: ...
def conv_packed_bytes(shape: tuple[int, ...], /) -> int: ...
def conv_pack(weight: int, shape: tuple[int, ...], dst: int, /) -> None: ...
def conv_packed_shape(packed: int, nbytes: int, /) -> tuple[int, int, int, int, int]: ...
def conv_unpack(packed: int, nbytes: int, weight: int, /) -> None: ...
def conv_kernel_name(packed: int, nbytes: int, /) -> str: ...

class SparsePlan:
    def __init__(
        self,
        weight_type: int,
        n: int,
        k: int,
        weight_scale: int,
        bias: int,
        bias_dtype: int,
        activation: int,
        bitmap: int,
        values: int,
        row_start: int,
        index: int,
        index_bytes: int,
        /,
    ) -> None: ...
    def run_bitmap(self, x: int, m: int, k: int, dtype: int, y: int, threads: int, /) -> None: ...
    def run_index(self, x: int, m: int, k: int, dtype: int, y: int, threads: int, /) -> None: ...
    def run_bitmap_strided(
        self, x: int, layout: tuple[int, int, int, int, int, int], dtype: int, y: int, threads: int, /
    ) -> None: ...
    def run_index_strided(
        self, x: int, layout: tuple[int, int, int, int, int, int], dtype: int, y: int, threads: int, /
    ) -> None: ...

def sparse_scan(bitmap: int, n: int, k: int, row_start: int, /) -> int: ...
def sparse_pack_index(
    bitmap: int, values: int, row_start: int, n: int, k: int, weight_type: int, /
) -> bytes: ...
def sparse_index_info(index: int, index_bytes: int, /) -> dict[str, Any]: ...
def sparse_bitmap_kernel_name(weight_type: int, /) -> str: ...

POOL_SMALLEST: int

def pooled_empty(shape: list[int], dtype: int, /) -> Any: ...
def pool_kept_bytes() -> int: ...
def advise_huge_pages(address: int, nbytes: int, /) -> None: ...

_Rows = tuple[int, int, int, int, int, int, int, int]

def distill_loss(
    *,
    student: _Rows,
    teacher: _Rows,
    topk_indices: int,
    topk_logsumexp: int,
    labels: int,
    token_weight: int,
    divergence: int,
    reduction: int,
    temperature: float,
    alpha: float,
    beta: float,
    label_smoothing: float,
    ignore_index: int,
    num_items: float,
    loss: int,
    hard: int,
    soft: int,
    grad: int,
    normalize_grad: bool,
    threads: int,
) -> float: ...
def distill_kernel_name() -> str: ...

class EmbeddingPlan:
    def __init__(self, rows: int, v: int, d: int, scale: int, /) -> None: ...
    def run_rows(self, index: int, wide: bool, count: int, dtype: int, y: int, threads: int, /) -> None: ...
    def run_bags(
        self,
        index: int,
        wide: bool,
        count: int,
        offset: int,
        bags: int,
        reduce: int,
        padding: int,
        weight: int,
        dtype: int,
        y: int,
        threads: int,
        /,
    ) -> None: ...

def embedding_kernel_name() -> str: ...
