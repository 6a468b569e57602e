"""Base of hierarchical backbones: stages of blocks, the map halved between stages."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmvssm.backbones.base import (
    Backbone,
    check_in_channels,
    checked_indices,
    is_count,
    parse_img_size,
)
from mmvssm.heads import ClassificationHead
from mmvssm.layers import LayerNorm2d, channels_last


class Stage(nn.Module):
    """Blocks of one resolution, and the downsampling after them.

    Returns the map before and the map after downsampling; they are the same
    where ``downsample`` is the identity.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        downsample: nn.Module,
        with_cp: bool = False,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.with_cp = with_cp

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for block in self.blocks:
            if self.with_cp and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x, self.downsample(x)


class HierarchicalBackbone(Backbone):
    """A patch embedding and stages, each with twice the channels of the last.

    Args:
        patch_embed: Makes the layer from the image to the first map (B, dims, H', W').
            It gets the channels of both.
        block: Makes a block. It gets the stage, the channels and the drop path rate.
        downsample: Makes the layer that halves the map. It gets the channels of its
            input and output.
        depths: Number of blocks of each stage.
        dims: Channels of the first stage.
        norm_name: Name of the output norms, before the number of the stage.
        min_size: Height and width of the smallest image, in pixels.
        img_size, in_channels, out_indices, frozen_stages, with_cp, drop_path_rate,
            out_norm, init_cfg, mask_padding: See :class:`VSSM`.
    """

    def __init__(
        self,
        patch_embed: Callable[[int, int], nn.Module],
        block: Callable[[int, int, float], nn.Module],
        downsample: Callable[[int, int], nn.Module],
        *,
        depths: Sequence[int],
        dims: int,
        norm_name: str,
        min_size: int,
        img_size: int | tuple[int, int],
        in_channels: int,
        out_indices: Sequence[int],
        frozen_stages: int,
        with_cp: bool,
        drop_path_rate: float,
        out_norm: bool,
        init_cfg: dict | list[dict] | None,
        mask_padding: bool = False,
    ):
        super().__init__(init_cfg, mask_padding)
        check_in_channels(in_channels)
        # Most families do not use it, but a wrong value is an error for all.
        parse_img_size(img_size, min_size)
        stages = tuple(range(len(depths)))
        self.out_indices = checked_indices(
            out_indices, len(depths), f'increasing stage numbers out of {stages}'
        )
        self.num_stages = self.out_indices[-1] + 1
        if not -1 <= frozen_stages <= self.num_stages:
            raise ValueError(
                f'frozen_stages must be between -1 (nothing) and '
                f'{self.num_stages} (all stages built), got {frozen_stages}'
            )
        self.in_channels = in_channels
        self.frozen_stages = frozen_stages
        self.min_size = min_size
        self.norm_name = norm_name
        self.out_channels = tuple(dims * 2**i for i in self.out_indices)

        self.patch_embed = patch_embed(in_channels, dims)
        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.layers = nn.ModuleList()
        for i in range(self.num_stages):
            channels = dims * 2**i
            blocks = [block(i, channels, next(rates)) for _ in range(depths[i])]
            last = i + 1 == self.num_stages
            halve = nn.Identity() if last else downsample(channels, 2 * channels)
            self.layers.append(Stage(blocks, halve, with_cp))
        for i, channels in zip(self.out_indices, self.out_channels, strict=True):
            norm = LayerNorm2d(channels) if out_norm else nn.Identity()
            self.add_module(f'{norm_name}{i}', norm)
        self.apply(_init_linear)
        self._freeze()

    def compute_maps(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the maps of ``out_indices`` of images that fill the batch.

        Args:
            x: Image (B, in_channels, H, W), any H and W.

        Returns:
            One (B, C, H', W') map for each stage of ``out_indices``, contiguous. Each
            halving rounds the size up. Only the patch embedding of VMamba's v0 drops
            rows and columns that do not fill a patch.
        """
        self.check_images(x)
        x = self.patch_embed(channels_last(x))
        outs = []
        for i, stage in enumerate(self.layers):
            out, x = stage(x)
            if i in self.out_indices:
                # Heads may pass the memory to compiled ops that expect NCHW
                # strides.
                out = getattr(self, f'{self.norm_name}{i}')(out)
                outs.append(out.contiguous())
        return tuple(outs)

    def whole_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The least image size of whole patches in which another one has room.

        Only stems that need a patch at least leave rows and columns out.
        """
        patch = self.min_size
        return tuple(-(-side // patch) * patch for side in size)

    def map_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of each map, of an image of whole patches."""
        return [
            tuple(-(-side // (4 * 2**i)) for side in size) for i in self.out_indices
        ]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay.

        This is the rule of the published classification recipes: 1-d parameters and
        biases have no weight decay; VMamba's ``A_logs``, ``dt_projs_bias`` and
        ``dt_projs_weight`` have it. The published segmentation and detection recipes
        have another rule, ``paramwise_cfg=dict(custom_keys={'norm':
        dict(decay_mult=0.)})``: names that contain ``norm`` have no weight decay.
        """
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim == 1 or name.endswith('.bias')
        }

    def train(self, mode: bool = True) -> 'HierarchicalBackbone':
        """Set the mode of all but the frozen stages."""
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        for module in (self.patch_embed, *self.layers[: self.frozen_stages]):
            module.eval().requires_grad_(False)


def resolve_arch(
    arch: str | dict,
    zoo: dict[str, dict],
    family: str,
    defaults: dict,
    choices: dict[str, Sequence] | None = None,
) -> dict:
    """Turn the name of an arch, or a dict with some of its keys, into all keys.

    Args:
        arch: The user's argument.
        zoo: Archs by name.
        family: Name of the backbone in error messages.
        defaults: Keys that may be left out.
        choices: Allowed values of some keys.

    Raises:
        ValueError: The name or a key is unknown, a key is missing, or a value
            is out of range.
    """
    if isinstance(arch, str):
        if arch not in zoo:
            raise ValueError(
                f"unknown arch '{arch}' of {family}; use one of "
                f'{sorted(zoo)} or a dict with depths and dims'
            )
        return zoo[arch]
    known = next(iter(zoo.values()))
    unknown = sorted(set(arch) - set(known))
    missing = [key for key in known if key not in {**defaults, **arch}]
    if unknown or missing:
        raise ValueError(
            f'arch of {family}: missing keys {missing}, unknown keys {unknown}; '
            f'known are {sorted(known)}'
        )
    arch = {**defaults, **arch}
    depths = arch['depths']
    if not isinstance(depths, Sequence) or not all(is_count(depth) for depth in depths):
        raise ValueError(
            f'arch of {family}: depths is the number of blocks of each stage, such '
            f'as (2, 2, 8, 2), got {depths!r}'
        )
    if not is_count(arch['dims']):
        raise ValueError(
            f'arch of {family}: dims is the number of channels of the first stage, '
            f'doubled from stage to stage, got {arch["dims"]!r}'
        )
    for key, allowed in (choices or {}).items():
        if arch[key] not in allowed:
            raise ValueError(
                f'arch of {family}: {key} must be one of {allowed}, got {arch[key]!r}'
            )
    return arch


def _init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as published; for ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Parts of the records of hierarchical families


def map_head(
    backbone: HierarchicalBackbone, arch: str, num_classes: int, **options: Any
) -> ClassificationHead:
    """The head on the last map."""
    return ClassificationHead(backbone.out_channels[-1], num_classes, **options)


def last_block(backbone: HierarchicalBackbone) -> nn.Module:
    """The last block. Its output is the last map, before the output norm."""
    return backbone.layers[-1].blocks[-1]


def block_depth(name: str) -> tuple[int, ...] | None:
    """Position of a parameter; see ``depth`` of :class:`mmvssm.families.Family`.

    A downsampling layer counts as part of the block that follows it.
    """
    if re.match(r'patch_embed\.|(absolute_)?pos_embed$', name):
        return ()
    match = re.match(r'layers\.(\d+)\.(?:blocks\.(\d+)|(downsample))\.', name)
    if match is None:
        return None
    return (int(match[1]) + 1, 0) if match[3] else (int(match[1]), int(match[2]))


def component(key: str) -> str | None:
    """The part of the backbone that a name belongs to.

    A file has either the whole part or nothing of it. None for output norms, which
    classification files do not have, and for the counters of batch norms, which do not
    matter in eval mode. A position embedding counts as part of the stem: the weights of
    a file that has one are useless without it. It is an option of the published code,
    but no published model uses it, and no model here has it.
    """
    if key.endswith('.num_batches_tracked'):
        return None
    if key in ('pos_embed', 'absolute_pos_embed'):
        return 'patch_embed.'
    match = re.match(r'patch_embed\.|layers\.\d+\.(blocks|downsample)\.', key)
    return match and match[0]


def count_blocks(keys: Iterable[str]) -> tuple[int, ...]:
    """Number of blocks of each stage."""
    depths = {}
    for key in keys:
        match = re.match(r'layers\.(\d{1,6})\.blocks\.(\d{1,6})\.', key)
        if match:
            stage, block = map(int, match.groups())
            depths[stage] = max(depths.get(stage, 0), block + 1)
    return tuple(depths[stage] for stage in sorted(depths))


# What most records of hierarchical families have in common.
RECORD = dict(
    head=map_head,
    classifier_args=dict(out_indices=(3,), out_norm=False),
    depth=block_depth,
    component=component,
    target_layer=last_block,
)
