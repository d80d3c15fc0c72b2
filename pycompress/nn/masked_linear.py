"""``MaskedLinear``: ``nn.Linear`` that trains and runs with a pruned weight.

``y = x @ (weight * mask)^T + bias``. ``weight`` is a leaf parameter as in ``nn.Linear``, ``mask`` a bool buffer (N, K),
True where a weight is kept. There are no hooks and no second copy of the weight: the gradient is masked inside
autograd, and what the mask removes is written into the weight itself.

State. A ``state_dict`` has the keys of ``nn.Linear`` and nothing else, its weight is ``weight * mask``; dense
checkpoints load into the module, and its own into ``nn.Linear``, both strictly. The mask hides in the sign of the
zeros: what is pruned is saved as +0.0, a kept weight that happens to be zero as -0.0, and the version in the
``state_dict``'s metadata says that this is so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycompress.nn.float_linear import is_conv1d

GRADIENTS = ("masked", "dense")
_VERSION = 2  # in the metadata of a state_dict; nn.Linear writes 1
_AT_ONCE = 1 << 18  # weights whose mask is spread to bits at once
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def zeroed(values: Tensor, mask: Tensor) -> Tensor:
    """torch.where(mask, values, 0) without autograd, NaN included, and 9 times as fast.

    where and masked_fill branch at every value on the CPU (3.7 ns each at 80 % sparsity); this ands its bits with
    the mask's, 0 or -1 (0.4 ns).
    """
    return values.view(_BITS[values.element_size()]).bitwise_and(mask.view(torch.int8).neg()).view(values.dtype)


def zero_(values: Tensor, mask: Tensor) -> None:
    """The same in place, for (N, K), some rows at a time: as a whole the mask's bits would need memory of their own."""
    bits = values.view(_BITS[values.element_size()])
    rows = max(1, _AT_ONCE // max(1, bits.shape[1]))
    for part, kept in zip(bits.split(rows), mask.view(torch.int8).split(rows), strict=True):
        part.bitwise_and_(kept.to(part.dtype).neg_())


def _has_memory(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:  # one of vmap's
        return False
    return True


class _MaskedGradient(torch.autograd.Function):
    """The weight as it is, whose pruned positions already hold 0; its gradient is 0 there too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        # Not a product: NaN * 0 is NaN. Bits can be neither differentiated nor batched.
        if torch.is_grad_enabled() or not _has_memory(grad):
            return torch.where(mask, grad, 0), None
        # In place, which spares a third of what masking costs: the gradient is a product that the F.linear after this
        # has just computed, and nobody else has it.
        zero_(grad, mask)
        return grad, None


class _StraightThrough(torch.autograd.Function):
    """weight * mask, whose gradient reaches every weight (Bengio et al. 2013)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, eager: bool) -> Tensor:
        return zeroed(weight, mask) if eager else torch.where(mask, weight, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class Fold(NamedTuple):
    """Which weight and mask were folded, or quantised.

    Holding the tensors keeps their addresses from being used again.
    """

    weight: Tensor
    weight_version: int
    address: int  # changes with `weight.data = ...`, which the version does not see
    mask: Tensor | None
    mask_version: int

    def is_for(self, weight: Tensor, mask: Tensor | None) -> bool:
        return (
            self.weight is weight
            and self.mask is mask
            and self.weight_version == weight._version
            and (mask is None or self.mask_version == mask._version)
            and self.address == weight.data_ptr()
        )


class MaskedLinear(nn.Linear):
    """``y = x @ (weight * mask)^T + bias``, to train with a mask or to keep one.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias.
        gradient: ``"masked"``: the weight's gradient is 0 at pruned positions, and the weight itself is kept exactly 0
            there: what the momentum of an optimizer writes into them is undone before it is read, by the next forward
            or ``state_dict``. ``"dense"``: the gradient reaches every weight (straight-through), and pruned weights
            keep their values behind the mask, ready to be regrown.

    A new module keeps every weight; :meth:`set_mask` prunes. Input ``(..., K)``, output ``(..., N)``.

    In eval mode, or without gradients, the mask is folded into the weight once, and then only looked at again when the
    weight or the mask was replaced or written to. What goes past autograd's bookkeeping by ``weight.data`` is not seen
    in eval mode; call ``eval()`` after it. A compiled, traced or exported graph has the mask in it.

    DistributedDataParallel broadcasts the mask of process 0 with the other buffers; where every process sets the same
    masks, ``broadcast_buffers=False`` saves that.

    Raises:
        ValueError: an unknown ``gradient``.
    """

    _version = _VERSION
    mask: Tensor
    _fold: Fold | None
    _folded: Tensor | None  # gradient="dense": weight * mask for eval; with "masked" the weight is its own

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        gradient: str = "masked",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_gradient(gradient)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.gradient = gradient
        mask = torch.ones(out_features, in_features, dtype=torch.bool, device=device)
        self.register_buffer("mask", mask, persistent=False)
        self._fold = self._folded = None

    @classmethod
    def from_linear(cls, linear: nn.Module, mask: Tensor | None = None, gradient: str = "masked") -> MaskedLinear:
        """A MaskedLinear around an ``nn.Linear``'s own parameters, so that an optimizer that holds them goes on.

        Args:
            linear: an ``nn.Linear``; or transformers' ``Conv1D``, whose weight lies the other way round and becomes a
                new parameter; or a MaskedLinear. With ``gradient="masked"`` its weight is now 0 where it is pruned.
            mask: bool (N, K), True where a weight is kept; by default all are (of a MaskedLinear: its own mask).

        Raises:
            ValueError: not a linear layer, an unknown ``gradient``, or a mask of another shape, dtype or device.
        """
        module = cls._around(linear, gradient)
        if mask is not None:
            module.set_mask(mask)
        return module

    @classmethod
    def _around(cls, linear: nn.Module, gradient: str) -> MaskedLinear:
        """from_linear without touching any weight: the mask keeps all, or is a copy of the MaskedLinear's."""
        _check_gradient(gradient)
        weight = linear._parameters.get("weight")
        if weight is None or weight.dim() != 2:
            raise ValueError(
                f"MaskedLinear.from_linear: expected an nn.Linear with a weight (N, K), got {type(linear).__name__}"
            )
        if is_conv1d(linear):
            turned = weight.detach().t().clone(memory_format=torch.contiguous_format)
            weight = nn.Parameter(turned, weight.requires_grad)
        n, k = weight.shape
        bias = linear._parameters.get("bias")
        module = cls(k, n, bias is not None, gradient=gradient, device="meta")
        module.weight = weight
        if bias is not None:
            module.bias = bias
        old = linear.mask if isinstance(linear, MaskedLinear) else None
        module.mask = torch.ones_like(weight, dtype=torch.bool) if old is None else old.clone()
        return module.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with zeros where this one is pruned; it shares nothing with the module."""
        bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, bias, device="meta", dtype=self.weight.dtype)
        linear.weight = nn.Parameter(self._masked().clone(), self.weight.requires_grad)
        if bias:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    def set_mask(self, mask: Tensor) -> None:
        """Prune where `mask` (bool (N, K)) is False; what it regrows is 0, or with ``gradient="dense"`` what it was.

        Raises:
            ValueError: a mask of another shape, dtype or device than the module's; nothing is changed then.
        """
        check_mask(mask, self.mask, "MaskedLinear.set_mask")
        # In place: what holds the buffer, as DistributedDataParallel does, goes on with the new mask.
        self.mask.copy_(mask)
        self._fold = self._folded = None
        if self.gradient == "masked":
            self._clear()

    @property
    def sparsity(self) -> float:
        """The fraction of weights that are pruned; 0 for a layer without weights."""
        return 1.0 - int(self.mask.sum()) / self.mask.numel() if self.mask.numel() else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._effective(), self.bias)

    def _effective(self) -> Tensor:
        """weight * mask as forward uses it: with the gradient that was asked for, and without a copy if possible."""
        weight, mask = self.weight, self.mask
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
        if traced or type(weight) is not nn.Parameter or weight.is_inference():
            # Traced, or not our parameter (functional_call): nothing is written or kept. where masks its gradient.
            dense = self.gradient == "dense" and weight.requires_grad
            return _StraightThrough.apply(weight, mask, False) if dense else torch.where(mask, weight, 0)
        trained = torch.is_grad_enabled() and weight.requires_grad
        if self.gradient == "dense":
            if trained:
                self._fold = self._folded = None
                return _StraightThrough.apply(weight, mask, True)
            return self._cached()
        training = trained and self.training
        if training or self._fold is None or not self._fold.is_for(weight, mask):
            self._clear()
            # Not remembered in training: some optimizers write to weight.data, which no version tells.
            self._fold = None if training else fold_of(weight, mask)
        return _MaskedGradient.apply(weight, mask) if trained else weight

    def _clear(self) -> None:
        """Write 0 into the weight where it is pruned."""
        weight, mask = self.weight, self.mask
        if type(weight) is nn.Parameter and not weight.is_meta and not weight.is_inference():
            # Past autograd's version counter: whoever wrote into pruned positions has raised it already, and in
            # training this runs between two forwards of one backward.
            zero_(weight.data, mask)

    def _cached(self) -> Tensor:
        weight, mask = self.weight, self.mask
        if self._folded is None or self._fold is None or not self._fold.is_for(weight, mask):
            self._folded = zeroed(weight.detach(), mask)
            self._fold = fold_of(weight, mask)
        return self._folded

    def train(self, mode: bool = True) -> MaskedLinear:
        super().train(mode)
        # Training has no use for a copy of the weight; and eval() looks again, whatever was written to weight.data.
        self._fold = self._folded = None
        return self

    def _masked(self) -> Tensor:
        """weight * mask without gradient: (N, K), pruned +0.0, kept zeros -0.0; the weight's memory if it can be."""
        weight, mask = self.weight.detach(), self.mask
        if weight.is_meta:
            return weight
        if self.gradient == "dense" or type(self.weight) is not nn.Parameter or self.weight.is_inference():
            values = zeroed(weight, mask)
        else:
            # Into the weight itself, so that a state_dict shares its memory with the module as that of nn.Linear does:
            # moving averages rely on it. Past the version counter, because no value that counts changes.
            values = self.weight.data
            zero_(values, mask)
        live_zeros = (values == 0) & mask
        if bool(live_zeros.any()):
            values.masked_fill_(live_zeros, -0.0)
        return weight if values.data_ptr() == weight.data_ptr() else values

    # ---- state ------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLinear:
        mask = self.mask
        super()._apply(fn, recurse)
        if self.mask is not mask:
            # Not what fn made of it: .type() makes it float, to_empty() leaves it undefined.
            new = torch.ones_like(self.mask, dtype=torch.bool) if mask.is_meta else mask.to(self.mask.device)
            self._buffers["mask"] = new
        self._fold = self._folded = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fold": None, "_folded": None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        masked = self._masked()
        if not keep_vars:
            destination[prefix + "weight"] = masked

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
        """Takes the mask from a state that a MaskedLinear saved; to any other weight it applies its own mask."""
        before = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        new = state_dict.get(prefix + "weight")
        if new is None or any(prefix + "weight" in message for message in error_msgs[before:]):
            return
        device = self.weight.device
        if self.mask.device != device:  # assign=True, which brings the weight's own device
            self.mask = torch.ones_like(self.weight, dtype=torch.bool) if self.mask.is_meta else self.mask.to(device)
        if local_metadata.get("version") == _VERSION and not new.is_meta and not self.mask.is_meta:
            self.mask.copy_((new != 0) | torch.signbit(new))
        self._fold = self._folded = None
        if self.gradient == "masked":
            self._clear()

    def extra_repr(self) -> str:
        gradient = "" if self.gradient == "masked" else f", gradient={self.gradient}"
        sparsity = "" if self.mask.is_meta else f", sparsity={self.sparsity:.4g}"
        return f"{super().extra_repr()}{sparsity}{gradient}"


def fold_of(weight: Tensor, mask: Tensor | None) -> Fold | None:
    if weight.is_inference() or (mask is not None and mask.is_inference()):
        return None  # made in inference mode, without versions: folded at every call
    return Fold(weight, weight._version, weight.data_ptr(), mask, 0 if mask is None else mask._version)


def _check_gradient(gradient: str) -> None:
    if gradient not in GRADIENTS:
        raise ValueError(f"MaskedLinear: unknown gradient {gradient!r}; expected one of {', '.join(GRADIENTS)}")


def check_mask(mask: object, like: Tensor, op: str) -> None:
    """Raises ValueError where `mask` is not a bool tensor of the shape and on the device of `like`."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"{op}: mask is a {type(mask).__name__}; expected a bool tensor {tuple(like.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask is {mask.dtype}; expected torch.bool, True where a weight is kept (mask != 0)")
    if mask.shape != like.shape:
        raise ValueError(f"{op}: mask is {tuple(mask.shape)}; expected (outputs, inputs) = {tuple(like.shape)}")
    if mask.device != like.device:
        raise ValueError(f"{op}: mask is on {mask.device}; expected {like.device}, where the weight is")
