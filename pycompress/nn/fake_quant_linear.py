"""``FakeQuantLinear``: ``nn.Linear`` that trains with the weight and activations of the int8 layer it will become.

Forward quantises the weight as it stands and runs the int8 operator on it, so that a training step sees what inference
will compute, to the bit. ``weight`` stays the leaf parameter that it was, in float; its gradient goes straight through
the rounding. What was pruned stays pruned: the mask of a ``MaskedLinear`` is kept.

State. A ``state_dict`` has the keys of ``nn.Linear``, and in static mode ``input_scale`` and ``input_zero_point``. A
mask hides in the sign of the zeros, as in ``MaskedLinear``. The quantised weight is never in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.nn.masked_linear import Fold, MaskedLinear, fold_of
from pycompress.nn.packed_weight import keep_dtypes
from pycompress.ops.int8_matmul import check_options
from pycompress.ops.int8_matmul_weight import static_qparams, static_tensors


class _Kept(NamedTuple):
    """The quantised weight, for evaluation, and what it was made of."""

    fold: Fold | None  # None of what was made in inference mode, without versions: quantised at every call
    backend: str
    weight: Tensor  # packed where the native kernels read it
    scale: Tensor


class FakeQuantLinear(MaskedLinear):
    """``y = x @ weight^T + bias`` as ``Int8Linear`` computes it, with a float weight that is trained.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias.
        mode: ``"dynamic"``, ``"static"`` or ``"weight_only"``; see ``Int8Linear``. The range of static mode is fixed;
            a new module holds the scale 1, to be filled by ``load_state_dict``.
        masked: whether there is a mask; without one ``mask`` is None and :meth:`set_mask` brings it.
        gradient: of a masked weight; see ``MaskedLinear``.
        backend: ``"auto"``, ``"native"``, ``"cuda"``, ``"triton"`` or ``"reference"``; see ``Int8Linear``.
            ``"reference"`` fake-quantises in torch, with exact integer sums, on any device.

    Input ``(..., K)`` float32, bfloat16 or float16; output ``(..., N)`` of the same dtype, or of autocast's.
    :meth:`from_float` puts one around a layer's own parameters, ``Int8Linear.from_float`` makes the int8 layer of it,
    ``to_linear`` the float one.

    In eval mode without gradients the quantised weight is kept as long as weight and mask are not written to. What goes
    past autograd's bookkeeping by ``weight.data`` is not seen then; call ``eval()`` after it.

    Raises:
        ValueError: an unknown mode, gradient or backend; in forward, a weight that holds NaN or Inf.
    """

    mask: Tensor | None  # type: ignore[assignment]  # may be missing here
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    _kept: _Kept | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mode: str = "dynamic",
        masked: bool = False,
        gradient: str = "masked",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(mode, "none", backend)
        super().__init__(in_features, out_features, bias, gradient=gradient, device=device, dtype=dtype)
        if not masked:
            self.mask = None
        self.mode, self.backend, self._kept = mode, backend, None
        self._set_statics((1.0, 0) if mode == "static" else None)

    def _set_statics(self, qparams: tuple[float, int] | None) -> None:
        scale, zero_point = static_tensors(qparams, self.weight.device)
        self.register_buffer("input_scale", scale)
        self.register_buffer("input_zero_point", zero_point)

    @classmethod
    def from_float(
        cls,
        linear: nn.Module,
        mode: str = "dynamic",
        *,
        input_range: tuple[float, float] | None = None,
        backend: str = "auto",
    ) -> FakeQuantLinear:
        """A FakeQuantLinear around the layer's own parameters, so that an optimizer that holds them goes on.

        Args:
            linear: an ``nn.Linear``; a MaskedLinear, whose mask and gradient option carry over; or transformers'
                ``Conv1D``, whose weight lies the other way round and becomes a new parameter.
            input_range: least and greatest activation, needed by (and only by) static mode; ``calibrate`` finds it.

        Raises:
            ValueError: not a linear layer, an unknown option, a missing or superfluous ``input_range``.
        """
        check_options(mode, "none", backend)
        qparams = static_qparams(mode, input_range, "FakeQuantLinear.from_float")
        masked = isinstance(linear, MaskedLinear) and linear.mask is not None
        module = cls._around(linear, linear.gradient if isinstance(linear, MaskedLinear) else "masked")
        assert isinstance(module, FakeQuantLinear)
        if not masked:
            module.mask = None
        module.mode, module.backend = mode, backend
        module._set_statics(qparams)
        return module

    def forward(self, x: Tensor) -> Tensor:
        statics = self.input_scale, self.input_zero_point
        if not torch.compiler.is_compiling() and self._may_keep(x):
            kept = self._renewed()
            return torch.ops.pycompress.int8_linear.default(
                x, kept.weight, kept.scale, self.bias, self.mode, *statics, "none", self.backend
            )
        return ops.fake_quant_linear(
            x, self._effective(), self.bias, mode=self.mode, input_scale=statics[0], input_zero_point=statics[1],
            backend=self.backend,
        )  # fmt: skip

    # ---- the weight kept for evaluation -----------------------------------------------------------------------

    def _may_keep(self, x: Tensor) -> bool:
        """Whether this call trains nothing, and the weight's versions tell when it changes."""
        weight = self.weight
        return (
            not self.training
            and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, self.bias)))
            and type(weight) is nn.Parameter
            and torch._C._get_tracing_state() is None
        )

    def _renewed(self) -> _Kept:
        kept = self._kept
        is_current = kept is not None and kept.fold is not None and kept.fold.is_for(self.weight, self.mask)
        if kept is None or not is_current or kept.backend != self.backend:
            with torch.no_grad():
                quantized, scale = ops.quantize_weight(self._effective())
            if quantized.device.type == "cpu" and self.backend in ("auto", "native"):
                quantized = ops.pack_weight(quantized)
            self._kept = kept = _Kept(fold_of(self.weight, self.mask), self.backend, quantized, scale)
        return kept

    # ---- where the mask is missing ----------------------------------------------------------------------------

    def set_mask(self, mask: Tensor) -> None:
        """As MaskedLinear.set_mask; where there was no mask, every weight was kept."""
        if self.mask is not None:
            super().set_mask(mask)
            return
        self.mask = torch.ones_like(self.weight, dtype=torch.bool)
        try:
            super().set_mask(mask)
        except BaseException:
            self.mask = None
            raise

    @property
    def sparsity(self) -> float:
        """The fraction of weights that are pruned; 0 without a mask."""
        return 0.0 if self.mask is None else super().sparsity

    def _effective(self) -> Tensor:
        return self.weight if self.mask is None else super()._effective()

    def _masked(self) -> Tensor:
        return self.weight.detach() if self.mask is None else super()._masked()

    @property
    def _version(self) -> int:  # type: ignore[override]
        # In the metadata of a state_dict: without a mask a zero's sign means nothing.
        return MaskedLinear._version if self.mask is not None else nn.Linear._version

    # ---- state ------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> FakeQuantLinear:
        super().train(mode)
        self._kept = None
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantLinear:
        statics = {name: self._buffers[name] for name in ("input_scale", "input_zero_point")}
        super()._apply(fn, recurse)
        keep_dtypes(self, statics)
        self._kept = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None}

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        load = nn.Linear._load_from_state_dict if self.mask is None else MaskedLinear._load_from_state_dict
        load(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._kept = None

    def extra_repr(self) -> str:
        mask = "" if self.mask is None else super().extra_repr().removeprefix(nn.Linear.extra_repr(self))
        return f"{nn.Linear.extra_repr(self)}, mode={self.mode}, backend={self.backend}{mask}"
