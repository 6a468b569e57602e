"""MLLA, also MILA: Mamba-inspired linear attention (NeurIPS 2024, arXiv 2405.16605).

A hierarchical backbone of four stages at strides 4, 8, 16 and 32. Its block is Mamba's
block, with linear attention instead of the scan and position encodings instead of the
forget gate. The names of parameters are those of the published code.

All maps are (B, C, H, W) in channels-last memory. So norms, linear layers and the
attention need no copy.
"""

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmvssm.backbones.base import describe_arch, with_pretrained
from mmvssm.backbones.hierarchical import (
    RECORD,
    HierarchicalBackbone,
    count_blocks,
    resolve_arch,
)
from mmvssm.families import Family, register_family
from mmvssm.layers import MLLABlock
from mmvssm.ops.typed import is_tracing
from mmvssm.registry import MODELS

_DEFAULTS = dict(mlp_ratio=4.0, drop_path_rate=0.2)
ARCH_ZOO = {
    't': dict(
        _DEFAULTS,
        depths=(2, 4, 8, 4),
        dims=64,
        num_heads=(2, 4, 8, 16),
        drop_path_rate=0.2,
    ),
    's': dict(
        _DEFAULTS,
        depths=(3, 6, 21, 6),
        dims=64,
        num_heads=(2, 4, 8, 16),
        drop_path_rate=0.3,
    ),
    'b': dict(
        _DEFAULTS,
        depths=(3, 6, 21, 6),
        dims=96,
        num_heads=(3, 6, 12, 24),
        drop_path_rate=0.5,
    ),
}


class ConvNormAct(nn.Module):
    """A convolution, optionally followed by batch norm and ReLU.

    The output has the size of the input divided by the stride, rounded up.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, bias: Arguments of the
            convolution; the kernel size is odd.
        norm: Whether a batch norm follows.
        act: Whether a ReLU follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        act: bool = True,
    ):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=bias,
        )
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


class Stem(nn.Module):
    """Convolutions from an image to a map of a quarter of its height and width.

    Images are padded with zeros at the bottom and right, to whole patches of 4x4.

    Args:
        in_channels: Channels of the image.
        channels: Channels C of the map.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = ConvNormAct(in_channels, half, stride=2)
        self.conv2 = nn.Sequential(
            ConvNormAct(half, half), ConvNormAct(half, half, act=False)
        )
        self.conv3 = nn.Sequential(
            ConvNormAct(half, 4 * channels, stride=2),
            ConvNormAct(4 * channels, channels, 1, act=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(_pad_to_multiple(x, 4))
        return self.conv3(x + self.conv2(x))


class Downsample(nn.Module):
    """Halve a map by an inverted bottleneck.

    Maps of odd size get a row or a column of zeros at the bottom or right, before the
    first layer. With its bias these places become nonzero.

    Args:
        channels, out_channels: Channels of the input and output maps.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        hidden = 4 * out_channels
        self.conv = nn.Sequential(
            ConvNormAct(channels, hidden, 1, bias=True, norm=False),
            ConvNormAct(hidden, hidden, stride=2, groups=hidden, bias=True, norm=False),
            ConvNormAct(hidden, out_channels, 1, bias=True, act=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(_pad_to_multiple(x, 2))


def _pad_to_multiple(x: torch.Tensor, side: int) -> torch.Tensor:
    # Rounds up without remainders, which slow down compilation for all sizes.
    more = [-(-size // side) * side - size for size in x.shape[2:]]
    # A graph with a test for padding would be valid for some sizes only.
    traced = torch.compiler.is_compiling() or is_tracing()
    if not traced and not any(more):
        return x
    return F.pad(x, (0, more[1], 0, more[0]))


@MODELS.register_module()
class MLLA(HierarchicalBackbone):
    """MLLA (MILA) backbone.

    Its batch norms are ``nn.BatchNorm2d``. For training on many devices with few images
    each, convert them with mmengine's ``sync_bn='torch'`` in the config, or with
    ``nn.SyncBatchNorm.convert_sync_batchnorm``.

    Args:
        arch: A name of ``ARCH_ZOO``: ``t``, ``s``, ``b``. Or a dict with

            - ``depths`` (sequence of int): Blocks of each stage.
            - ``dims`` (int): Channels of the first stage, doubled from stage
              to stage; a multiple of 4.
            - ``num_heads`` (sequence of int): Heads of each stage.

            and, optionally, ``mlp_ratio`` (4.) and ``drop_path_rate`` (.2).
        img_size: Has no effect, but is accepted as in all backbones here. Positions are
            encoded for each map. Images may have any size.
        in_channels: Channels of the image.
        out_indices: Stages whose maps are returned. Later stages are not built, so
            every parameter gets a gradient.
        frozen_stages: -1 freezes nothing, 0 the stem, i >= 1 also the first i
            stages with their downsampling. Frozen parts get no gradient and
            stay in eval mode, batch norms included. Output norms are never
            frozen: classification checkpoints do not have them.
        with_cp: Recompute each block in the backward pass to save memory.
        drop_path_rate: Rate of the last block, growing linearly from 0 at the
            first; None for the published value of the arch.
        out_norm: Whether each returned map has a norm of its own, ``norm{i}``.
            False for a classifier with a norm of its own.
        init_cfg: mmengine's initialisation config. ``dict(type='Pretrained',
            checkpoint=...)`` loads published files without conversion, by
            :func:`mmvssm.load_checkpoint`, and logs what matched.
        pretrained: The older way to say so: the ``checkpoint`` alone.
        mask_padding: For batches of images of several sizes, padded at the bottom
            and right: compute the maps of each image as if it were alone, and set
            them to zero beyond it. The images of each size run on their own,
            batch norms in training included, whose running statistics then move
            once for each size. It needs the sizes: see :meth:`forward` and
            docs/detection.md.

    Attributes:
        out_channels: Channels of each returned map.

    Raises:
        ValueError: An argument is out of range, or the image has another
            number of channels.
    """

    def __init__(
        self,
        arch: str | dict = 't',
        *,
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_path_rate: float | None = None,
        out_norm: bool = True,
        init_cfg: dict | list[dict] | None = None,
        pretrained: str | None = None,
        mask_padding: bool = False,
    ):
        arch = resolve_arch(arch, ARCH_ZOO, 'MLLA', _DEFAULTS)
        dims, heads = arch['dims'], arch['num_heads']
        if dims < 4 or dims % 4:
            raise ValueError(
                f'arch of MLLA: dims must be a multiple of 4, because rows and columns '
                f'rotate pairs of channels; got {dims}'
            )
        if not isinstance(heads, Sequence) or len(heads) != len(arch['depths']):
            raise ValueError(
                f'arch of MLLA: num_heads is the number of heads of each of the '
                f'{len(arch["depths"])} stages, got {heads!r}'
            )
        if drop_path_rate is None:
            drop_path_rate = arch['drop_path_rate']

        def block(stage: int, channels: int, drop_path: float) -> MLLABlock:
            return MLLABlock(channels, heads[stage], arch['mlp_ratio'], drop_path)

        super().__init__(
            Stem,
            block,
            Downsample,
            depths=arch['depths'],
            dims=dims,
            norm_name='norm',
            min_size=1,
            img_size=img_size,
            in_channels=in_channels,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            drop_path_rate=drop_path_rate,
            out_norm=out_norm,
            init_cfg=with_pretrained(init_cfg, pretrained),
            mask_padding=mask_padding,
        )


_HEAD = re.compile(r'(norm|head)\.')
_ROTARY_TABLE = re.compile(r'layers\.\d+\.blocks\.\d+\.attn\.rope\.rotations')


def _rename(key: str) -> str:
    """Turn a published name (without prefix) into our own name."""
    return f'classifier.{key}' if _HEAD.match(key) else key


def _fit(
    state: Mapping[str, torch.Tensor],
    backbone: MLLA,
    grids: Mapping[str, tuple[int, int]],
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Leave out the rotary tables of a file.

    They belong to the image size of its training. Models here compute these tables for
    each map.
    """
    kept = {key: x for key, x in state.items() if not _ROTARY_TABLE.fullmatch(key)}
    left = len(state) - len(kept)
    note = f'{left} rotary tables were left out: the model makes its own'
    return kept, [note] if left else []


def _describe(state: Mapping[str, torch.Tensor]) -> str:
    """Name of the model that has these names and shapes."""
    try:
        dims = state['layers.0.blocks.0.norm1.weight'].numel()
        hidden = state['layers.0.blocks.0.mlp.fc1.bias'].numel()
    except KeyError:
        return 'an incomplete MLLA'
    found = dict(depths=count_blocks(state), dims=dims, mlp_ratio=hidden / dims)
    return describe_arch(found, ARCH_ZOO, 'mlla', 'MLLA')


FAMILY = register_family(
    Family(
        name='mlla',
        title='MLLA',
        backbone=MLLA,
        archs=ARCH_ZOO,
        signature=r'layers\.\d+\.blocks\.\d+\.attn\.qk\.weight',
        describe=_describe,
        **RECORD,
        rename=_rename,
        fit=_fit,
    )
)
