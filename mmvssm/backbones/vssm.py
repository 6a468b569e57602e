"""VMamba: Visual State Space Model (Liu et al., NeurIPS 2024, arXiv 2401.10166).

A hierarchical backbone of four stages at strides 4, 8, 16 and 32. Its mixer, SS2D,
scans the map along four routes with a selective state-space model. The names of
parameters are those of the published code.

All maps are (B, C, H, W) in channels-last memory. So norms and linear layers need no
copy, and ``v0``, whose published code is channels-last, uses the same code as later
variants.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from mmvssm.backbones.base import describe_arch, with_pretrained
from mmvssm.backbones.hierarchical import (
    RECORD,
    HierarchicalBackbone,
    count_blocks,
    resolve_arch,
)
from mmvssm.families import Family, register_family
from mmvssm.layers import CascadeSS2D, LayerNorm2d, PatchMerging2d, VSSBlock
from mmvssm.layers.ss2d import ACTIVATIONS, CONVOLUTIONS, INITIALISATIONS
from mmvssm.ops import list_scan_orders
from mmvssm.ops.scan_orders import Orders
from mmvssm.registry import MODELS

# Scan order of each published name of the mixer; None if the name does not say.
_PATTERNS = {
    'v0': None,
    'v05_noz': None,
    'v051d_noz': 'unidi',
    'v052d_noz': 'bidi',
    'v052dc_noz': 'cascade',
}

_SWITCHES = dict(ssm_conv=3, ssm_act_layer='silu', ssm_init='v0')
_V0 = dict(
    _SWITCHES,
    ssm_d_state=16,
    ssm_ratio=2.0,
    forward_type='v0',
    mlp_ratio=0.0,
    patchembed_version='v1',
    downsample_version='v1',
)
_V2 = dict(
    _SWITCHES,
    ssm_d_state=1,
    ssm_ratio=1.0,
    forward_type='v05_noz',
    mlp_ratio=4.0,
    patchembed_version='v2',
    downsample_version='v3',
)
_DEFAULTS = dict(_V2, drop_path_rate=0.2)
_CHOICES = dict(
    forward_type=tuple(_PATTERNS),
    ssm_conv=CONVOLUTIONS,
    ssm_act_layer=tuple(ACTIVATIONS),
    ssm_init=INITIALISATIONS,
    patchembed_version=('v1', 'v2'),
    downsample_version=('v1', 'v3'),
)


def _arch(
    base: dict, depths: tuple, dims: int, drop_path_rate: float, **changes
) -> dict:
    return dict(
        base, depths=depths, dims=dims, drop_path_rate=drop_path_rate, **changes
    )


ARCH_ZOO = {
    't_v0': _arch(_V0, (2, 2, 9, 2), 96, 0.2),
    's_v0': _arch(_V0, (2, 2, 27, 2), 96, 0.3),
    # As its published file was trained; its published config says 0.5.
    'b_v0': _arch(_V0, (2, 2, 27, 2), 128, 0.6),
    't_s2l5': _arch(_V2, (2, 2, 5, 2), 96, 0.2, ssm_ratio=2.0),
    's_s2l15': _arch(_V2, (2, 2, 15, 2), 96, 0.3, ssm_ratio=2.0),
    'b_s2l15': _arch(_V2, (2, 2, 15, 2), 128, 0.6, ssm_ratio=2.0),
    't_s1l8': _arch(_V2, (2, 2, 8, 2), 96, 0.2),
    's_s1l20': _arch(_V2, (2, 2, 20, 2), 96, 0.3),
    'b_s1l20': _arch(_V2, (2, 2, 20, 2), 128, 0.5),
}


def _patch_embed(version: str, in_channels: int, dims: int) -> nn.Sequential:
    """Stem with stride 4. The identities keep the published indices of layers."""
    if version == 'v1':
        return nn.Sequential(
            nn.Conv2d(in_channels, dims, 4, stride=4), nn.Identity(), LayerNorm2d(dims)
        )
    return nn.Sequential(
        nn.Conv2d(in_channels, dims // 2, 3, stride=2, padding=1),
        nn.Identity(),
        LayerNorm2d(dims // 2),
        nn.Identity(),
        nn.GELU(),
        nn.Conv2d(dims // 2, dims, 3, stride=2, padding=1),
        nn.Identity(),
        LayerNorm2d(dims),
    )


def _downsample(version: str, channels: int, out_channels: int) -> nn.Module:
    """Halve the map. The identities keep the published indices of layers."""
    if version == 'v1':
        return PatchMerging2d(channels, out_channels)
    return nn.Sequential(
        nn.Identity(),
        nn.Conv2d(channels, out_channels, 3, stride=2, padding=1),
        nn.Identity(),
        LayerNorm2d(out_channels),
    )


def _mixer_options(arch: dict, orders: Orders | None) -> dict:
    """Arguments of :class:`VSSBlock` for its mixer.

    Raises:
        ValueError: ``forward_type`` and ``orders`` name different scan orders.
    """
    forward_type = arch['forward_type']
    pattern = _PATTERNS[forward_type]
    if pattern is not None and orders not in (None, pattern):
        free = [name for name, named in _PATTERNS.items() if named is None]
        raise ValueError(
            f"VSSM: forward_type '{forward_type}' says {pattern}, and orders says "
            f'{orders!r}. Leave one of them out: orders goes with a forward_type of '
            f'{free}; its names are {list_scan_orders()}'
        )
    options = dict(
        d_state=arch['ssm_d_state'],
        ssm_ratio=arch['ssm_ratio'],
        gated=forward_type == 'v0',
        d_conv=arch['ssm_conv'],
        act_layer=arch['ssm_act_layer'],
        initialize=arch['ssm_init'],
    )
    if pattern == 'cascade':
        return dict(options, mixer=CascadeSS2D)
    given = pattern if orders is None else orders
    return dict(options, orders='cross' if given is None else given)


@MODELS.register_module()
class VSSM(HierarchicalBackbone):
    """VMamba backbone.

    Args:
        arch: A name of ``ARCH_ZOO``: ``t_v0``, ``s_v0``, ``b_v0``,
            ``t_s2l5``, ``s_s2l15``, ``b_s2l15``, ``t_s1l8``, ``s_s1l20``,
            ``b_s1l20``. Or a dict with

            - ``depths`` (sequence of int): Blocks of each stage.
            - ``dims`` (int): Channels of the first stage, doubled from stage
              to stage.

            and, optionally, under the names of the published code and with
            the values of ``t_s1l8`` as defaults, ``ssm_d_state`` (1),
            ``ssm_ratio`` (1.), ``forward_type`` (``'v05_noz'``, or ``'v0'``:
            gated), ``mlp_ratio`` (4., or 0 for no MLP),
            ``patchembed_version`` (``'v2'``: two convolutions, or ``'v1'``:
            one), ``downsample_version`` (``'v3'``: a convolution, or
            ``'v1'``: patch merging) and ``drop_path_rate`` (.2).

            These are also the switches of the published ablation. ``forward_type`` may
            also be ``'v051d_noz'`` (four times by rows: ``orders='unidi'``),
            ``'v052d_noz'`` (twice by rows, twice the same from the end:
            ``orders='bidi'``) or ``'v052dc_noz'`` (the mixer is :class:`CascadeSS2D`).
            ``ssm_conv`` (3, or -1 for no depthwise convolution), ``ssm_act_layer``
            (``'silu'``, ``'gelu'`` or ``'relu'``) and ``ssm_init`` (``'v0'``, ``'v1'``
            or ``'v2'``) are ``d_conv``, ``act_layer`` and ``initialize`` of
            :class:`SS2D`.
        img_size: Has no effect, but is accepted as in all backbones here: VMamba has no
            position embedding. Images may have any size.
        in_channels: Channels of the image.
        out_indices: Stages whose maps are returned. Later stages are not built, so
            every parameter gets a gradient.
        frozen_stages: -1 freezes nothing, 0 the patch embedding, i >= 1 also
            the first i stages with their downsampling. Frozen parts get no
            gradient and stay in eval mode. Output norms are never frozen:
            classification checkpoints do not have them.
        with_cp: Recompute each block in the backward pass to save memory.
        drop_path_rate: Rate of the last block, growing linearly from 0 at the
            first; None for the published value of the arch.
        out_norm: Whether each returned map has a norm of its own, ``outnorm{i}``.
            False for a classifier with a norm of its own.
        init_cfg: mmengine's initialisation config. ``dict(type='Pretrained',
            checkpoint=...)`` loads published files without conversion, by
            :func:`mmvssm.load_checkpoint`, and logs what matched.
        pretrained: The older way to say so: the ``checkpoint`` alone.
        orders: Scan order of all blocks: a name of
            :func:`mmvssm.ops.list_scan_orders`, several names, or a function
            of height and width; see :func:`mmvssm.ops.ss2d_scan`. None for that of
            ``forward_type``, which is ``'cross'`` for most of its names.
        mask_padding: For batches of images of several sizes, padded at the bottom
            and right: compute the maps of each image as if it were alone, and set
            them to zero beyond it. The images of each size run on their own. It
            needs the sizes: see :meth:`forward` and docs/detection.md.

    Attributes:
        out_channels: Channels of each returned map.

    Raises:
        ValueError: An argument is out of range, there is no scan order of that
            name, ``orders`` and ``forward_type`` contradict each other, or the
            image is too small or has another number of channels.
    """

    def __init__(
        self,
        arch: str | dict = 't_s1l8',
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
        orders: Orders | None = None,
        mask_padding: bool = False,
    ):
        arch = resolve_arch(arch, ARCH_ZOO, 'VSSM', _DEFAULTS, _CHOICES)
        dims = arch['dims']
        mixer = _mixer_options(arch, orders)
        if drop_path_rate is None:
            drop_path_rate = arch['drop_path_rate']

        def block(stage: int, channels: int, drop_path: float) -> VSSBlock:
            return VSSBlock(
                channels, mlp_ratio=arch['mlp_ratio'], drop_path=drop_path, **mixer
            )

        super().__init__(
            partial(_patch_embed, arch['patchembed_version']),
            block,
            partial(_downsample, arch['downsample_version']),
            depths=arch['depths'],
            dims=dims,
            norm_name='outnorm',
            # The 4x4 convolution of v1 has no padding and needs a whole patch.
            min_size=4 if arch['patchembed_version'] == 'v1' else 1,
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


# Old name -> name of the current published code.
_RENAMES = (
    (r'patch_embed\.proj\.', 'patch_embed.0.'),
    (r'patch_embed\.norm\.', 'patch_embed.2.'),
    (r'(layers\.\d+\.blocks\.\d+)\.ln_1\.', r'\1.norm.'),
    (r'(layers\.\d+\.blocks\.\d+)\.self_attention\.', r'\1.op.'),
    (r'norm\.', 'classifier.norm.'),
    (r'head\.', 'classifier.head.'),
)
_RENAMES = tuple((re.compile(old), new) for old, new in _RENAMES)


def _rename(key: str) -> str:
    """Turn an old or current name (without prefix) into the current name."""
    for old, new in _RENAMES:
        if old.match(key):
            return old.sub(new, key, count=1)
    return key


def _file_format(keys: Iterable[str]) -> str:
    """``'v0-old'``, ``'v0-new'`` or ``'v2'``."""
    keys = list(keys)
    if any(
        _rename(key) != key and key.startswith(('layers.', 'patch_embed.'))
        for key in keys
    ):
        return 'v0-old'
    return 'v2' if any('.mlp.' in key for key in keys) else 'v0-new'


def _reshape(key: str, value: torch.Tensor) -> torch.Tensor:
    """Turn the weights of 1x1 convolutions into those of linear layers."""
    pointwise = value.ndim == 4 and value.shape[2:] == (1, 1)
    return value.flatten(1) if pointwise and '.conv2d.' not in key else value


def _describe(state: Mapping[str, torch.Tensor]) -> str:
    """Name of the arch that has these keys and shapes."""
    first = 'layers.0.blocks.0.op.'
    try:
        inner, states = (
            state[first + 'dt_projs_bias'].shape[1],
            state[first + 'A_logs'].shape[1],
        )
        rows, dims = state[first + 'in_proj.weight'].shape[:2]
    except (KeyError, IndexError, ValueError):
        return 'an incomplete VMamba'
    found = dict(
        depths=count_blocks(state),
        dims=dims,
        ssm_d_state=states,
        ssm_ratio=inner / dims,
        forward_type='v0' if rows == 2 * inner else 'v05_noz',
    )
    return describe_arch(found, ARCH_ZOO, 'vmamba', 'VMamba')


FAMILY = register_family(
    Family(
        name='vmamba',
        title='VMamba',
        backbone=VSSM,
        archs=ARCH_ZOO,
        signature=r'layers\.\d+\.blocks\.\d+\.(op|self_attention)\.A_logs',
        describe=_describe,
        **RECORD,
        file_format=_file_format,
        rename=_rename,
        reshape=_reshape,
    )
)
