"""Modules that random networks are put together from, written as users write them: attributes, literals, shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Scale(nn.Module):
    """A layer scale over dimension `dim` of a tensor of rank `rank`."""

    def __init__(self, size, dim, rank):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones([size if axis == dim else 1 for axis in range(rank)]))

    def forward(self, x):
        return x * self.gamma


class SqueezeExcite(nn.Module):
    def __init__(self, channels, hidden, linear=False):
        super().__init__()
        self.linear = linear
        self.reduce = nn.Linear(channels, hidden) if linear else nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Linear(hidden, channels) if linear else nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        if self.linear:
            y = self.expand(F.relu(self.reduce(x.mean((2, 3)))))
            return x * torch.sigmoid(y).view(x.size(0), -1, 1, 1)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class SpatialGate(nn.Module):
    """CBAM's: one weight a pixel, from the mean and the largest of all channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x):
        stacked = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(stacked))


class PixelGate(nn.Module):
    """One weight a pixel, from a convolution over all channels."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1)

    def forward(self, x):
        return x * self.conv(x).sigmoid()


class LayerNorm2d(nn.LayerNorm):
    """ConvNeXt's: over the channels of [N, C, H, W]."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class WrittenNorm2d(nn.Module):
    """The same, written out."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class RMSNorm(nn.Module):
    """Over the last dimension, written out."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class ResponseNorm(nn.Module):
    """ConvNeXt V2's global response normalisation of [N, C, H, W]."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        size = x.pow(2).sum((2, 3), keepdim=True).add(1e-6).sqrt()
        return x + self.gamma * (x * (size / (size.mean(1, keepdim=True) + 1e-6))) + self.beta


class ChannelShuffle(nn.Module):
    """ShuffleNet's, written out; with `channels`, their number is an attribute, else it comes from the shape."""

    def __init__(self, groups, channels=None):
        super().__init__()
        self.groups, self.channels = groups, channels

    def forward(self, x):
        n, c, h, w = x.shape
        if self.channels is None:
            return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        x = x.reshape(n, self.groups, self.channels // self.groups, h, w).permute(0, 2, 1, 3, 4)
        return x.reshape(n, self.channels, h, w)


class Attention(nn.Module):
    """timm's: one linear layer for q, k and v, heads and their width as attributes."""

    def __init__(self, width, num_heads, fused=True, head_dim=None):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim or width // num_heads
        self.attn_dim = self.num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.fused_attn = fused
        self.qkv = nn.Linear(width, self.attn_dim * 3)
        self.proj = nn.Linear(self.attn_dim, width)

    def forward(self, x):
        n, t, _ = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            attention = (q * self.scale) @ k.transpose(-2, -1)
            x = attention.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(n, t, self.attn_dim))


class PlainAttention(nn.Module):
    """q, k and v apart; the heads by view or chunk, sizes from the shapes; `scaled` by the width that it finds."""

    def __init__(self, width, heads, scaled=True, separate=True):
        super().__init__()
        self.heads, self.scaled, self.separate = heads, scaled, separate
        if separate:
            self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        else:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        n, t, _ = x.shape
        parts = (self.q(x), self.k(x), self.v(x)) if self.separate else self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.view(n, t, self.heads, -1).transpose(1, 2) for part in parts)
        weights = torch.matmul(q, k.transpose(2, 3))
        if self.scaled:
            weights = weights / q.shape[-1] ** 0.5
        y = torch.matmul(F.softmax(weights, -1), v)
        return self.out(y.transpose(1, 2).flatten(2))


class ConvAttention(nn.Module):
    """Attention of pixels over 1x1 convolutions, by einsum."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        n, _, h, w = x.shape
        q, k, v = self.qkv(x).reshape(n, 3, self.heads, -1, h * w).unbind(1)
        weights = torch.einsum("nhdi,nhdj->nhij", q, k).softmax(-1)
        y = torch.einsum("nhij,nhdj->nhdi", weights, v)
        return self.out(y.reshape(n, -1, h, w))


class LinearAttention(nn.Module):
    """ReLU attention: keys times values first, so that widths inside a head meet."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.relu(q) @ (F.relu(k).transpose(-2, -1) @ v) / t
        return self.out(y.transpose(1, 2).reshape(n, t, c))


class WindowAttention(nn.Module):
    """Swin's, on [N, C, H, W] with H and W multiples of `window`: roll, partition, attend, reverse, roll back."""

    def __init__(self, channels, heads, window=2, shift=0):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm = nn.LayerNorm(channels)
        self.attn = Attention(channels, heads)

    def forward(self, x):
        n, c, h, w = x.shape
        s = self.window
        y = self.norm(x.permute(0, 2, 3, 1))
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = y.view(n, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        y = self.attn(y).view(n, h // s, w // s, s, s, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        return x + y.permute(0, 3, 1, 2)


class ConvAct(nn.Sequential):
    def __init__(self, inputs, outputs, kernel=3, stride=1, groups=1, act=nn.ReLU):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            act(),
        )


class BasicBlock(nn.Module):
    """ResNet's; `pre` puts the norms first."""

    def __init__(self, channels, hidden, pre=False):
        super().__init__()
        self.pre = pre
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels if pre else hidden)
        self.bn2 = nn.BatchNorm2d(hidden if pre else channels)

    def forward(self, x):
        if self.pre:
            return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class OptionA(nn.Module):
    """ResNet's block with a shortcut of zeros: every second pixel, new channels on both sides."""

    def __init__(self, channels, more, how="attribute"):
        super().__init__()
        self.conv = ConvAct(channels, channels + 2 * more, stride=2)
        self.more, self.how = more, how

    def forward(self, x):
        y = self.conv(x)
        if self.how == "shape":
            return y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more))


class Inverted(nn.Module):
    """MobileNetV2's block, with an SE by choice."""

    def __init__(self, channels, hidden, excite=False):
        super().__init__()
        self.expand = ConvAct(channels, hidden, 1, act=nn.ReLU6)
        self.depth = ConvAct(hidden, hidden, groups=hidden, act=nn.Hardswish)
        self.se = SqueezeExcite(hidden, 2) if excite else nn.Identity()
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        return x + self.project(self.se(self.depth(self.expand(x))))


class ConvNeXt(nn.Module):
    def __init__(self, channels, hidden, last=True):
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.last = last
        self.norm = nn.LayerNorm(channels) if last else LayerNorm2d(channels)
        self.up = nn.Linear(channels, hidden) if last else nn.Conv2d(channels, hidden, 1)
        self.down = nn.Linear(hidden, channels) if last else nn.Conv2d(hidden, channels, 1)
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        y = self.depth(x)
        if self.last:
            y = y.permute(0, 2, 3, 1)
            return x + (self.gamma * self.down(F.gelu(self.up(self.norm(y))))).permute(0, 3, 1, 2)
        return x + self.gamma.reshape(1, -1, 1, 1) * self.down(F.gelu(self.up(self.norm(y))))


class Dense(nn.Module):
    """DenseNet's block of two layers."""

    def __init__(self, channels, growth):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels + i * growth) for i in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels + i * growth, growth, 3, padding=1) for i in range(2))

    def forward(self, x):
        features = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return torch.cat(features, 1)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's: half of the channels go round the layers, then both halves are shuffled."""

    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            ConvAct(half, half, 1), nn.Conv2d(half, half, 3, padding=1, groups=half), nn.BatchNorm2d(half)
        )
        self.shuffle = ChannelShuffle(2)

    def forward(self, x):
        first, second = x.chunk(2, dim=1)
        return self.shuffle(torch.cat((first, self.branch(second)), dim=1))


class Ghost(nn.Module):
    """GhostNet's module: cheap copies of the channels, cut to the number wanted."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.out_chs = outputs
        half = (outputs + 1) // 2
        self.primary, self.cheap = ConvAct(inputs, half, 1), ConvAct(half, half, groups=half)

    def forward(self, x):
        x1 = self.primary(x)
        return torch.cat([x1, self.cheap(x1)], dim=1)[:, : self.out_chs, :, :]


class SplitStage(nn.Module):
    """YOLO's C2f: split, layers on one half, all concatenated."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.c = hidden
        self.cv1, self.m = ConvAct(channels, 2 * hidden, 1), ConvAct(hidden, hidden)
        self.cv2 = ConvAct(3 * hidden, channels, 1)

    def forward(self, x):
        y = list(self.cv1(x).split((self.c, self.c), 1))
        y.append(self.m(y[-1]))
        return self.cv2(torch.cat(y, 1))


class Mlp(nn.Module):
    """A transformer's, with its norm and skip; `gated` multiplies two halves."""

    def __init__(self, width, hidden, gated=False):
        super().__init__()
        self.norm, self.gated = nn.LayerNorm(width), gated
        self.up, self.down = nn.Linear(width, hidden * (2 if gated else 1)), nn.Linear(hidden, width)

    def forward(self, x):
        y = self.up(self.norm(x))
        if self.gated:
            value, gate = y.chunk(2, dim=-1)
            return x + self.down(value * F.silu(gate))
        return x + self.down(F.gelu(y))


class Encoder(nn.Module):
    """A transformer's layer."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(width), Attention(width, heads), Mlp(width, hidden)

    def forward(self, x):
        return self.mlp(x + self.attn(self.norm(x)))


class MixerLayer(nn.Module):
    """MLP-Mixer's: a layer over tokens, then one over channels."""

    def __init__(self, tokens, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(tokens, hidden), nn.Linear(hidden, tokens)
        self.mlp = Mlp(width, hidden)

    def forward(self, x):
        y = self.norm(x).transpose(1, 2)
        return self.mlp(x + self.down(F.gelu(self.up(y))).transpose(1, 2))


class SelectiveKernel(nn.Module):
    """SKNet's: two paths, stacked, weighted by a softmax over the paths."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.paths = nn.ModuleList([ConvAct(channels, channels), ConvAct(channels, channels, 1)])
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, 2 * channels, 1)

    def forward(self, x):
        y = torch.stack([path(x) for path in self.paths], dim=1)
        weights = self.up(F.relu(self.down(y.sum(1).mean((2, 3), keepdim=True))))
        n, c, h, w = weights.shape
        return (y * weights.view(n, 2, c // 2, h, w).softmax(dim=1)).sum(dim=1)


class Embedding(nn.Module):
    """Pixels ▶ tokens with a class token and learned positions."""

    def __init__(self, channels, width, tokens):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + 1, width))

    def forward(self, x):
        x = self.proj(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed


def written_to(x, part, value):
    """A copy of `x` with a slice of its channels overwritten in place."""
    x = x.clone()
    x[:, part] = value
    return x
