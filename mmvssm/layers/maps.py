"""Layers on feature maps (B, C, H, W) that work on the channels only.

They read and write channels-last memory (the strides of NHWC), for which the
permutations below move no data. Maps with other strides give the same numbers, but are
copied.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mmvssm.layers.linear import Linear
from mmvssm.registry import MODELS


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """A map (B, C, H, W) in channels-last memory, copied if it has other strides.

    Like ``x.contiguous(memory_format=torch.channels_last)``, which does not work under
    ``torch.func.vmap``.
    """
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@MODELS.register_module()
class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of a (B, C, H, W) map.

    With ``norm_cfg=dict(type='mmvssm.LayerNorm2d')`` it works in OpenMMLab's
    convolution modules, too.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Linear2d(Linear):
    """A 1x1 convolution of a (B, C, H, W) map with the parameters of a linear.

    ``weight`` is 2-d (C_out, C_in). The 4-d weight (C_out, C_in, 1, 1) of a
    convolution is accepted by ``load_state_dict``.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + 'weight')
        if weight is not None and weight.shape[2:] == (1, 1):
            state_dict[prefix + 'weight'] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Mlp2d(nn.Module):
    """Two linear layers with a GELU between them, on a (B, C, H, W) map.

    Args:
        channels: C of input and output.
        hidden_channels: Channels between the two layers.
    """

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        self.fc1 = Linear2d(channels, hidden_channels)
        self.act = nn.GELU()
        self.fc2 = Linear2d(hidden_channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PatchMerging2d(nn.Module):
    """Concatenate 2x2 neighbours, normalise, project 4C -> ``out_channels``.

    Maps of odd size get a row or a column of zeros at the bottom or right.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm = LayerNorm2d(4 * channels)
        self.reduction = Linear2d(4 * channels, out_channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[2:]
        x = F.pad(x, (0, w % 2, 0, h % 2))
        # The row offset varies first, as in Swin.
        x = torch.cat(
            [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=1
        )
        return self.reduction(self.norm(x))
