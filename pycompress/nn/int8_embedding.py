"""``Int8Embedding`` and ``Int8EmbeddingBag``: ``nn.Embedding`` and ``nn.EmbeddingBag`` with an int8 table.

State. A checkpoint holds plain tensors: ``weight`` int8 (V, D) and ``weight_scale`` float32 (V,). In memory the table
is the buffer ``_weight``, as plain as in the checkpoint: the kernels gather rows of it.

``module.weight`` is the dequantised table, made anew at each access: models that read an embedding's weight instead of
calling it (learned queries, relative positions), or its dtype, find what they expect. ``int8_weight`` is the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress._native import DTYPE_CODES
from pycompress.nn.packed_weight import PackedWeight
from pycompress.ops.eager import is_plain_eager
from pycompress.ops.int8_embedding import check_embedding_options, run_int8_embedding_bag
from pycompress.ops.int8_embedding_eager import TablePlan
from pycompress.ops.int8_embedding_reference import REDUCTIONS
from pycompress.ops.linear_common import check_option

_Table = TypeVar("_Table", bound="_Int8Table")


def _padding_row(name: str, padding_idx: int | None, rows: int) -> int | None:
    if padding_idx is None:
        return None
    if not -rows <= padding_idx < rows:
        raise ValueError(f"{name}: padding_idx={padding_idx}, expected None or {-rows} to {rows - 1} (num_embeddings)")
    return padding_idx % rows


def _check_float(name: str, layer: nn.Module, kind: type[nn.Module]) -> None:
    """Raises unless ``layer`` looks rows up as ``kind`` does, and nothing else."""
    if not isinstance(layer, kind):
        raise ValueError(f"{name}.from_float: expected an nn.{kind.__name__}, got {type(layer).__name__}")
    if type(layer).forward is not kind.forward:
        raise ValueError(
            f"{name}.from_float: {type(layer).__name__} has a forward of its own, which would be lost; leave it in "
            "float"
        )
    if layer.max_norm is not None:
        raise ValueError(
            f"{name}.from_float: max_norm={layer.max_norm} changes the rows that a call looks up, and an int8 table "
            "stays as it is; apply the norm to the weight and set max_norm=None, or leave this layer in float"
        )


class _Int8Table(PackedWeight):
    """What both modules hold and how it moves: an int8 table, its scales, the dtype of results."""

    max_norm: None = None  # as a float layer says them: none of it applies to a table that is not trained
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    sparse: bool = False

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    dtype: torch.dtype
    weight_scale: Tensor
    _weight: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        dtype: torch.dtype,
        backend: str,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_embedding_options(name, dtype, backend)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = _padding_row(name, padding_idx, num_embeddings)
        self.dtype, self.backend = dtype, backend
        weight = torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8, device=device)
        self.register_buffer("_weight", weight, persistent=False)
        self.register_buffer("weight_scale", torch.ones(num_embeddings, dtype=torch.float32, device=device))

    def _quantize(self: _Table, weight: Tensor, training: bool) -> _Table:
        self._weight, self.weight_scale = ops.quantize_weight(weight)
        return self.train(training)

    @property
    def weight(self) -> Tensor:
        """The table dequantised, ``(V, D)`` of ``dtype``, made anew at each access."""
        return (self._weight.to(torch.float32) * self.weight_scale[:, None]).to(self.dtype)

    @property
    def int8_weight(self) -> Tensor:
        """The table, int8 ``(V, D)``."""
        return self._weight

    # ---- state: the table is its own packed form ----------------------------------------------------------------

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return self.num_embeddings, self.embedding_dim

    def _pack(self, weight: Tensor) -> Tensor:
        return weight

    def _unpack(self, packed: Tensor) -> Tensor:
        return packed

    def _wants_packed(self) -> bool:
        return False

    def _arrange(self) -> None:
        self._weight = self._weight.contiguous()

    def _apply(self: _Table, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Table:
        # Results follow .half() and .to(dtype), as those of a float embedding do; the scales stay float32. fn is asked
        # with a tensor of the present dtype: .float() leaves the scales alone, and yet it means something here.
        wanted = fn(torch.empty(0, dtype=self.dtype, device=self._weight.device)).dtype
        super()._apply(fn, recurse)
        self.dtype = wanted if wanted in DTYPE_CODES else torch.float32  # the kernels give no float64
        return self

    def extra_repr(self) -> str:
        parts = [str(self.num_embeddings), str(self.embedding_dim)]
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        parts.extend(self._options())
        native = self.backend != "reference" and self._weight.device.type == "cpu"
        runs = f"native:{ops.embedding_kernel_name()}" if native else "reference"
        if self.backend == "native" and not native:
            runs = f"native (cannot run on {self._weight.device})"
        return ", ".join((*parts, f"dtype={str(self.dtype).removeprefix('torch.')}", f"backend={runs}"))

    def _options(self) -> list[str]:
        return []


class Int8Embedding(_Int8Table):
    """``nn.Embedding`` with an int8 table, one scale a row.

    Args:
        num_embeddings, embedding_dim: V and D.
        padding_idx: kept for models that read it; a lookup treats its row like any other.
        dtype: of the results: float32, bfloat16 or float16. ``.half()``, ``.to(dtype)`` change it.
        backend: ``"auto"``, ``"native"`` or ``"reference"``; a named one runs or raises.

    Input: int64 or int32 of any shape; output ``(*input.shape, D)``. A new module holds a zero table, to be filled by
    ``load_state_dict``; :meth:`from_float` makes one from a trained layer. The table is not trained further.
    """

    _plan: TablePlan | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype, backend, device)
        self._plan = None

    @classmethod
    def from_float(cls, embedding: nn.Module, *, backend: str = "auto") -> Int8Embedding:
        """Quantise an ``nn.Embedding``, which stays as it is; its device, dtype and training flag carry over.

        Raises:
            ValueError: no ``nn.Embedding``, a subclass with a forward of its own, ``max_norm``, a row that holds NaN or
                Inf, a weight on the meta device, an unknown backend.
        """
        _check_float("Int8Embedding", embedding, nn.Embedding)
        assert isinstance(embedding, nn.Embedding)
        dtype = embedding.weight.dtype if embedding.weight.dtype in DTYPE_CODES else torch.float32
        v, d = embedding.weight.shape
        return cls(v, d, embedding.padding_idx, dtype=dtype, backend=backend, device="meta")._quantize(
            embedding.weight, embedding.training
        )

    def to_float(self) -> nn.Embedding:
        """The ``nn.Embedding`` with the dequantised table, in ``dtype``."""
        layer = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        layer.weight = nn.Parameter(self.weight)
        return layer.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and is_plain_eager(input) and self.backend in ("auto", "native"):
            plan, weight, scale = self._plan, self._buffers["_weight"], self._buffers["weight_scale"]
            if plan is None or not plan.is_for(weight, scale):
                self._plan = plan = TablePlan.make(self._weight, self.weight_scale)
            y = None if plan is None else plan.run(input, self.dtype)
            if y is not None:
                return y
        return torch.ops.pycompress.int8_embedding.default(
            self._weight, self.weight_scale, input, self.dtype, self.backend
        )

    def _arrange(self) -> None:
        super()._arrange()
        self._plan = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_plan": None}


class Int8EmbeddingBag(_Int8Table):
    """``nn.EmbeddingBag`` with an int8 table, one scale a row.

    Args:
        num_embeddings, embedding_dim: V and D.
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        padding_idx: indices equal to it are no part of their bag.
        include_last_offset: the offsets end with the number of indices.
        dtype, backend: as of :class:`Int8Embedding`.

    Input: ``(count,)`` with offsets, or ``(bags, count)``; output ``(bags, D)``. A bag without terms gives 0. A
    gradient flows to ``per_sample_weights``, which mode ``"sum"`` takes.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mode: str = "mean",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        *,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        check_option("Int8EmbeddingBag", "mode", mode, REDUCTIONS)
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype, backend, device)
        self.mode, self.include_last_offset = mode, include_last_offset

    @classmethod
    def from_float(cls, bag: nn.Module, *, backend: str = "auto") -> Int8EmbeddingBag:
        """Quantise an ``nn.EmbeddingBag``, which stays as it is; see :meth:`Int8Embedding.from_float`."""
        _check_float("Int8EmbeddingBag", bag, nn.EmbeddingBag)
        assert isinstance(bag, nn.EmbeddingBag)
        dtype = bag.weight.dtype if bag.weight.dtype in DTYPE_CODES else torch.float32
        v, d = bag.weight.shape
        options: dict[str, Any] = {"dtype": dtype, "backend": backend, "device": "meta"}
        return cls(v, d, bag.mode, bag.padding_idx, bag.include_last_offset, **options)._quantize(
            bag.weight, bag.training
        )

    def to_float(self) -> nn.EmbeddingBag:
        """The ``nn.EmbeddingBag`` with the dequantised table, in ``dtype``."""
        layer = nn.EmbeddingBag(
            self.num_embeddings,
            self.embedding_dim,
            mode=self.mode,
            padding_idx=self.padding_idx,
            include_last_offset=self.include_last_offset,
            device="meta",
        )
        layer.weight = nn.Parameter(self.weight)
        return layer.train(self.training)

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        padding = -1 if self.padding_idx is None else self.padding_idx
        table, options = (self._weight, self.weight_scale), (self.include_last_offset, padding, self.backend)
        args = (*table, input, offsets, self.mode, self.dtype, per_sample_weights, *options)
        plain = per_sample_weights is None or is_plain_eager(per_sample_weights)
        if not torch.compiler.is_compiling() and plain and is_plain_eager(input):
            return run_int8_embedding_bag(*args)
        return torch.ops.pycompress.int8_embedding_bag.default(*args)

    def _options(self) -> list[str]:
        return [f"mode={self.mode}", *(["include_last_offset=True"] if self.include_last_offset else [])]
