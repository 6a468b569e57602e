"""Whole classifiers that ours are compared with.

Swin is mmseg's. ConvNeXt and DeiT are plain torch, with the layers, the sizes and the
order of operations of the published code.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Arguments of mmseg's Swin that differ from its defaults.
MMSEG = {'swin_t': dict(depths=(2, 2, 6, 2)), 'swin_s': dict(depths=(2, 2, 18, 2))}


class Pooled(nn.Module):
    """A classifier of the mean of a backbone's last map."""

    def __init__(self, backbone: nn.Module, channels: int, classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[-1].mean((2, 3)))


class _Swin(Pooled):
    """mmseg's Swin makes the masks of its windows in torch's default dtype."""

    def forward(self, images: Tensor) -> Tensor:
        before = torch.get_default_dtype()
        if images.dtype == before:
            return super().forward(images)
        torch.set_default_dtype(images.dtype)
        try:
            return super().forward(images)
        finally:
            torch.set_default_dtype(before)


def swin(name: str, classes: int, **kwargs) -> nn.Module:
    """Swin by a name in ``MMSEG``.

    Raises:
        ImportError: mmseg is not installed.
    """
    from mmseg.models.backbones import SwinTransformer

    backbone = SwinTransformer(out_indices=(3,), **MMSEG[name], **kwargs)
    return _Swin(backbone, 768, classes)


class _MapNorm(nn.LayerNorm):
    """Layer norm of the channels of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, 4 * channels)
        self.shrink = nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.shrink(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """ConvNeXt (https://arxiv.org/abs/2201.03545), by default its size T.

    Its maps are channels-last in memory, where its norms and linear layers need no
    copies.
    """

    def __init__(
        self,
        classes: int,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for stage, (depth, channels) in enumerate(zip(depths, dims)):
            if stage:
                layers.append(_MapNorm(dims[stage - 1], eps=1e-6))
                layers.append(nn.Conv2d(dims[stage - 1], channels, 2, stride=2))
            else:
                layers.append(nn.Conv2d(3, channels, 4, stride=4))
                layers.append(_MapNorm(channels, eps=1e-6))
            layers += [_ConvNeXtBlock(channels) for _ in range(depth)]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layers(images.contiguous(memory_format=torch.channels_last))
        return self.head(self.norm(maps.mean((2, 3))))


class _Attention(nn.Module):
    def __init__(self, channels: int, heads: int, fused: bool):
        super().__init__()
        self.heads = heads
        self.fused = fused
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind()
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            mixed = weights.softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))


class _TransformerBlock(nn.Module):
    def __init__(self, channels: int, heads: int, fused: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attention = _Attention(channels, heads, fused)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DeiT(nn.Module):
    """DeiT (https://arxiv.org/abs/2012.12877), by default its size S.

    Its attention is torch's ``scaled_dot_product_attention``; or, without ``fused``,
    that of the published code, which makes the matrix of all pairs of positions.
    """

    def __init__(
        self,
        classes: int,
        size: tuple[int, int] = (224, 224),
        channels: int = 384,
        depth: int = 12,
        heads: int = 6,
        patch: int = 16,
        fused: bool = True,
    ):
        super().__init__()
        positions = (size[0] // patch) * (size[1] // patch)
        self.patches = nn.Conv2d(3, channels, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, channels))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + positions, channels))
        self.blocks = nn.Sequential(
            *(_TransformerBlock(channels, heads, fused) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.positions
        return self.head(self.norm(self.blocks(x)[:, 0]))
