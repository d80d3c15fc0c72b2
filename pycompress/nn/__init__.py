"""Drop-in modules."""

from pycompress.nn.distillation_loss import DistillationLoss
from pycompress.nn.feature_losses import AttentionLoss, HiddenStateLoss, TripleLoss, TripleLossParts
from pycompress.nn.int8_linear import Int8Linear
from pycompress.nn.linear_distillation_loss import LinearDistillationLoss
from pycompress.nn.masked_linear import MaskedLinear
from pycompress.nn.sparse_linear import SparseLinear
from pycompress.ops.distill_loss import DistillLossParts
from pycompress.ops.distill_loss_call import TopKLogits

__all__ = [
    "AttentionLoss",
    "DistillLossParts",
    "DistillationLoss",
    "HiddenStateLoss",
    "Int8Linear",
    "LinearDistillationLoss",
    "MaskedLinear",
    "SparseLinear",
    "TopKLogits",
    "TripleLoss",
    "TripleLossParts",
]
