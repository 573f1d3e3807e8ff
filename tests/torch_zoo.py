"""Small PyTorch modules of the kinds that are in use: name to module and inputs. Needs PyTorch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

IMAGE = (1, 3, 32, 32)
KINDS = {}


def kind(*inputs):
    """Enter a function that makes a module."""

    def register(make):
        KINDS[make.__name__] = (make, inputs[0] if len(inputs) == 1 else inputs)
        return make

    return register


def convolution(before, after, size=3, strides=1, groups=1, activation=nn.ReLU):
    layer = nn.Conv2d(before, after, size, strides, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after), activation())


def head(channels):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Residual(nn.Module):
    def __init__(self, before, after, strides=1):
        super().__init__()
        self.first = convolution(before, after, strides=strides)
        self.second = convolution(after, after, activation=nn.Identity)
        same = strides == 1 and before == after
        self.short = nn.Identity() if same else convolution(before, after, 1, strides, activation=nn.Identity)

    def forward(self, x):
        return F.relu(self.second(self.first(x)) + self.short(x))


class Squeeze(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.less, self.more = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.more(F.relu(self.less(self.pool(x)))))


class Inverted(nn.Module):
    def __init__(self, before, wide, after, size, strides, activation):
        super().__init__()
        self.residual = strides == 1 and before == after
        self.body = nn.Sequential(
            convolution(before, wide, 1, activation=activation),
            convolution(wide, wide, size, strides, wide, activation=activation), Squeeze(wide),
            convolution(wide, after, 1, activation=nn.Identity),
        )  # fmt: skip

    def forward(self, x):
        return x + self.body(x) if self.residual else self.body(x)


class Shuffle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.body = nn.Sequential(
            convolution(half, half, 1), convolution(half, half, groups=half, activation=nn.Identity),
            convolution(half, half, 1),
        )  # fmt: skip

    def forward(self, x):
        kept, other = x.chunk(2, 1)
        x = torch.cat([kept, self.body(other)], 1)
        samples, channels, height, width = x.shape
        return x.view(samples, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)


class Growing(nn.Module):
    def __init__(self, before, more):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU(), nn.Conv2d(before, more, 3, 1, 1, bias=False))

    def forward(self, x):
        return torch.cat([x, self.body(x)], 1)


class NextBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 7, 1, 3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.wide, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(0.1 * torch.ones(channels))

    def forward(self, x):
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.narrow(F.gelu(self.wide(y)))).permute(0, 3, 1, 2)


def encoder(width, layers, **options):
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, activation="gelu", **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


@kind(IMAGE)
def resnet():
    return nn.Sequential(
        convolution(3, 16, 3, 2), nn.MaxPool2d(3, 2, 1), Residual(16, 16), Residual(16, 32, 2), head(32)
    )


@kind(IMAGE)
def mobilenet_v3():
    swish = nn.Hardswish
    body = (Inverted(16, 32, 16, 3, 1, swish), Inverted(16, 48, 24, 5, 2, swish))
    return nn.Sequential(convolution(3, 16, 3, 2, activation=swish), *body, head(24))


@kind(IMAGE)
def efficientnet():
    body = (Inverted(16, 32, 16, 3, 1, nn.SiLU), Inverted(16, 48, 24, 5, 2, nn.SiLU))
    return nn.Sequential(convolution(3, 16, 3, 2, activation=nn.SiLU), *body, head(24))


@kind(IMAGE)
def shufflenet():
    return nn.Sequential(convolution(3, 16, 3, 2), Shuffle(16), Shuffle(16), head(16))


@kind(IMAGE)
def densenet():
    return nn.Sequential(convolution(3, 16, 3, 2), Growing(16, 8), Growing(24, 8), nn.AvgPool2d(2), head(32))


@kind(IMAGE)
class unet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.deep = convolution(3, 8), convolution(8, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.joined, self.out = convolution(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.down(x)
        return self.out(self.joined(torch.cat([x, self.up(self.deep(F.max_pool2d(x, 2)))], 1)))


@kind(IMAGE)
class yolo(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (convolution(a, b, 3, 2, activation=nn.SiLU) for a, b in ((3, 16), (16, 32)))
        self.coarse, self.fine = nn.Conv2d(32, 18, 1), nn.Conv2d(48, 18, 1)

    def forward(self, x):
        a = self.first(x)
        b = self.second(a)
        maps = self.coarse(b), self.fine(torch.cat([F.interpolate(b, scale_factor=2, mode="nearest"), a], 1))
        boxes = [m.view(m.shape[0], 3, 6, -1).permute(0, 1, 3, 2).reshape(m.shape[0], -1, 6) for m in maps]
        return torch.cat([box.sigmoid() for box in boxes], 1)


@kind(IMAGE)
class vit(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 17, 32))
        self.body, self.out = encoder(32, 2, norm_first=True), nn.Linear(32, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.out(self.body(x)[:, 0])


@kind(torch.arange(32).reshape(2, 16))
class bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(100, 32), nn.Embedding(16, 32)
        self.body, self.out = encoder(32, 2), nn.Linear(32, 3)

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.out(torch.tanh(self.body(x)[:, 0]))


@kind(IMAGE)
def convnext():
    return nn.Sequential(nn.Conv2d(3, 16, 4, 4), NextBlock(16), NextBlock(16), head(16))


@kind((1, 12, 8))
class lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out = nn.LSTM(8, 16, 2, batch_first=True, bidirectional=True), nn.Linear(32, 4)

    def forward(self, x):
        return self.out(self.body(x)[0][:, -1])


@kind((1, 12, 8))
class gru(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.body(x)[0].mean(1))


@kind((1, 1, 400))
def sound():
    return nn.Sequential(
        nn.Conv1d(1, 16, 9, 4, 4), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 5, 2, 2), nn.GroupNorm(4, 32),
        nn.GELU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 6),
    )  # fmt: skip


@kind(IMAGE)
def autoencoder():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.LeakyReLU(0.1), nn.Conv2d(8, 4, 3, 2, 1), nn.PReLU(4),
        nn.ConvTranspose2d(4, 8, 3, 2, 1, 1), nn.ELU(), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Sigmoid(),
    )  # fmt: skip


@kind(IMAGE, (1, 5))
class two_inputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(convolution(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.numbers, self.out = nn.Linear(5, 8), nn.Linear(16, 3)

    def forward(self, x, y):
        return self.out(torch.cat([self.image(x), F.relu(self.numbers(y))], 1))


@kind(IMAGE)
def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 10), nn.Softmax(1)
    )
