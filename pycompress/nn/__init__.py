"""Drop-in modules."""

from pycompress.nn.channel_scale import ChannelScale
from pycompress.nn.distillation_loss import DistillationLoss
from pycompress.nn.fake_quant_linear import FakeQuantLinear
from pycompress.nn.feature_losses import AttentionLoss, HiddenStateLoss, TripleLoss, TripleLossParts
from pycompress.nn.int8_linear import Int8Linear
from pycompress.nn.linear_distillation_loss import LinearDistillationLoss
from pycompress.nn.low_rank_linear import LowRankLinear
from pycompress.nn.masked_linear import MaskedLinear
from pycompress.nn.sparse_linear import SparseLinear
from pycompress.ops.distill_loss import DistillLossParts
from pycompress.ops.distill_loss_call import TopKLogits

__all__ = [
    "AttentionLoss",
    "ChannelScale",
    "DistillLossParts",
    "DistillationLoss",
    "FakeQuantLinear",
    "HiddenStateLoss",
    "Int8Linear",
    "LinearDistillationLoss",
    "LowRankLinear",
    "MaskedLinear",
    "SparseLinear",
    "TopKLogits",
    "TripleLoss",
    "TripleLossParts",
]
