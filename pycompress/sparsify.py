"""sparsify_: the pruned layers of a model become SparseLinear, where that is faster."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import NoneType

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pycompress.convert import apply_edits, attention_rows, carry_marks, shape_of, unchanged_error
from pycompress.cost_core import ANY_M
from pycompress.cost_model import DEFAULT_TOKENS, CostModel, Shape, describe_choice, form_at, model_for
from pycompress.cost_target import target_of
from pycompress.fuse import Edit, FusionPlan, fast_path_edits, plan_fusions
from pycompress.nn import FakeQuantLinear, Int8Linear, MaskedLinear, SparseLinear
from pycompress.nn.float_linear import float_weight
from pycompress.nn.sparse_forms import backends_of
from pycompress.nn.sparse_state import pruned_weight
from pycompress.ops import FORMATS, SPARSE_BACKENDS, SPARSE_DTYPES
from pycompress.report import LayerReport, SparseLayerReport, SparsifyReport, model_bytes, state_bytes
from pycompress.selection import OURS, FilterFn, Layer, ModuleMap, check_root, is_hook_pruned, select
from pycompress.tracing import Shadow

__all__ = ["SparsifyReport", "sparsify_"]

_OP = "sparsify_"
MIN_SPARSITY = 0.05  # a layer with fewer zeros has them by accident
# A layer is made sparse for at least this gain at one of the numbers of tokens that matter.
_WORTH = 1.03


@dataclass
class _New:
    """What takes the place of a layer, and what the report says of it."""

    module: nn.Module  # the old one where it stays
    action: str
    why: str
    sparsity: float | None = None
    choice: str = ""
    times: tuple[tuple[int, float, float], ...] = ()


@dataclass(frozen=True)
class _Options:
    dtype: str
    format: str
    backend: str
    tokens: tuple[int, ...]
    min_sparsity: float
    cost_model: CostModel | None


def sparsify_(
    model: nn.Module,
    dtype: str = "float32",
    format: str = "auto",
    *,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    min_sparsity: float = MIN_SPARSITY,
    skip: str | Iterable[str] = (),
    filter_fn: FilterFn | None = None,
    fuse: bool = True,
    backend: str = "auto",
    cost_model: CostModel | None = None,
) -> SparsifyReport:
    """Replace the pruned linear layers of `model` by SparseLinear, in place, and say what was done.

    model: whose layers hold zeros: MaskedLinear as prune_ makes them, nn.Linear or Hugging Face's Conv1D with exact
        zeros in the weight, whatever put them there, layers pruned by torch.nn.utils.prune or a parametrization, and
        for dtype="int8" FakeQuantLinear of dynamic mode. Other layers, and those that a swap would break, are left as
        they are; the report gives each its reason.
    dtype: of the weights that are kept: "float32", "bfloat16", "int8" (activations then too, a scale per token) or
        "float16", which is for models that will be moved to a GPU: on the CPU the reference computes it, slowly, and
        nothing is chosen by speed.
    format: "auto" chooses for each number of tokens by the cost model, see pycompress.cost_model. A layer that would
        not be faster sparse for any of `tokens` is dense afterwards: as it was, its mask folded into an nn.Linear, or
        for dtype="int8" an Int8Linear. "bitmap" and "index" make every layer sparse, be it only for its size.
    tokens: numbers of tokens (rows of x) that matter; others take the form of the nearest.
    min_sparsity: layers with a smaller fraction of zeros are left.
    skip, filter_fn, fuse: as for quantize_.
    backend: of the new layers; see SparseLinear. With "reference", and on devices that are neither a CPU nor a GPU with
        kernels, nothing is chosen by speed.
    cost_model: what "auto" goes by. By default this machine's, or that of the GPU that the layer is on; where it was
        never measured that is done now, which takes some seconds once, and close calls are settled by timing the layer.

    Raises TypeError or ValueError for a bad argument, ValueError naming the layer whose kept weights are not
    finite. Whenever it raises, the model is what it was.
    """
    check_root(model, _OP)
    options = _Options(dtype, format, backend, _checked_tokens(tokens), min_sparsity, cost_model)
    _check_arguments(options)
    modules = ModuleMap(model)
    shadow = Shadow(model, opaque=OURS)
    takes = (FakeQuantLinear, MaskedLinear)
    layers = select(
        modules, shadow, op=_OP, skip=skip, filter_fn=filter_fn, takes=takes, pruned=True, keeps_weight=False
    )
    layers = [_keep_trained(layer, dtype) for layer in layers]
    before = model_bytes(model)
    made = {layer.module: _convert(layer, options) for layer in layers if not layer.reason}

    def changed(layer: Layer) -> bool:
        return layer.module in made and made[layer.module].module is not layer.module

    foldable = [layer for layer in layers if changed(layer) and _takes_activation(made[layer.module].module)]
    plan = plan_fusions(modules, foldable, shadow) if fuse else FusionPlan()
    for old, fusion in plan.fusions.items():
        made[old].module.activation = fusion.activation  # type: ignore[assignment]
    edits = [
        Edit(parent._modules, key, made[layer.module].module)
        for layer in layers
        if changed(layer)
        for parent, key in layer.slots
    ]
    edits += [fusion.edit for fusion in plan.fusions.values()]
    edits += fast_path_edits(modules, {layer.module for layer in foldable})
    sizes = {layer.module: model_bytes(layer.module) for layer in layers}
    apply_edits(edits)
    rows = [_report(layer, sizes[layer.module], made.get(layer.module), plan) for layer in layers]
    layer_rows = [*rows, *attention_rows(modules)]
    return SparsifyReport(dtype, format, before, model_bytes(model), layer_rows, state_bytes(model))


def _checked_tokens(tokens: Sequence[int]) -> tuple[int, ...]:
    try:
        found = tuple(tokens)
    except TypeError:
        found = ()
    if not found or not all(isinstance(m, int) and 1 <= m < ANY_M for m in found):
        raise ValueError(f"{_OP}: tokens={tokens!r}; expected a sequence of integers, each at least 1")
    return found


def _check_arguments(options: _Options) -> None:
    named = (
        ("dtype", options.dtype, tuple(SPARSE_DTYPES)),
        ("format", options.format, FORMATS),
        ("backend", options.backend, SPARSE_BACKENDS),
    )
    for name, value, expected in named:
        if value not in expected:
            raise ValueError(f"{_OP}: unknown {name} {value!r}; expected one of {', '.join(expected)}")
    if options.format == "dense":
        raise ValueError(f"{_OP}: format='dense' would make nothing sparse; expected auto, bitmap or index")
    if not isinstance(options.min_sparsity, (int, float)) or not 0.0 <= options.min_sparsity <= 1.0:
        raise ValueError(f"{_OP}: min_sparsity={options.min_sparsity!r}; expected a fraction from 0 to 1")
    if not isinstance(options.cost_model, (CostModel, NoneType)):
        raise TypeError(
            f"{_OP}: cost_model is a {type(options.cost_model).__name__}; expected the result of "
            "calibrate_cost_model() or default_cost_model(), or None"
        )


def _keep_trained(layer: Layer, dtype: str) -> Layer:
    """Leave a FakeQuantLinear that was trained for something else than the sparse layer computes."""
    old = layer.module
    if layer.reason or not isinstance(old, FakeQuantLinear) or (old.mode, dtype) == ("dynamic", "int8"):
        return layer
    instead = "dtype='int8'" if old.mode == "dynamic" else "quantize_"
    return replace(layer, reason=f"was trained for int8 ({old.mode}); use {instead}, or its to_linear()")


def _takes_activation(module: nn.Module) -> bool:
    return isinstance(module, (SparseLinear, Int8Linear))


def _convert(layer: Layer, options: _Options) -> _New:
    """What takes the layer's place; raises with its name if it cannot be made."""
    old = layer.module
    try:
        new = _made(old, options)
    except Exception as error:
        raise unchanged_error(_OP, layer, error) from error
    if new.module is not old:
        carry_marks(old, new.module)
    return new


def _made(old: nn.Module, options: _Options) -> _New:
    source, mask = _source(old)
    zeros = _zeros(source, mask)
    if zeros == 0.0 or zeros < options.min_sparsity:
        few = f"only {zeros:.2%} of its weight is zero; min_sparsity is {options.min_sparsity:.2%}"
        return _New(old, "left", few if zeros else "its weight has no zeros", zeros)
    sparse = SparseLinear.from_dense(
        source,
        mask,
        dtype=options.dtype,
        format=options.format,
        backend=options.backend,
        tokens=options.tokens,
        cost_model=options.cost_model,
    )
    sparse.train(old.training)
    if not backends_of(sparse.weight_values, options.backend):
        return _New(sparse, "swapped", _slow(sparse), zeros, options.format)
    model = options.cost_model or model_for(sparse)
    shape = target_of(sparse).shape(sparse)
    dense_times = tuple((m, t, t) for m in options.tokens for t in (model.predict("dense", m, shape),))
    times = tuple((m, t, model.predict(form_at(sparse.choice, m), m, shape)) for m, t, _ in dense_times)
    forms = {form_at(sparse.choice, m) for m in options.tokens}
    gains = [dense / now for m, dense, now in times if form_at(sparse.choice, m) != "dense"]
    if options.format == "auto" and max(gains, default=0.0) < _WORTH:
        return _New(*_dense(old, source, mask, options, shape, model), zeros, "", dense_times)
    why = "holds the dense weight too, for the numbers of tokens where that is faster" if "dense" in forms else ""
    return _New(sparse, "swapped", why, zeros, describe_choice(sparse.choice), times)


def _slow(sparse: SparseLinear) -> str:
    """What to say of a layer that no kernel computes, though nobody asked for the reference."""
    if sparse.dtype == "float16" and sparse.weight_values.device.type == "cpu" and sparse.backend == "auto":
        return "float16 is for GPUs; on the CPU bfloat16 is fast, this runs by the reference"
    return ""


def _source(old: nn.Module) -> tuple[nn.Module, Tensor | None]:
    """A layer with the weight in the open, and its mask where that is more than "not zero"."""
    if isinstance(old, MaskedLinear):
        return old, old.mask
    if parametrize.is_parametrized(old):
        # On a copy: some parametrizations, as spectral_norm, change what they hold whenever they are asked.
        with torch.no_grad():
            return _linear(float_weight(copy.deepcopy(old).eval(), _OP).detach(), old, _tensor(old, "bias")), None
    if not is_hook_pruned(old):
        return old, None
    # `weight` and `bias` are what the last forward made of these.
    weight, mask = old._parameters["weight_orig"], old._buffers["weight_mask"]
    bias, bias_mask = _tensor(old, "bias_orig"), _tensor(old, "bias_mask")
    bias = bias * bias_mask if bias is not None and bias_mask is not None else _tensor(old, "bias")
    assert weight is not None
    assert mask is not None
    if isinstance(old, nn.Linear):
        return _linear(weight.detach(), old, bias), mask != 0
    return _linear(weight.detach().t(), old, bias), mask.t() != 0  # Conv1D


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    value = getattr(module, name, None)
    return value if isinstance(value, Tensor) else None


def _zeros(source: nn.Module, mask: Tensor | None) -> float:
    """The fraction of the weight that is pruned."""
    kept = float_weight(source, _OP).detach() if mask is None else mask
    return 1.0 - int(torch.count_nonzero(kept)) / kept.numel() if kept.numel() else 0.0


def _dense(
    old: nn.Module, source: nn.Module, mask: Tensor | None, options: _Options, shape: Shape, model: CostModel
) -> tuple[nn.Module, str, str]:
    """The dense layer that stays, or comes back, as no number of tokens makes the sparse one faster; what; why."""
    forms = [form for form in ("bitmap", "index") if model.knows(form, shape)]

    def loss(m: int) -> float:
        return round(min(model.predict(form, m, shape) for form in forms) / model.predict("dense", m, shape), 2)

    at = min(options.tokens, key=loss)
    why = f"sparse would take {loss(at):.2f}x as long at best (M={at})"
    if options.dtype != "int8" and source is old and mask is None:
        return old, "dense", why
    folded = _linear(pruned_weight(source, mask)[0], old, _tensor(source, "bias"))
    if options.dtype == "int8":
        return Int8Linear.from_float(folded), "int8 dense", why
    return folded, "dense", why


def _linear(weight: Tensor, like: nn.Module, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear with copies of weight (N, K) and bias, to be trained where `like` is."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    trained = any(p.requires_grad for p in like.parameters())
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=trained)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return linear.train(like.training)


def _report(layer: Layer, size: int, new: _New | None, plan: FusionPlan) -> LayerReport:
    old, aliases = layer.module, layer.names[1:]
    if new is None:
        return LayerReport(layer.name, "left", layer.reason, shape_of(old), "", size, size, aliases)
    fusion, note = plan.fusions.get(old), plan.notes.get(old, "")
    why = "; ".join(part for part in (new.why, note) if part)
    return SparseLayerReport(
        *(layer.name, new.action, why, shape_of(old), fusion.activation if fusion else ""),
        *(size, size if new.module is old else model_bytes(new.module), aliases),
        *(new.sparsity, new.choice, new.times),
    )
