"""Small models with all the layers that quantize_ replaces, for its tests and those of files."""

import torch
from torch import nn


class BasicBlock(nn.Module):
    """As torchvision's: one ReLU used twice, and a convolution on the way around where the shape changes."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """With a ReLU of its own behind each norm."""

    def __init__(self, inputs, inner):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(inner, inner, 3, 1, 1), nn.BatchNorm2d(inner), nn.SiLU()
        self.conv3, self.bn3 = nn.Conv2d(inner, inputs, 1, bias=False), nn.BatchNorm2d(inputs)

    def forward(self, x):
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + x)


class ResNet(nn.Module):
    """forward calls a second method, as torchvision's does."""

    def __init__(self, classes=5):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(32, 32), BasicBlock(32, 32))
        self.layer2 = nn.Sequential(BasicBlock(32, 64, 2), Bottleneck(64, 32))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(64, classes)

    def _forward_impl(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.pool(x), 1))

    def forward(self, x):
        return self._forward_impl(x)


def resnet():
    """In eval mode, with running statistics and affine parameters that matter."""
    model = ResNet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
    model.train()
    with torch.no_grad():
        for _ in range(8):
            model(torch.randn(8, 3, 16, 16))
    return model.eval()


class EncoderBlock(nn.Module):
    """As torchvision's vision transformer: pre-norm, attention by keyword."""

    def __init__(self, dim, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention = nn.MultiheadAttention(dim, heads, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        y = self.ln_1(x)
        y, _ = self.self_attention(query=y, key=y, value=y, need_weights=False)
        x = x + y
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    def __init__(self, dim=32, heads=4, classes=5):
        super().__init__()
        self.conv_proj = nn.Conv2d(3, dim, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embedding = nn.Parameter(0.1 * torch.randn(1, 17, dim))
        self.layers = nn.Sequential(EncoderBlock(dim, heads), EncoderBlock(dim, heads))
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        tokens = self.conv_proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(len(x), -1, -1), tokens), 1) + self.pos_embedding
        return self.head(self.layers(tokens)[:, 0])


class LSTMClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16, padding_idx=0)
        self.lstm = nn.LSTM(16, 12, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(24, 4)

    def forward(self, ids):
        return self.fc(self.lstm(self.embedding(ids))[0][:, -1])


class BagClassifier(nn.Module):
    """As in torch's text classification tutorial."""

    def __init__(self, mode="mean"):
        super().__init__()
        self.embedding = nn.EmbeddingBag(60, 16, mode=mode)
        self.fc = nn.Linear(16, 4)

    def forward(self, text, offsets):
        return self.fc(self.embedding(text, offsets))


class TiedLanguageModel(nn.Module):
    """The head has the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(40, 16), nn.Embedding(10, 16)
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(torch.relu(self.body(x)))


def transformer(batch_first=True, **kwargs):
    return nn.Transformer(32, 4, 2, 2, 48, 0.1, batch_first=batch_first, **kwargs).eval()
