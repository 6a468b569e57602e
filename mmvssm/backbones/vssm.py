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
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from mmvssm.backbones.staged import StagedBackbone, resolve_arch
from mmvssm.layers import DropPath, LayerNorm2d, Linear2d, Mlp2d
from mmvssm.layers.cascade_scan import cascade_scan
from mmvssm.ops import list_scan_orders, ss2d_scan
from mmvssm.ops.scan_orders import Orders, count_orders
from mmvssm.registry import MODELS

_ACTIVATIONS = {'silu': F.silu, 'gelu': F.gelu, 'relu': F.relu}
_INITIALISATIONS = ('v0', 'v1', 'v2')
_CONVOLUTIONS = (3, -1)
# The pattern that a published name of the mixer says; None says nothing about it.
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
    ssm_conv=_CONVOLUTIONS,
    ssm_act_layer=tuple(_ACTIVATIONS),
    ssm_init=_INITIALISATIONS,
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
    The scan runs a selective state-space model along K orders of the positions,
    by default the rows, the columns and both of these backwards, each with
    parameters of its own, and sums the K results. The gated form multiplies the
    normalised result by ``SiLU(z)``, z being the second half of the channels of
    ``in_proj``.

    Args:
        channels: C of input and output.
        d_state: States N of each channel.
        ssm_ratio: Channels inside, relative to ``channels``.
        gated: The form of ``v0``: a gate, and a bias in the convolution.
        orders: See ``orders`` of :func:`mmvssm.ops.ss2d_scan`. K is the number
            of its rows.
        d_conv: Side of the convolution: 3, or -1 for no convolution.
        act_layer: In the place of both SiLUs: ``'silu'``, ``'gelu'``,
            ``'relu'``.
        initialize: How the scan starts. ``'v0'``: as Mamba, A_n = -n and step
            sizes log-uniform in [0.001, 0.1]. ``'v1'``: A_logs from N(0, 1),
            weights and biases of the step sizes from 0.1 N(0, 1). ``'v2'``:
            A = -1, and 0.1 U(0, 1). Ds are 1 in all of them.

    Raises:
        ValueError: An argument has none of these values, or there is no scan
            order of that name.

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
        *,
        orders: Orders = 'cross',
        d_conv: int = 3,
        act_layer: str = 'silu',
        initialize: str = 'v0',
    ):
        super().__init__()
        _check_choice('d_conv', d_conv, _CONVOLUTIONS)
        _check_choice('act_layer', act_layer, tuple(_ACTIVATIONS))
        _check_choice('initialize', initialize, _INITIALISATIONS)
        inner = int(ssm_ratio * channels)
        dt_rank = math.ceil(channels / 16)
        # The same for maps of all sizes.
        sets = count_orders(orders, 1, 1)
        self.gated = gated
        self.orders = orders
        self.act = _ACTIVATIONS[act_layer]
        self.in_proj = Linear2d(channels, 2 * inner if gated else inner, bias=False)
        if d_conv > 0:
            self.conv2d = nn.Conv2d(
                inner, inner, d_conv, padding=d_conv // 2, groups=inner, bias=gated
            )
        else:
            self.conv2d = nn.Identity()
        self.x_proj_weight = nn.Parameter(
            torch.empty(sets, dt_rank + 2 * d_state, inner)
        )
        self.dt_projs_weight = nn.Parameter(torch.empty(sets, inner, dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(sets, inner))
        self.A_logs = nn.Parameter(torch.empty(sets * inner, d_state))
        self.Ds = nn.Parameter(torch.ones(sets * inner))
        self.out_norm = LayerNorm2d(inner)
        self.out_proj = Linear2d(inner, channels, bias=False)
        self._init_scan(initialize)

    @torch.no_grad()
    def _init_scan(self, initialize: str) -> None:
        bound = self.x_proj_weight.shape[2] ** -0.5
        self.x_proj_weight.uniform_(-bound, bound)
        if initialize == 'v0':
            self._init_as_mamba()
            return
        steps = (self.dt_projs_weight, self.dt_projs_bias)
        if initialize == 'v1':
            self.A_logs.normal_()
            for parameter in steps:
                parameter.normal_(std=0.1)
        else:
            self.A_logs.zero_()
            for parameter in steps:
                parameter.uniform_(0, 0.1)

    @torch.no_grad()
    def _init_as_mamba(
        self, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4
    ) -> None:
        """Steps log-uniform in [dt_min, dt_max], states with A_n = -n."""
        dt_rank = self.dt_projs_weight.shape[2]
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
        x = self.act(self.conv2d(x))
        y = self._scan(
            x,
            self.x_proj_weight,
            self.dt_projs_weight,
            _full(self.dt_projs_bias),
            -_full(self.A_logs).exp(),
            _full(self.Ds),
        )
        y = self.out_norm(y).to(x.dtype)
        if self.gated:
            y = y * self.act(z)
        return self.out_proj(y)

    def _scan(self, *inputs: torch.Tensor) -> torch.Tensor:
        # The benchmarks put functions in the place of the op that know its
        # default only.
        options = {} if self.orders == 'cross' else dict(orders=self.orders)
        return ss2d_scan(*inputs, **options)


class CascadeSS2D(SS2D):
    """:class:`SS2D` that scans the rows, and then the columns of the result.

    See :func:`mmvssm.layers.cascade_scan.cascade_scan`. Its parameters are those
    of four scan orders.

    Args:
        channels, d_state, ssm_ratio, gated, **switches: See :class:`SS2D`; all
            but ``orders``.
    """

    def __init__(
        self,
        channels: int,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        gated: bool = False,
        **switches,
    ):
        super().__init__(
            channels, d_state, ssm_ratio, gated, **switches, orders='cross'
        )
        self.orders = None

    def _scan(self, *inputs: torch.Tensor) -> torch.Tensor:
        return cascade_scan(*inputs)


def _check_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f'SS2D: {name} must be one of {choices}, got {value!r}')


def _full(x: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class VSSBlock(nn.Module):
    """``x + SS2D(norm(x))``, then ``x + MLP(norm2(x))`` if it has an MLP.

    Args:
        channels: C of the maps.
        d_state, ssm_ratio, gated, **switches: See :class:`SS2D`.
        mlp_ratio: Hidden channels of the MLP relative to C; 0 for none.
        drop_path: Probability of dropping a branch of a sample.
        mixer: :class:`SS2D`, or :class:`CascadeSS2D`.
    """

    def __init__(
        self,
        channels: int,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        gated: bool = False,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        *,
        mixer: type[SS2D] = SS2D,
        **switches,
    ):
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.op = mixer(channels, d_state, ssm_ratio, gated, **switches)
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


def _mixer_options(arch: dict, orders: Orders | None) -> dict:
    """What :class:`VSSBlock` takes for its mixer.

    Raises:
        ValueError: ``forward_type`` names a pattern and ``orders`` another.
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
class VSSM(StagedBackbone):
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

            The switches of the published ablation are among them:
            ``forward_type`` may also be ``'v051d_noz'`` (four times the rows:
            ``orders='unidi'``), ``'v052d_noz'`` (twice the rows, twice their
            reverse: ``orders='bidi'``) or ``'v052dc_noz'`` (the mixer is
            :class:`CascadeSS2D`); ``ssm_conv`` (3, or -1 for no depthwise
            convolution), ``ssm_act_layer`` (``'silu'``, ``'gelu'`` or
            ``'relu'``) and ``ssm_init`` (``'v0'``, ``'v1'`` or ``'v2'``) are
            ``d_conv``, ``act_layer`` and ``initialize`` of :class:`SS2D`.
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
        orders: Scan order of all blocks: a name of
            :func:`mmvssm.ops.list_scan_orders`, several names, or a function
            of height and width; see :func:`mmvssm.ops.ss2d_scan`. None for that
            of ``forward_type``, which is ``'cross'`` unless its name says
            otherwise.

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
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_path_rate: float | None = None,
        out_norm: bool = True,
        init_cfg: dict | list[dict] | None = None,
        *,
        orders: Orders | None = None,
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
            _patch_embed(arch['patchembed_version'], in_channels, dims),
            block,
            partial(_downsample, arch['downsample_version']),
            depths=arch['depths'],
            dims=dims,
            norm_name='outnorm',
            # The unpadded 4x4 convolution of v1 needs a whole patch.
            min_size=4 if arch['patchembed_version'] == 'v1' else 1,
            in_channels=in_channels,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            drop_path_rate=drop_path_rate,
            out_norm=out_norm,
            init_cfg=init_cfg,
        )
