"""What smooth_ has to see of a model on sample batches: how large each channel is, who reads what, which norms help."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.calibration import Batch, feed, with_progress
from pycompress.convert import shape_of
from pycompress.readers import Flows, tensors_in, watching
from pycompress.selection import Layer, ModuleMap

# What rounding alone may do to the model's output, relative L2; more means that a fold was not exact.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass
class Seen:
    """What the batches showed. peaks: max |x| a channel of each layer's input, fp64 (K,)."""

    flows: Flows
    peaks: dict[nn.Module, Tensor] = field(default_factory=dict)
    scales_with_weight: dict[nn.Module, bool] = field(default_factory=dict)  # by norm
    first: Batch | None = None
    outputs: list[Tensor] = field(default_factory=list)  # of the first batch


def _norms(modules: ModuleMap) -> dict[nn.Module, int]:
    """The modules with a vector `weight`, at most a `bias` besides, and nothing else: norms, among others."""
    found = {}
    for module in modules.names:
        weight = module._parameters.get("weight")
        tensors = {key for key, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
        plain = weight is not None and not nn.parameter.is_lazy(weight) and weight.dim() == 1 and not module._modules
        if plain and tensors <= {"weight", "bias"}:
            found[module] = weight.numel()  # type: ignore[union-attr]
    return found


def observe(
    model: nn.Module, modules: ModuleMap, layers: list[Layer], batches: Iterable[Batch], progress: bool
) -> Seen:
    norms = _norms(modules)
    linears = [layer.module for layer in layers]
    watched = {**norms, **{module: shape_of(module)[0] for module in linears if shape_of(module)}}
    with ExitStack() as stack:
        # Before the watch: it has not seen the output yet when this looks at it.
        probed: dict[nn.Module, bool] = {}
        for norm in norms:
            stack.callback(norm.register_forward_hook(_probe(probed), with_kwargs=True).remove)
        flows, forward = stack.enter_context(watching(modules, watched, linears))
        # After it: what happens inside a linear layer is not counted.
        peaks: dict[nn.Module, Tensor] = {}
        for layer in layers:
            hook = _peak(layer.name, peaks)
            stack.callback(layer.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        seen = Seen(flows, peaks, probed)
        for batch in with_progress(batches, progress, "smoothing"):
            output = forward(partial(feed, model, batch, "smooth_"))
            if seen.first is None:
                seen.first, seen.outputs = batch, [tensor.detach().clone() for tensor in tensors_in(output)]
    if seen.first is None:
        raise ValueError("smooth_: batches is empty; pass at least one (is it a generator that is used up?)")
    return seen


def _peak(name: str, peaks: dict[nn.Module, Tensor]) -> Callable[..., None]:
    """A pre-hook that keeps the greatest absolute value of each channel."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(tensors_in((args, kwargs)))
        if x.numel() == 0:
            return
        peak = x.detach().abs().reshape(-1, x.shape[-1]).amax(0).double()
        if not bool(torch.isfinite(peak).all()):
            raise ValueError(
                f"smooth_: the input of layer {name!r} has NaN or Inf; check the batch. The model is unchanged"
            )
        peaks[module] = torch.maximum(peaks[module], peak) if module in peaks else peak

    return hook


def _probe(probed: dict[nn.Module, bool]) -> Callable[..., None]:
    """A hook that tries once whether a factor on weight and bias comes out as that factor on the output.

    It does not where a norm multiplies by 1 + weight, or where the channels are not the last dimension.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        weight = module._parameters["weight"]
        if module in probed or weight is None or weight.dtype not in ROUNDING:
            return
        parameters = dict(module._parameters)
        factor = torch.linspace(0.5, 2.0, weight.numel(), device=weight.device, dtype=weight.dtype)
        try:
            for key, value in parameters.items():
                if value is not None:
                    module._parameters[key] = nn.Parameter(value.detach() * factor, requires_grad=False)
            scaled = module.forward(*args, **kwargs)
        except Exception:  # a forward that cannot be run again is not one to change
            scaled = None
        finally:
            module._parameters.update(parameters)
        fits = isinstance(output, Tensor) and isinstance(scaled, Tensor) and output.shape[-1:] == weight.shape
        probed[module] = fits and distance([scaled], [output * factor]) <= ROUNDING[weight.dtype]

    return hook


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Relative L2 distance of all floating-point tensors together; infinite where they do not match."""
    if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
        return math.inf
    error = size = 0.0
    for a, e in zip(actual, expected, strict=True):
        if e.is_floating_point():
            finite = torch.isfinite(e)  # masked logits may be -inf
            if not torch.equal(finite, torch.isfinite(a)):
                return math.inf
            error += float((a.double() - e.double())[finite].square().sum())
            size += float(e.double()[finite].square().sum())
    return math.sqrt(error / size) if size else (math.inf if error else 0.0)
