"""What the tests of MaskedLinear share."""

import io

import torch
from torch import nn

from pycompress.nn import MaskedLinear

K, N = 24, 10


def random_mask(n=N, k=K, seed=1):
    return torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) > 0.6


def pair(gradient="masked", dtype=torch.float32):
    """A MaskedLinear, and its float weight times mask and bias."""
    linear = nn.Linear(K, N).to(dtype)
    mask = random_mask()
    dense = linear.weight.detach().clone()
    return MaskedLinear.from_linear(linear, mask, gradient), dense, mask


def saved(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
