"""From the last feature map to class logits."""

import torch
from mmengine.model import BaseModule
from torch import nn

from mmvssm.layers import LayerNorm2d


class ClassificationHead(BaseModule):
    """Layer norm, mean over the map, linear layer.

    Args:
        in_channels: Channels C of the map.
        num_classes: Number of classes K.
        init_cfg: mmengine's initialisation config.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int = 1000,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        self.norm = LayerNorm2d(in_channels)
        self.head = nn.Linear(in_channels, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def pre_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) -> pooled, normalised features (B, C)."""
        return self.norm(x).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) -> logits (B, K)."""
        return self.head(self.pre_logits(x))


class ImageClassifier(BaseModule):
    """A backbone and a head on its last map.

    Args:
        backbone: Image -> tuple of maps.
        classifier: Map -> logits.
        init_cfg: mmengine's initialisation config.

    Raises:
        ValueError: The backbone masks padding, which heads would count as image.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classifier: nn.Module,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        if getattr(backbone, 'mask_padding', False):
            raise ValueError(
                'a classifier takes images of one size, and its head would average '
                'over masked positions: build the backbone with mask_padding=False'
            )
        self.backbone = backbone
        self.classifier = classifier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image (B, 3, H, W) -> logits (B, K)."""
        return self.classifier(self.backbone(x)[-1])
