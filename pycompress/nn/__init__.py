"""Drop-in modules."""

from pycompress.nn.channel_scale import ChannelScale
from pycompress.nn.distillation_loss import DistillationLoss
from pycompress.nn.fake_quant_linear import FakeQuantLinear
from pycompress.nn.feature_losses import AttentionLoss, HiddenStateLoss, TripleLoss, TripleLossParts
from pycompress.nn.int4_linear import Int4Linear
from pycompress.nn.int8_attention import Int8MultiheadAttention
from pycompress.nn.int8_conv2d import Int8Conv2d
from pycompress.nn.int8_embedding import Int8Embedding, Int8EmbeddingBag
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
    "Int4Linear",
    "Int8Conv2d",
    "Int8Embedding",
    "Int8EmbeddingBag",
    "Int8Linear",
    "Int8MultiheadAttention",
    "LinearDistillationLoss",
    "LowRankLinear",
    "MaskedLinear",
    "SparseLinear",
    "TopKLogits",
    "TripleLoss",
    "TripleLossParts",
]
