"""``SparseLinear``: ``nn.Linear`` with a pruned weight.

State. A checkpoint holds plain tensors: ``weight_bitmap`` uint8 (N, ceil(K/8)), bit k%8 of byte k//8 set where
``weight[n, k]`` is kept; ``weight_values`` (nnz,) float32, bfloat16 or int8, row after row; with int8 ``weight_scale``
float32 (N,); ``bias``. In memory the module also keeps, in non-persistent buffers, the forms that its choice names:
``_row_start`` for the bitmap kernels, ``_index``, ``_dense``, each on the module's device and in the form of whoever
computes there. They are made anew wherever the module moves, loads, is
copied or unpickled, and by the next eager call after bitmap or values were replaced or edited in place. A compiled
module sees such an edit only then, and one that torch does not count (through ``.data`` or ``.numpy()``) never.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress._native import has_values
from pycompress.cost_model import CostModel, Explanation, choose_for, choose_measured, describe_choice, explain_layer
from pycompress.nn.float_linear import float_bias, make_float
from pycompress.nn.packed_weight import keep_dtypes
from pycompress.nn.sparse_forms import NATIVE, backends_of, kernel_names, make_forms
from pycompress.nn.sparse_state import pruned_weight, state_errors
from pycompress.ops.eager import is_plain_eager
from pycompress.ops.sparse_linear import check_options, sparse_unpack
from pycompress.ops.sparse_linear_eager import EagerPlan, Forms
from pycompress.ops.sparse_linear_reference import BITMAP, FORMAT_CODES, MOST
from pycompress.ops.sparse_linear_weight import runs_here, sparse_mask, validate_sparse

_STATE = ("weight_bitmap", "weight_values", "weight_scale")
_DERIVED = ("_row_start", "_index", "_dense")


class SparseLinear(nn.Module):
    """``y = act(x @ (weight ⊙ mask)^T + bias)``: bitmap and kept values instead of a dense weight.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias (a float parameter, which may be trained).
        dtype: of the kept weights: ``"float32"``, ``"bfloat16"``, ``"float16"`` (made for a GPU; on the CPU the
            reference computes it, slowly) or ``"int8"`` (one scale an output row; activations quantised per token).
            Casts of the module leave it as it is.
        format: what computes: ``"bitmap"`` (fast for a few tokens), ``"index"`` (for more; on a GPU where the mask is
            of blocks of 16, 32 or 64, or keeps two of every four), ``"dense"``, or ``"auto"``: whatever the cost model
            of this machine, or of the GPU, expects to be fastest for each number of tokens.
        activation: fused into the kernel: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        backend: ``"auto"``, ``"native"``, ``"cuda"``, ``"triton"`` or ``"reference"``; a named one runs or raises.

    Input ``(..., K)`` float32, bfloat16 or float16; output ``(..., N)`` of the same dtype. A new module keeps no
    weight, to be filled by ``load_state_dict``, which takes any number of values; :meth:`from_dense` makes one from a
    pruned layer.
    """

    bias: nn.Parameter | None
    weight_bitmap: Tensor
    weight_values: Tensor
    weight_scale: Tensor | None
    _row_start: Tensor | None
    _index: Tensor | None
    _dense: Tensor | None
    _forms: Forms | None
    _plan: EagerPlan | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: str = "float32",
        format: str = "auto",
        activation: str = "none",
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_options(activation, backend, format, dtype)
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.format, self.activation, self.backend = format, activation, backend
        self._tokens: tuple[int, ...] | None = None
        self._cost_model: CostModel | None = None
        self._forms = None
        bitmap = torch.zeros(out_features, -(-in_features // 8), dtype=torch.uint8, device=device)
        self.register_buffer("weight_bitmap", bitmap)
        self.register_buffer("weight_values", torch.zeros(0, dtype=ops.SPARSE_DTYPES[dtype], device=device))
        scale = torch.ones(out_features, device=device, dtype=torch.float32) if dtype == "int8" else None
        self.register_buffer("weight_scale", scale)
        for name in _DERIVED:
            self.register_buffer(name, None, persistent=False)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, device=device)) if bias else None)
        self._arrange()

    @classmethod
    def from_dense(
        cls,
        linear: nn.Module,
        mask: Tensor | None = None,
        *,
        dtype: str = "float32",
        format: str = "auto",
        activation: str | None = None,
        backend: str = "auto",
        tokens: Sequence[int] | None = None,
        cost_model: CostModel | None = None,
    ) -> SparseLinear:
        """Make one from a pruned ``nn.Linear``, which stays as it is.

        Args:
            linear: ``nn.Linear``, transformers' ``Conv1D``, ``MaskedLinear``, or a layer pruned by
                ``torch.nn.utils.prune``; its device, training flag and the dtype of its bias carry over.
            mask: bool (N, K), True where a weight is kept. Without one it is the layer's own, or what is not exactly 0.
            activation: fused activation, none by default.
            tokens: numbers of tokens that ``format="auto"`` is to be fast for; any, by default.
            cost_model: what chooses for ``format="auto"``. By default this machine's: measured in a few seconds where
                that was never done, close calls settled by timing this layer.

        Raises:
            ValueError: an unknown option, a mask that does not fit, a kept weight that is NaN or Inf in ``dtype``, or a
                weight on the meta device.
        """
        check_options(activation or "none", backend, format, dtype)
        weight, mask = pruned_weight(linear, mask)
        scale = None
        if dtype == "int8":
            weight, scale = ops.quantize_weight(weight)
        else:
            weight = weight.to(ops.SPARSE_DTYPES[dtype])
            if not weight.isfinite().all():
                raise ValueError(f"SparseLinear.from_dense: a kept weight is NaN, Inf or too large for {dtype}")
        n, k = weight.shape
        bias = float_bias(linear)
        module = cls(
            k, n, bias is not None, dtype=dtype, format=format, activation=activation or "none", backend=backend,
            device="meta",
        )  # fmt: skip
        module.weight_bitmap, module.weight_values = ops.sparse_from_dense(weight, mask)
        module.weight_scale, module.bias = scale, bias
        module._tokens, module._cost_model = tokens if tokens is None else tuple(tokens), cost_model
        module._arrange(measure=True)
        return module.train(linear.training)

    def to_dense(self) -> Tensor:
        """``weight ⊙ mask`` (N, K), +0.0 where pruned: in the kept weights' dtype, or int8 times scale in float32."""
        return sparse_unpack(self.weight_bitmap, self.weight_values, self.weight_scale, self.in_features)

    def to_float(self) -> nn.Module:
        """The ``nn.Linear`` with the zeros in place, in the bias's dtype (float32 without one).

        A fused activation follows it, in an ``nn.Sequential``.
        """
        return make_float(self.to_dense(), self.bias, self.activation, self.training)

    # ---- forward ----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            self._check_k(x)
            derived = (self._row_start, self._index, self._dense, self._choice)
            return self._operator(x, self.weight_bitmap, self.weight_values, self.weight_scale, derived)
        forms, buffers = self._forms, self._buffers
        fresh = forms is not None and forms.are_of(buffers)
        if is_plain_eager(x):
            plan, bias, threads = self._plan, self._parameters["bias"], torch.get_num_threads()
            if not fresh or plan is None or plan.forms is not forms or not plan.is_for(bias, threads):
                plan = self._renew_plan(x, forms if fresh else None, bias, threads)
            y = None if plan is None else plan.run(x)
            if y is not None:
                return y
            forms = self._forms
            fresh = forms is not None and forms.are_of(buffers)
        if isinstance(x, Tensor) and torch._C._get_tracing_state() is None:  # no proxy of fx, nor traced by jit
            self._check_k(x)
        if not fresh or forms is None:  # another weight, for this call: functional_call, or the meta device
            return self._operator(x, self.weight_bitmap, self.weight_values, self.weight_scale, (None, None, None, ()))
        choice = forms.choices.get(torch.get_num_threads(), self._choice)
        derived = (forms.row_start, forms.index, forms.dense, choice)
        return self._operator(x, forms.bitmap, forms.values, forms.scale, derived)

    def _check_k(self, x: Tensor) -> None:
        """What the operator cannot tell: a bitmap knows K only to the next byte."""
        if x.dim() > 0 and x.shape[-1] != self.in_features:
            raise ValueError(f"sparse_linear: x has K={x.shape[-1]} but weight has K={self.in_features}")

    def _operator(self, x: Tensor, bitmap: Tensor, values: Tensor, scale: Tensor | None, derived: tuple) -> Tensor:
        return torch.ops.pycompress.sparse_linear.default(
            x, bitmap, values, scale, self.bias, *derived, self.activation, self.backend
        )

    def _renew_plan(self, x: Tensor, forms: Forms | None, bias: Tensor | None, threads: int) -> EagerPlan | None:
        """The plan for calls like this one, or None where they are the operator's. forms: None if they are stale."""
        if self._row_start is None:  # nobody here wants forms: the reference was asked for, or another device
            return None
        if forms is not None and forms.native and forms.index is not None and not runs_here(forms.index):
            forms = None  # PYCOMPRESS_ISA has changed
        if forms is None or (forms.native and threads not in forms.choices):
            forms = self._arrange()
        ready = forms is not None and forms.native and threads in forms.choices
        ready = ready and x.is_cpu and x.layout is torch.strided
        if not ready or x.dim() == 0 or x.shape[-1] != self.in_features:
            return None
        assert forms is not None
        self._plan = plan = EagerPlan(x, forms, bias, self.activation, threads)
        return plan

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("activation", "backend", "format") or "_forms" not in self.__dict__:
            super().__setattr__(name, value)
            return
        options = {"activation": self.activation, "backend": self.backend, "format": self.format}
        check_options(**{**options, name: value})
        super().__setattr__(name, value)
        self._plan = None  # made for the old one
        if name != "activation":
            self._forms = None
            self._arrange()

    # ---- forms ------------------------------------------------------------------------------------------------

    @property
    def mask(self) -> Tensor:
        """bool (N, K), True where a weight is kept."""
        return sparse_mask(self.weight_bitmap, self.in_features)

    @property
    def nnz(self) -> int:
        """Number of kept weights."""
        return self.weight_values.numel()

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that is pruned; 0 for a layer without weights."""
        total = self.in_features * self.out_features
        return 1 - self.nnz / total if total else 0.0

    @property
    def choice(self) -> tuple[int, ...]:
        """What computes how many tokens: (most tokens, 0 bitmap | 1 index | 2 dense, most tokens, ...)."""
        return self._choice

    def forms(self) -> tuple[str, ...]:
        """The forms of the weight that are held: ``"bitmap"`` always, it is the state; ``"index"``, ``"dense"``."""
        held = {"bitmap": True, "index": self._index is not None, "dense": self._dense is not None}
        return tuple(name for name, here in held.items() if here)

    def memory_bytes(self) -> int:
        """Bytes of memory the module holds: state and derived forms."""
        return sum(t.nbytes for t in (*self._buffers.values(), *self._parameters.values()) if t is not None)

    def explain(self, tokens: Sequence[int] | None = None, measure: bool = True) -> Explanation:
        """Why which form computes how many tokens: predicted and measured times, beside those of the dense layer.

        Args:
            tokens: numbers of tokens, ``(1, 8, 32, 128, 512)`` by default.
            measure: also run the layer and its dense counterpart, a few milliseconds each.

        ``print`` shows a table.
        """
        return explain_layer(self, self._tokens if tokens is None else tokens, measure, self._cost_model)

    def _arrange(self, measure: bool = False, choice: tuple[int, ...] | None = None) -> Forms | None:
        """Make the forms that the choice names, and drop the others. measure: the cost model may time this layer;
        choice: taken instead of what the cost model says.
        """
        self._plan = None
        bitmap, values, threads = self.weight_bitmap, self.weight_values, torch.get_num_threads()
        state = (bitmap, values, self.weight_scale)
        forms = None
        if has_values(bitmap):
            if bitmap.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "SparseLinear: its weight has changed, and its forms cannot be made anew while a CUDA graph is "
                    "captured; call it once before"
                )
            row_start = validate_sparse(bitmap, values, self.out_features, self.in_features)
            backends = backends_of(values, self.backend)
            if backends:
                choices = {threads: choice or self._choose(measure)}
                old = self._forms
                if backends == NATIVE and old is not None and old.are_of(self._buffers) and len(old.choices) < 8:
                    choices = {**old.choices, **choices}
                forms = make_forms(state, row_start, choices, self, backends)
            else:
                forms = Forms(state)
        self._forms = forms
        for name in _DERIVED:
            self._buffers[name] = getattr(forms, name.removeprefix("_"), None)
        self._choice: tuple[int, ...] = (MOST, BITMAP) if forms is None else forms.choices.get(threads, (MOST, BITMAP))
        return forms

    def _choose(self, measure: bool) -> tuple[int, ...]:
        if self.format != "auto":
            return (MOST, FORMAT_CODES[self.format])
        if self.nnz == 0:
            return (MOST, BITMAP)
        if measure:
            return choose_measured(self, tokens=self._tokens, model=self._cost_model)
        return choose_for(self, tokens=self._tokens, model=self._cost_model)

    # ---- state ------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        for name in _DERIVED:
            self._buffers[name] = None
        self._forms = None
        before = {name: self._buffers[name] for name in _STATE}
        super()._apply(fn, recurse)
        keep_dtypes(self, before)
        if self.bias is not None and self.bias.dtype == torch.float64:
            self.bias.data = self.bias.data.float()  # the kernels take none
        try:
            self._arrange()
        except ValueError:  # to_empty(): new memory, without the values
            self.weight_bitmap = torch.zeros_like(self.weight_bitmap)
            self.weight_values = self.weight_values.new_zeros(0)
            self._arrange()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {**self._buffers, **dict.fromkeys(_DERIVED)}
        return {**state, "_plan": None, "_forms": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._arrange()

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
        rest = dict(state_dict)
        expected = [name for name in _STATE if self._buffers[name] is not None]
        new = {name: rest.pop(prefix + name) for name in expected if prefix + name in rest}
        errors = state_errors(self, new, rest.get(prefix + "bias"), prefix)
        if errors:  # nothing of this layer is loaded: a bitmap never meets another layer's values
            error_msgs.extend(errors)
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        if not new:
            missing_keys += [prefix + name for name in expected if strict]
        elif assign or not self.weight_bitmap.is_meta:
            for name, tensor in new.items():
                device = tensor.device if assign else self.weight_bitmap.device
                self._buffers[name] = tensor.detach().to(device, copy=True).contiguous()
        else:
            warnings.warn(
                f"SparseLinear: {prefix}weight_bitmap is on the meta device and stays as it is; load with assign=True",
                stacklevel=2,
            )
        # What is left is the bias; the keys taken above are none that it misses.
        lacking: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, lacking, unexpected_keys, error_msgs)
        missing_keys += [key for key in lacking if key.removeprefix(prefix) not in _STATE]
        if self._forms is None or not self._forms.are_of(self._buffers):
            self._arrange()

    def extra_repr(self) -> str:
        parts = [
            f"in_features={self.in_features}",
            f"out_features={self.out_features}",
            f"bias={self.bias is not None}",
            f"dtype={self.dtype}",
            f"sparsity={self.sparsity:.2f}",
        ]
        forms = self._forms
        fast = forms is not None and forms.row_start is not None
        words = self.format
        if fast and self.format == "auto":
            words = f"auto({describe_choice(self._choice)})"
        parts.append(f"format={words}")
        if self.activation != "none":
            parts.append(f"activation={self.activation}")
        if forms is None or not fast:
            parts.append("backend=reference")
        else:
            parts.append(f"backend={'native:' if forms.native else ''}{kernel_names(self, forms)}")
        return ", ".join(parts)
