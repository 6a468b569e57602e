"""From linear attention to Mamba in six switches (arXiv 2405.16605, section 5).

The macro architecture is the baseline of the paper: Swin-T with linear attention
instead of window attention. Each difference between it and Mamba has its own switch. So
have the position encodings that the paper uses instead of the forget gate.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from mmvssm.backbones.base import (
    describe_arch,
    fit_grid,
    note_grid,
    parse_img_size,
    with_pretrained,
)
from mmvssm.backbones.hierarchical import (
    RECORD,
    HierarchicalBackbone,
    count_blocks,
    resolve_arch,
)
from mmvssm.families import Family, register_family
from mmvssm.layers import (
    DepthwiseConv2d,
    DropPath,
    LayerNorm2d,
    Linear2d,
    Mlp2d,
    PatchMerging2d,
    resize_position,
)
from mmvssm.layers.unified_attention import StepSize2d, UnifiedAttention2d
from mmvssm.registry import MODELS

_DEFAULTS = dict(head_dim=32, mlp_ratio=4.0, drop_path_rate=0.2)
ARCH_ZOO = {
    # Swin-T, and a small arch that trains in minutes on a CPU.
    't': dict(_DEFAULTS, depths=(2, 2, 6, 2), dims=96),
    'small': dict(
        depths=(1, 1, 2, 1), dims=32, head_dim=16, mlp_ratio=4.0, drop_path_rate=0.0
    ),
}
DESIGNS = ('transformer', 'all', 'sub')
POSITIONS = ('ape', 'lepe', 'cpe', 'rope')


class AttentionMixer(nn.Module):
    """Attention with a projection for the values and one for the output.

    Args:
        channels: C of the map.
        heads, head_dim, **attention: See :class:`UnifiedAttention2d`.
    """

    def __init__(self, channels: int, heads: int, head_dim: int, **attention):
        super().__init__()
        self.attention = UnifiedAttention2d(
            channels, heads, head_dim, project_values=True, **attention
        )
        self.proj = Linear2d(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.attention(x))


class GatedMixer(nn.Module):
    """The block of Mamba with attention instead of the scan.

    A first projection of the input goes through a depthwise convolution, SiLU and the
    attention, which uses it as values. The result is multiplied by SiLU of a second
    projection, and projected back.

    Args:
        channels: C of the map.
        heads, head_dim, **attention: See :class:`UnifiedAttention2d`.
        expand: Channels inside, relative to C (Mamba's E). The values have that many
            times C channels. Heads, queries and keys are those without expansion.
    """

    def __init__(
        self, channels: int, heads: int, head_dim: int, expand: int = 1, **attention
    ):
        super().__init__()
        inner = expand * channels
        self.in_proj = Linear2d(channels, inner)
        self.gate_proj = Linear2d(channels, inner)
        self.conv = DepthwiseConv2d(inner)
        self.attention = UnifiedAttention2d(inner, heads, head_dim, **attention)
        self.out_proj = Linear2d(inner, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attention(F.silu(self.conv(self.in_proj(x))))
        return self.out_proj(y * F.silu(self.gate_proj(x)))


class StudyBlock(nn.Module):
    """A mixer and (unless the design is ``'all'``) an MLP, each with a shortcut.

    Args:
        channels: C of the maps.
        drop_path: Probability that a branch of a sample is dropped.
        head_dim: Channels of a query and a key in each head.
        single_head: One head of queries and keys instead of C / head_dim.
        design: See :class:`LinearAttentionStudy`.
        mlp_ratio: Hidden channels of the MLP relative to C.
        grid: Height and width for which an absolute position embedding is stored; None
            for no such embedding.
        cpe: Add a depthwise convolution before the mixer and before the MLP.
        **attention: See :class:`UnifiedAttention2d`.
    """

    def __init__(
        self,
        channels: int,
        drop_path: float = 0.0,
        *,
        head_dim: int = 32,
        single_head: bool = False,
        design: str = 'transformer',
        mlp_ratio: float = 4.0,
        grid: tuple[int, int] | None = None,
        cpe: bool = False,
        **attention,
    ):
        super().__init__()
        if channels % head_dim:
            raise ValueError(
                f'head_dim {head_dim} does not divide the {channels} channels of a '
                f'stage'
            )
        heads = 1 if single_head else channels // head_dim
        self.grid = grid
        if grid is not None:
            self.pos_embed = nn.Parameter(torch.empty(1, math.prod(grid), channels))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
            note_grid(self)
        self.cpe1 = DepthwiseConv2d(channels) if cpe else None
        self.norm1 = LayerNorm2d(channels)
        if design == 'transformer':
            self.mixer = AttentionMixer(channels, heads, head_dim, **attention)
        else:
            expand = 2 if design == 'all' else 1
            self.mixer = GatedMixer(channels, heads, head_dim, expand, **attention)
        self.drop_path = DropPath(drop_path)
        self.mlp = None
        if design != 'all':
            self.cpe2 = DepthwiseConv2d(channels) if cpe else None
            self.norm2 = LayerNorm2d(channels)
            self.mlp = Mlp2d(channels, int(mlp_ratio * channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grid is not None:
            position = resize_position(self.pos_embed, self.grid, tuple(x.shape[2:]))
            x = x + position.mT.unflatten(2, x.shape[2:])
        x = x if self.cpe1 is None else x + self.cpe1(x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        if self.mlp is not None:
            x = x if self.cpe2 is None else x + self.cpe2(x)
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


@MODELS.register_module()
class LinearAttentionStudy(HierarchicalBackbone):
    """Linear attention with any of the differences between it and Mamba.

    The defaults are the baseline of the paper, Swin-T with linear attention. For the
    core of Mamba's block, the selective scan, set ``input_gate``, ``forget_gate``,
    ``shortcut`` and ``single_head`` to True, and ``normalise`` and ``feature_map`` to
    False. With ``design='all'`` the rest of the block is Mamba's, too.

    Args:
        arch: ``'t'`` or ``'small'``, or a dict with

            - ``depths`` (sequence of int): Blocks of each stage.
            - ``dims`` (int): Channels of the first stage, doubled from stage
              to stage.

            and, optionally, ``head_dim`` (32; also the number of states of
            the recurrence), ``mlp_ratio`` (4.) and ``drop_path_rate`` (.2).
        input_gate: Multiply values by a step size that depends on them.
        forget_gate: Attend by a recurrence with a decaying state, to the earlier
            positions in row-major order.
        shortcut: Add the values, with one weight for each channel, to the output.
        normalise: Make the weights of the values sum up to 1.
        single_head: One group of queries and keys, of ``head_dim`` channels.
        design: ``'transformer'``: attention and MLP. ``'all'``: the block of Mamba with
            expansion 2 instead of both. ``'sub'``: the block of Mamba with expansion 1
            instead of the attention, as in MLLA.
        position: Any of ``'ape'`` (a learned embedding added to the input of
            every block), ``'lepe'`` (a depthwise convolution of the values),
            ``'cpe'`` (of the input of attention and MLP) and ``'rope'``.
        feature_map: Take elu + 1 of queries and keys. It can only be False with
            ``forget_gate`` and without ``normalise``.
        img_size: Height and width, or one number for both, for which absolute position
            embeddings are stored. Images may have any size.
        in_channels, out_indices, frozen_stages, with_cp, drop_path_rate,
            out_norm, init_cfg, pretrained, mask_padding: See :class:`VSSM`.

    Attributes:
        out_channels: Channels of each returned map.

    Raises:
        ValueError: An argument is out of range, or the image is too small or
            has another number of channels.
    """

    def __init__(
        self,
        arch: str | dict = 't',
        *,
        input_gate: bool = False,
        forget_gate: bool = False,
        shortcut: bool = False,
        normalise: bool = True,
        single_head: bool = False,
        design: str = 'transformer',
        position: Sequence[str] = (),
        feature_map: bool = True,
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
        arch = resolve_arch(arch, ARCH_ZOO, type(self).__name__, _DEFAULTS)
        if drop_path_rate is None:
            drop_path_rate = arch['drop_path_rate']
        if design not in DESIGNS:
            raise ValueError(f'design must be one of {DESIGNS}, got {design!r}')
        if isinstance(position, str) or not set(position) <= set(POSITIONS):
            raise ValueError(
                f'position must be a sequence of some of {POSITIONS}, got {position!r}'
            )
        block = partial(
            StudyBlock,
            head_dim=arch['head_dim'],
            single_head=single_head,
            design=design,
            mlp_ratio=arch['mlp_ratio'],
            cpe='cpe' in position,
            rope='rope' in position,
            lepe='lepe' in position,
            input_gate=input_gate,
            forget_gate=forget_gate,
            shortcut=shortcut,
            normalise=normalise,
            feature_map=feature_map,
        )

        def make_block(stage: int, channels: int, rate: float) -> StudyBlock:
            grid = _grid(img_size, stage) if 'ape' in position else None
            return block(channels, rate, grid=grid)

        super().__init__(
            _patch_embed,
            make_block,
            PatchMerging2d,
            depths=arch['depths'],
            dims=arch['dims'],
            norm_name='norm',
            min_size=4,
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
        for module in self.modules():
            if isinstance(module, StepSize2d):
                module.reset_parameters()


def _patch_embed(in_channels: int, dims: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, dims, 4, stride=4), LayerNorm2d(dims))


def _grid(img_size: int | tuple[int, int], stage: int) -> tuple[int, int]:
    """Size of the map of a stage."""
    return tuple(
        math.ceil(side // 4 / 2**stage) for side in parse_img_size(img_size, 4)
    )


def _fit(
    state: Mapping[str, torch.Tensor],
    backbone: LinearAttentionStudy,
    grids: Mapping[str, tuple[int, int]],
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Resize the position embeddings of all blocks of a file to the model's grids."""
    state, notes = dict(state), []
    blocks = dict(backbone.named_modules())
    for key, value in state.items():
        block, _, leaf = key.rpartition('.')
        grid = getattr(blocks.get(block), 'grid', None)
        if leaf == 'pos_embed' and grid is not None and value.ndim == 3:
            state[key], more = fit_grid(value, grid, grids.get(block), key)
            notes += more
    return state, notes


def _describe(state: Mapping[str, torch.Tensor]) -> str:
    """Name of the model that has these names and shapes, without the switches."""
    try:
        dims = state['layers.0.blocks.0.norm1.weight'].numel()
    except KeyError:
        return 'an incomplete LinearAttentionStudy'
    found = dict(depths=count_blocks(state), dims=dims)
    return describe_arch(found, ARCH_ZOO, FAMILY.name, FAMILY.title)


FAMILY = register_family(
    Family(
        name='linear_attention_study',
        title='LinearAttentionStudy',
        backbone=LinearAttentionStudy,
        archs=ARCH_ZOO,
        signature=r'layers\.\d+\.blocks\.\d+\.mixer\.attention\.qk\.weight',
        describe=_describe,
        **RECORD,
        fit=_fit,
    )
)
