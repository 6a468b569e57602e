"""VMamba: Visual State Space Model (Liu et al., NeurIPS 2024, arXiv 2401.10166).

A hierarchical backbone of four stages at strides 4, 8, 16 and 32. Its mixer,
SS2D, scans the map along four routes with a selective state-space model. The
names of parameters are those of the published code.

Maps are (B, C, H, W) throughout, held in channels-last memory, in which norms
and linear layers need no copy; ``v0``, whose published code is channel-last,
therefore runs through the same code as the later variants.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmvssm.backbones.base import Backbone
from mmvssm.layers import DropPath, LayerNorm2d, Linear2d, Mlp2d
from mmvssm.ops import ss2d_scan
from mmvssm.registry import MODELS

_V0 = dict(
    ssm_d_state=16,
    ssm_ratio=2.0,
    forward_type='v0',
    mlp_ratio=0.0,
    patchembed_version='v1',
    downsample_version='v1',
)
_V2 = dict(
    ssm_d_state=1,
    ssm_ratio=1.0,
    forward_type='v05_noz',
    mlp_ratio=4.0,
    patchembed_version='v2',
    downsample_version='v3',
)
_CHOICES = dict(
    forward_type=('v0', 'v05_noz'),
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
    'b_v0': _arch(_V0, (2, 2, 27, 2), 128, 0.5),
    't_s2l5': _arch(_V2, (2, 2, 5, 2), 96, 0.2, ssm_ratio=2.0),
    's_s2l15': _arch(_V2, (2, 2, 15, 2), 96, 0.3, ssm_ratio=2.0),
    'b_s2l15': _arch(_V2, (2, 2, 15, 2), 128, 0.6, ssm_ratio=2.0),
    't_s1l8': _arch(_V2, (2, 2, 8, 2), 96, 0.2),
    's_s1l20': _arch(_V2, (2, 2, 20, 2), 96, 0.3),
    'b_s1l20': _arch(_V2, (2, 2, 20, 2), 128, 0.5),
}


class SS2D(nn.Module):
    """2-d selective scan: the mixer of a VMamba block.

    ``x -> in_proj -> depthwise 3x3 -> SiLU -> scan -> out_norm -> out_proj``.
    The scan runs a selective state-space model along the rows, the columns and
    both of these backwards, each route with parameters of its own, and sums
    the four results. The gated form multiplies the normalised result by
    ``SiLU(z)``, z being the second half of the channels of ``in_proj``.

    Args:
        channels: C of input and output.
        d_state: States N of each channel.
        ssm_ratio: Channels inside, relative to ``channels``.
        gated: The form of ``v0``: a gate, and a bias in the convolution.

    Note:
        ``A_logs``, ``Ds`` and ``dt_projs_bias`` enter the scan in float32 (or
        float64) whatever the dtype of the maps, and under autocast the scan
        and ``out_norm`` run in float32: half precision there is what makes
        training diverge.
    """

    def __init__(
        self,
        channels: int,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        gated: bool = False,
    ):
        super().__init__()
        inner = int(ssm_ratio * channels)
        dt_rank = math.ceil(channels / 16)
        self.gated = gated
        self.in_proj = Linear2d(channels, 2 * inner if gated else inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=gated)
        self.x_proj_weight = nn.Parameter(torch.empty(4, dt_rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, inner))
        self.A_logs = nn.Parameter(torch.empty(4 * inner, d_state))
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_norm = LayerNorm2d(inner)
        self.out_proj = Linear2d(inner, channels, bias=False)
        self._init_scan()

    @torch.no_grad()
    def _init_scan(
        self, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4
    ) -> None:
        """Steps log-uniform in [dt_min, dt_max], states with A_n = -n."""
        _, inner, dt_rank = self.dt_projs_weight.shape
        self.x_proj_weight.uniform_(-(inner**-0.5), inner**-0.5)
        self.dt_projs_weight.uniform_(-(dt_rank**-0.5), dt_rank**-0.5)
        step = (
            torch.empty_like(self.dt_projs_bias)
            .uniform_(math.log(dt_min), math.log(dt_max))
            .exp_()
            .clamp_(min=dt_floor)
        )
        # The inverse of softplus, which the scan applies to the bias.
        self.dt_projs_bias.copy_(step + torch.log(-torch.expm1(-step)))
        self.A_logs.copy_(
            torch.arange(1.0, self.A_logs.shape[1] + 1).log().expand_as(self.A_logs)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.in_proj(x)
        if self.gated:
            x, z = x.chunk(2, dim=1)
        x = F.silu(self.conv2d(x))
        y = ss2d_scan(
            x,
            self.x_proj_weight,
            self.dt_projs_weight,
            _full(self.dt_projs_bias),
            -_full(self.A_logs).exp(),
            _full(self.Ds),
        )
        y = self.out_norm(y).to(x.dtype)
        if self.gated:
            y = y * F.silu(z)
        return self.out_proj(y)


def _full(x: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class VSSBlock(nn.Module):
    """``x + SS2D(norm(x))``, then ``x + MLP(norm2(x))`` if it has an MLP.

    Args:
        channels: C of the maps.
        d_state, ssm_ratio, gated: See :class:`SS2D`.
        mlp_ratio: Hidden channels of the MLP relative to C; 0 for none.
        drop_path: Probability of dropping a branch of a sample.
    """

    def __init__(
        self,
        channels: int,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        gated: bool = False,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.op = SS2D(channels, d_state, ssm_ratio, gated)
        self.drop_path = DropPath(drop_path)
        self.mlp = None
        if mlp_ratio > 0:
            self.norm2 = LayerNorm2d(channels)
            self.mlp = Mlp2d(channels, int(mlp_ratio * channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.op(self.norm(x)))
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


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


def _patch_embed(version: str, in_channels: int, dims: int) -> nn.Sequential:
    """Stem at stride 4. The identities keep the published indices of layers."""
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


class VSSStage(nn.Module):
    """Blocks of one resolution and the downsampling behind them.

    Returns the map before and the map after downsampling; they are the same
    where ``downsample`` is the identity.
    """

    def __init__(
        self, blocks: Sequence[VSSBlock], downsample: nn.Module, with_cp: bool = False
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


@MODELS.register_module()
class VSSM(Backbone):
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
        img_size: Accepted as all backbones here do, and without effect: VMamba
            has no position embedding. Every image size is accepted.
        in_channels: Channels of the image.
        out_indices: Stages whose maps are returned. Stages behind the last of
            them are not built, so every parameter receives a gradient.
        frozen_stages: -1 freezes nothing, 0 the patch embedding, i >= 1 also
            the first i stages with their downsampling. Frozen parts get no
            gradient and stay in eval mode. Output norms are never frozen:
            classification checkpoints do not have them.
        with_cp: Recompute each block in the backward pass to save memory.
        drop_path_rate: Rate of the last block, growing linearly from 0 at the
            first; None for the published value of the arch.
        out_norm: Whether maps pass through a norm of their own, ``outnorm{i}``.
            A classifier that brings its own norm takes False.
        init_cfg: mmengine's initialisation config. ``dict(type='Pretrained',
            checkpoint=...)`` takes published files as they are, by
            :func:`mmvssm.load_checkpoint`, and logs what matched.

    Attributes:
        out_channels: Channels of each returned map.

    Raises:
        ValueError: An argument is out of range, or the image is too small or
            has another number of channels.
    """

    def __init__(
        self,
        arch: str | dict = 't_s1l8',
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_path_rate: float | None = None,
        out_norm: bool = True,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        arch = _resolve_arch(arch)
        depths, dims = arch['depths'], arch['dims']
        if drop_path_rate is None:
            drop_path_rate = arch['drop_path_rate']
        self.out_indices = _checked_indices(out_indices, len(depths))
        self.num_stages = self.out_indices[-1] + 1
        if not -1 <= frozen_stages <= self.num_stages:
            raise ValueError(
                f'frozen_stages must be between -1 (nothing) and '
                f'{self.num_stages} (all stages built), got {frozen_stages}'
            )
        self.in_channels = in_channels
        self.frozen_stages = frozen_stages
        self.out_channels = tuple(dims * 2**i for i in self.out_indices)
        # The unpadded 4x4 convolution of v1 needs a whole patch.
        self.min_size = 4 if arch['patchembed_version'] == 'v1' else 1

        self.patch_embed = _patch_embed(arch['patchembed_version'], in_channels, dims)
        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.layers = nn.ModuleList()
        for i in range(self.num_stages):
            channels = dims * 2**i
            blocks = [
                VSSBlock(
                    channels,
                    arch['ssm_d_state'],
                    arch['ssm_ratio'],
                    arch['forward_type'] == 'v0',
                    arch['mlp_ratio'],
                    next(rates),
                )
                for _ in range(depths[i])
            ]
            downsample = (
                nn.Identity()
                if i + 1 == self.num_stages
                else _downsample(arch['downsample_version'], channels, 2 * channels)
            )
            self.layers.append(VSSStage(blocks, downsample, with_cp))
        for i, channels in zip(self.out_indices, self.out_channels, strict=True):
            self.add_module(
                f'outnorm{i}', LayerNorm2d(channels) if out_norm else nn.Identity()
            )
        self.apply(init_linear)
        self._freeze()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the maps of ``out_indices``.

        Args:
            x: Image (B, in_channels, H, W), any H and W.

        Returns:
            One (B, C, H', W') map a stage of ``out_indices``, contiguous.
            Sizes are rounded up at each halving, but for the patch embedding
            of v0, which drops rows and columns that do not fill a patch.
        """
        self._check_input(x)
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        outs = []
        for i, stage in enumerate(self.layers):
            out, x = stage(x)
            if i in self.out_indices:
                # Heads may hand the memory to compiled ops that take NCHW
                # strides for granted.
                out = getattr(self, f'outnorm{i}')(out)
                outs.append(out.contiguous())
        return tuple(outs)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay.

        This is the rule of the published classification recipe: 1-d
        parameters and biases are exempt, ``A_logs``, ``dt_projs_bias`` and
        ``dt_projs_weight`` are not. The published segmentation and detection
        recipes have another rule, ``paramwise_cfg=dict(custom_keys={'norm':
        dict(decay_mult=0.)})``, which exempts names that contain ``norm``.
        """
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim == 1 or name.endswith('.bias')
        }

    def train(self, mode: bool = True) -> 'VSSM':
        """Set the mode of all but the frozen stages."""
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        for module in (self.patch_embed, *self.layers[: self.frozen_stages]):
            module.eval().requires_grad_(False)

    def _check_input(self, x: torch.Tensor) -> None:
        size = self.min_size
        if x.ndim != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < size:
            raise ValueError(
                f'VSSM takes images (B, {self.in_channels}, H, W) of at least '
                f'{size}x{size} pixels, got a tensor of shape '
                f'{tuple(x.shape)}'
            )


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as published; for ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _resolve_arch(arch: str | dict) -> dict:
    if isinstance(arch, str):
        if arch not in ARCH_ZOO:
            raise ValueError(
                f"unknown arch '{arch}' of VSSM; take one of "
                f'{sorted(ARCH_ZOO)} or a dict with depths and dims'
            )
        return ARCH_ZOO[arch]
    unknown = sorted(set(arch) - set(ARCH_ZOO['t_s1l8']))
    missing = [key for key in ('depths', 'dims') if key not in arch]
    if unknown or missing:
        raise ValueError(
            f'arch of VSSM: missing keys {missing}, unknown keys {unknown}; '
            f'known are {sorted(ARCH_ZOO["t_s1l8"])}'
        )
    arch = {**_V2, 'drop_path_rate': 0.2, **arch}
    depths = arch['depths']
    if not isinstance(depths, Sequence) or not all(
        isinstance(depth, int) and depth > 0 for depth in depths
    ):
        raise ValueError(
            f'arch of VSSM: depths is the number of blocks of each stage, such as '
            f'(2, 2, 8, 2), got {depths!r}'
        )
    if not isinstance(arch['dims'], int):
        raise ValueError(
            f'arch of VSSM: dims is the number of channels of the first stage, '
            f'doubled from stage to stage, got {arch["dims"]!r}'
        )
    for key, choices in _CHOICES.items():
        if arch[key] not in choices:
            raise ValueError(
                f'arch of VSSM: {key} must be one of {choices}, got {arch[key]!r}'
            )
    return arch


def _checked_indices(indices: Sequence[int], stages: int) -> tuple[int, ...]:
    indices = tuple(indices)
    if (
        not indices
        or sorted(set(indices)) != list(indices)
        or indices[0] < 0
        or indices[-1] >= stages
    ):
        raise ValueError(
            f'out_indices must be increasing stage numbers out of '
            f'{tuple(range(stages))}, got {indices}'
        )
    return indices
