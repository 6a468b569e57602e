"""From the tokens of an isotropic backbone to class logits.

A backbone built with ``classification=True`` gives the last map and the tokens, both
normalised.
"""

import torch
from mmengine.model import BaseModule
from torch import nn

_POOLINGS = ('concat', 'mean', 'one', 'patches')
_PATCH_POOLINGS = ('mean', 'max')


class ClassTokenHead(BaseModule):
    """A linear layer on the class token, the mean of several, or that of the patches.

    Args:
        in_channels: Channels C of the tokens.
        num_classes: Number of classes K.
        init_cfg: mmengine's initialisation config.
        pooling: What is done without class tokens. ``'mean'``: the mean of the
            patches. ``'max'``: every patch is classified, and each class gets its
            largest logit (arXiv 2401.09417, table 5).

    Raises:
        ValueError: There is no such pooling.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int = 1000,
        init_cfg: dict | list[dict] | None = None,
        pooling: str = 'mean',
    ):
        super().__init__(init_cfg)
        if pooling not in _PATCH_POOLINGS:
            raise ValueError(
                f'pooling must be one of {_PATCH_POOLINGS}, got {pooling!r}'
            )
        self.pooling = pooling
        self.head = _linear(in_channels, num_classes)

    def pre_logits(self, x: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The input of ``head``.

        Args:
            x: Map (B, C, H, W) and class tokens (B, n, C).

        Returns:
            Features (B, C); (B, H * W, C) for the maximum over the patches.
        """
        patches, tokens = x
        if tokens.shape[1]:
            return tokens.mean(1)
        return patches.flatten(2).mT if self.pooling == 'max' else patches.mean((2, 3))

    def forward(self, x: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Map (B, C, H, W) and class tokens (B, n, C) -> logits (B, K)."""
        logits = self.head(self.pre_logits(x))
        return logits.amax(1) if logits.ndim == 3 else logits


class RegisterHead(BaseModule):
    """Classify by the registers of Mamba® (arXiv 2405.14858, section 3.2).

    Args:
        in_channels: Channels C of the registers.
        num_classes: Number of classes K.
        num_registers: n.
        reduce: Each register is projected to C / reduce channels, and then all of them
            together are normalised. With 1 there is neither a projection nor a norm.
        pooling: ``'concat'``, as published: all registers side by side. The ablations
            use ``'mean'`` (of the registers), ``'one'`` (the first register) or
            ``'patches'`` (the mean of the patches), and ignore ``reduce``.
        init_cfg: mmengine's initialisation config.
        widen: Each register is projected to C * widen channels instead, and then
            normalised in the same way. The article has a widened class token, and does
            not say how it was done.

    Raises:
        ValueError: The pooling is unknown or needs registers, ``reduce`` does not
            divide the channels, or ``widen`` is given with it.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int = 1000,
        num_registers: int = 12,
        reduce: int = 1,
        pooling: str = 'concat',
        init_cfg: dict | list[dict] | None = None,
        widen: int = 1,
    ):
        super().__init__(init_cfg)
        if pooling not in _POOLINGS:
            raise ValueError(f'pooling must be one of {_POOLINGS}, got {pooling!r}')
        if num_registers < 1 and pooling != 'patches':
            raise ValueError(
                f"pooling {pooling!r} needs registers; without registers use 'patches'"
            )
        if in_channels % reduce:
            raise ValueError(
                f'reduce must divide the {in_channels} channels, got {reduce}'
            )
        if widen < 1 or (widen > 1 and reduce > 1):
            raise ValueError(
                f'widen is 1 or more, and reduce=1 with it: got widen={widen}, '
                f'reduce={reduce}'
            )
        self.pooling = pooling
        self.neck = None
        features = in_channels
        if pooling == 'concat':
            one = in_channels * widen // reduce
            features = num_registers * one
            if one != in_channels:
                self.neck = _linear(in_channels, one, bias=False)
                self.norm_neck = nn.RMSNorm(features, eps=1e-5)
        self.head = _linear(features, num_classes)

    def pre_logits(self, x: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Map (B, C, H, W) and registers (B, n, C) -> input of ``head``."""
        patches, registers = x
        if self.pooling == 'patches':
            return patches.mean((2, 3))
        if self.pooling == 'mean':
            return registers.mean(1)
        if self.pooling == 'one':
            return registers[:, 0]
        if self.neck is None:
            return registers.flatten(1)
        return self.norm_neck(self.neck(registers).flatten(1))

    def forward(self, x: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Map (B, C, H, W) and registers (B, n, C) -> logits (B, K)."""
        return self.head(self.pre_logits(x))


def _linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
