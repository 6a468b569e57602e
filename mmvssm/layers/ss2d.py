"""SS2D, the 2-d selective scan of VMamba, and the block around it.

Names of parameters are those of the published code (arXiv 2401.10166).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mmvssm.layers.cascade_scan import cascade_scan
from mmvssm.layers.drop_path import DropPath
from mmvssm.layers.maps import LayerNorm2d, Linear2d, Mlp2d
from mmvssm.ops import ss2d_scan
from mmvssm.ops.scan_orders import Orders, count_orders
from mmvssm.registry import MODELS

ACTIVATIONS = {'silu': F.silu, 'gelu': F.gelu, 'relu': F.relu}
INITIALISATIONS = ('v0', 'v1', 'v2')
CONVOLUTIONS = (3, -1)


@MODELS.register_module()
class SS2D(nn.Module):
    """2-d selective scan: the mixer of a VMamba block.

    ``x -> in_proj -> depthwise 3x3 -> SiLU -> scan -> out_norm -> out_proj``. There are
    K scans over the map, each along another row of the scan order and with its own
    parameters. By default they go by rows, by columns and by both from the end. Their
    results are added up. The gated form multiplies the normalised result by
    ``SiLU(z)``, where z is the second half of the channels of ``in_proj``.

    Args:
        channels: C of input and output.
        d_state: States N of each channel.
        ssm_ratio: Channels inside, relative to ``channels``.
        gated: The form of ``v0``: a gate, and a bias in the convolution.
        orders: See ``orders`` of :func:`mmvssm.ops.ss2d_scan`. K is the number of rows
            of the scan order.
        d_conv: Side of the convolution: 3, or -1 for no convolution.
        act_layer: Activation instead of both SiLUs: ``'silu'``, ``'gelu'``, ``'relu'``.
        initialize: Initialisation of the scan. ``'v0'``: as in Mamba, A_n = -n and step
            sizes log-uniform in [0.001, 0.1]. ``'v1'``: A_logs from N(0, 1), weights
            and biases of the step sizes from 0.1 N(0, 1). ``'v2'``: A = -1, weights and
            biases of the step sizes from 0.1 U(0, 1). Ds are 1 in all of them.

    Raises:
        ValueError: An argument has another value, or there is no scan order of that
            name.

    Note:
        ``A_logs``, ``Ds`` and ``dt_projs_bias`` enter the scan in float32 (or float64),
        for maps of any dtype. Under autocast the scan and ``out_norm`` run in float32:
        with half precision there, trainings diverge.
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
        _check_choice('d_conv', d_conv, CONVOLUTIONS)
        _check_choice('act_layer', act_layer, tuple(ACTIVATIONS))
        _check_choice('initialize', initialize, INITIALISATIONS)
        inner = int(ssm_ratio * channels)
        dt_rank = math.ceil(channels / 16)
        # The same for maps of all sizes.
        sets = count_orders(orders, 1, 1)
        self.gated = gated
        self.orders = orders
        self.act = ACTIVATIONS[act_layer]
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
        """Step sizes log-uniform in [dt_min, dt_max], and A_n = -n."""
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
        """Map (B, C, H, W) -> map (B, C, H, W)."""
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
        # The benchmarks replace the op by functions that know its
        # default only.
        options = {} if self.orders == 'cross' else dict(orders=self.orders)
        return ss2d_scan(*inputs, **options)


@MODELS.register_module()
class CascadeSS2D(SS2D):
    """:class:`SS2D` that scans the rows, and then the columns of the result.

    See :func:`mmvssm.layers.cascade_scan.cascade_scan`. Its parameters are those
    of four scan orders.

    Args:
        channels, d_state, ssm_ratio, gated, **switches: See :class:`SS2D`; all except
            ``orders``.
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
    """Convert to float32, or keep float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@MODELS.register_module()
class VSSBlock(nn.Module):
    """``x + SS2D(norm(x))``, then ``x + MLP(norm2(x))`` if it has an MLP.

    Args:
        channels: C of the maps.
        d_state, ssm_ratio, gated, **switches: See :class:`SS2D`.
        mlp_ratio: Hidden channels of the MLP relative to C; 0 for none.
        drop_path: Probability that a branch of a sample is dropped.
        mixer: :class:`SS2D` or :class:`CascadeSS2D`.
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
        """Map (B, C, H, W) -> map (B, C, H, W)."""
        x = x + self.drop_path(self.op(self.norm(x)))
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x
