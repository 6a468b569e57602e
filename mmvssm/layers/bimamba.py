"""The block of Vim and Mamba®: a bidirectional selective scan on a sequence.

Names of parameters are those of the published code, in which ``_b`` marks the
backward direction.
"""

import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from mmvssm.layers.children import are_plain
from mmvssm.layers.drop_path import DropPath
from mmvssm.layers.linear import Linear
from mmvssm.layers.norm import AddRMSNorm
from mmvssm.ops import (
    Direction,
    autocast,
    bidirectional_scan,
    linear,
    selective_scan,
)
from mmvssm.registry import MODELS

DIRECTIONS = ('both', 'shared_conv', 'forward', 'backward')
# Of one direction: conv1d, x_proj, dt_proj, A_log, D.
_Parts: TypeAlias = tuple[nn.Module, nn.Module, nn.Module, torch.Tensor, torch.Tensor]
_CONVS = (nn.Conv1d,)
_LINEARS = (nn.Linear, Linear)
# Stride, dilation and padding mode of the convolution that the op computes.
_CAUSAL = ((1,), (1,), 'zeros')


@MODELS.register_module()
class BidirectionalMamba(nn.Module):
    """Mixer of a block (Algorithm 1 of arXiv 2401.09417).

    ``x, z = in_proj(x)``, then a scan from each end with separate weights, then the
    gate ``SiLU(z)`` and ``out_proj``.

    Args:
        channels: C of input and output.
        d_state: States N of each channel.
        d_conv: Width of the causal convolution.
        expand: Channels inside, relative to C.
        average: Average the two directions; otherwise add them up.
        directions: ``'both'``, as published: each direction has a convolution and a
            scan of its own. The paper's table 4 tries others: ``'shared_conv'``, two
            scans of what one causal convolution gives; ``'forward'``, one
            convolution and one scan, as in Mamba. ``'backward'`` is that from the
            other end.

    Raises:
        ValueError: There is no such choice of directions.

    Note:
        ``A_log``, ``D`` and the bias of the step sizes enter the scan in
        float32 (or float64), for a sequence of any dtype.

        With ``'both'`` one op computes the two directions from the weights of
        ``conv1d``, ``x_proj``, ``dt_proj`` and those with ``_b``. If one of them has
        hooks or is not the plain layer, all of them are called, with the same result
        up to rounding; see docs/adapters.md. ``conv1d`` then gets (B, D, L), and the
        first L positions of its output are used; ``conv1d_b`` gets the flipped
        sequence.
    """

    def __init__(
        self,
        channels: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        average: bool = True,
        directions: str = 'both',
    ):
        super().__init__()
        if directions not in DIRECTIONS:
            raise ValueError(f'directions must be one of {DIRECTIONS}: {directions!r}')
        inner = expand * channels
        dt_rank = math.ceil(channels / 16)
        self.average = average
        self.directions = directions
        scans = {'': 'A_log', '_b': 'A_b_log'}
        if directions in ('forward', 'backward'):
            del scans['_b']
        states = torch.arange(1.0, d_state + 1).log().repeat(inner, 1)
        for suffix, decay in scans.items():
            self.register_parameter(decay, nn.Parameter(states.clone()))
            self.register_parameter(f'D{suffix}', nn.Parameter(torch.ones(inner)))
        self.in_proj = Linear(channels, 2 * inner, bias=False)
        for suffix in scans:
            if suffix == '' or directions == 'both':
                # As published: causal is what comes out once its end is cut off.
                conv = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
                self.add_module(f'conv1d{suffix}', conv)
            x_proj = nn.Linear(inner, dt_rank + 2 * d_state, bias=False)
            dt_proj = nn.Linear(dt_rank, inner)
            init_step_size(dt_proj)
            self.add_module(f'x_proj{suffix}', x_proj)
            self.add_module(f'dt_proj{suffix}', dt_proj)
        self.out_proj = Linear(inner, channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sequence (B, L, C) -> sequence (B, L, C).

        Raises:
            ValueError: A module that was put in the place of ``conv1d``, ``x_proj`` or
                ``dt_proj`` gives something of another shape.
        """
        x, z = self.in_proj(x).chunk(2, dim=-1)
        directions = None
        if self.directions == 'both':
            directions = _read_weights((self._forward_parts(), self._backward_parts()))
        if directions is None:
            return self.out_proj(self._call_modules(x, z))
        y = bidirectional_scan(x.mT, z.mT, *directions, average=self.average)
        return self.out_proj(y.mT)

    def _forward_parts(self) -> _Parts:
        return self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D

    def _backward_parts(self) -> _Parts:
        conv = self.conv1d if self.directions == 'shared_conv' else self.conv1d_b
        return conv, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b

    def _call_modules(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """What :func:`bidirectional_scan` computes, by calling the modules.

        Without one of the directions, or with one convolution for both, the op does not
        compute it.

        Args:
            x, z: Sequence and gate (B, L, D).

        Returns:
            (B, L, D) in the dtype that the op gives.
        """
        y = self._scan_directions(x)
        halve = self.average and self.directions in ('both', 'shared_conv')
        y = y * F.silu(_full(z)) * (0.5 if halve else 1.0)
        return y if autocast.is_enabled(x) else y.to(x.dtype)

    def _scan_directions(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the directions, without the gate."""
        if self.directions == 'backward':
            return _scan_one_direction(x.flip(1), *self._forward_parts()).flip(1)
        if self.directions == 'shared_conv':
            conv, *forward = self._forward_parts()
            _, *backward = self._backward_parts()
            u = _convolve(x, conv)
            return _scan(u, *forward) + _scan(u.flip(2), *backward).flip(1)
        y = _scan_one_direction(x, *self._forward_parts())
        if self.directions == 'both':
            y = y + _scan_one_direction(x.flip(1), *self._backward_parts()).flip(1)
        return y


def _read_weights(parts: tuple[_Parts, _Parts]) -> list[Direction] | None:
    """Weights of both directions, or None where the modules have to be called."""
    children = []
    for conv, x_proj, dt_proj, _, _ in parts:
        children += (conv, _CONVS), (x_proj, _LINEARS), (dt_proj, _LINEARS)
    if not are_plain(children):
        return None
    directions = []
    for conv, x_proj, dt_proj, A_log, D in parts:
        # Another layer of the same class may have been put there.
        if (
            conv.padding != (conv.kernel_size[0] - 1,)
            or (conv.stride, conv.dilation, conv.padding_mode) != _CAUSAL
            or conv.groups != D.shape[0]
        ):
            return None
        conv_bias, dt_bias = conv.bias, dt_proj.bias
        if conv_bias is None or dt_bias is None or x_proj.bias is not None:
            return None
        full = []
        for x in (dt_bias, A_log, D):
            full.append(x.to(torch.promote_types(x.dtype, torch.float32)))
        dt_bias, A_log, D = full
        directions.append(
            Direction(
                conv.weight.squeeze(1),
                conv_bias,
                x_proj.weight,
                dt_proj.weight,
                dt_bias,
                -A_log.exp(),
                D,
            )
        )
    return directions


def _scan_one_direction(
    x: torch.Tensor,
    conv: nn.Module,
    x_proj: nn.Module,
    dt_proj: nn.Module,
    A_log: torch.Tensor,
    D: torch.Tensor,
) -> torch.Tensor:
    """One direction without its gate, by calling its modules.

    Args:
        x: Sequence (B, L, D), in the direction of the scan.
        conv, x_proj, dt_proj, A_log, D: Of the direction.

    Returns:
        (B, L, D), float32 (float64 for float64 input).
    """
    return _scan(_convolve(x, conv), x_proj, dt_proj, A_log, D)


def _convolve(x: torch.Tensor, conv: nn.Module) -> torch.Tensor:
    """Sequence (B, L, D) -> what the scan reads (B, D, L), of the same dtype."""
    batch, length, channels = x.shape
    u = conv(x.mT)
    if not _has_shape(u, batch, channels) or u.shape[2] < length:
        raise ValueError(
            f'BidirectionalMamba: conv1d must give {(batch, channels, length)}, or '
            f'more positions, of which the first {length} are used; got '
            f'{_describe(u)}. An nn.Conv1d there needs padding=kernel_size - 1'
        )
    return F.silu(_full(u[..., :length])).to(x.dtype)


def _scan(
    u: torch.Tensor,
    x_proj: nn.Module,
    dt_proj: nn.Module,
    A_log: torch.Tensor,
    D: torch.Tensor,
) -> torch.Tensor:
    """Scan of u (B, D, L) by one direction's modules -> (B, L, D)."""
    batch, channels, length = u.shape
    states = A_log.shape[1]
    read = x_proj(u.mT)
    if not _has_shape(read, batch, length) or read.shape[2] <= 2 * states:
        raise ValueError(
            f'BidirectionalMamba: x_proj must give {(batch, length)} positions of R + '
            f'{2 * states} channels, R for dt_proj; got {_describe(read)}'
        )
    rank = read.shape[2] - 2 * states
    dt_low_rank, B, C = read.split((rank, states, states), dim=-1)
    bias = None
    if are_plain([(dt_proj, _LINEARS)]) and dt_proj.bias is not None:
        # In 16 bits the bias of the step sizes must not be rounded.
        delta, bias = linear(dt_low_rank, dt_proj.weight), _full(dt_proj.bias)
    else:
        delta = dt_proj(dt_low_rank)
    if not _has_shape(delta, batch, length, channels):
        raise ValueError(
            f'BidirectionalMamba: dt_proj must give {(batch, length, channels)}, got '
            f'{_describe(delta)}'
        )
    # The directions are added up in float32, as in the op.
    return selective_scan(
        _full(u),
        delta.mT,
        -_full(A_log).exp(),
        B.mT,
        C.mT,
        _full(D),
        delta_bias=bias,
        delta_softplus=True,
    ).mT


def _has_shape(x: object, *sizes: int) -> bool:
    """Whether it is a tensor of three dimensions, the first ones of these sizes."""
    return (
        isinstance(x, torch.Tensor) and x.ndim == 3 and x.shape[: len(sizes)] == sizes
    )


def _describe(x: object) -> str:
    return str(tuple(x.shape)) if isinstance(x, torch.Tensor) else type(x).__name__


def _full(x: torch.Tensor) -> torch.Tensor:
    """Convert to float32, or keep float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def init_step_size(
    dt_proj: nn.Linear,
    dt_min: float = 1e-3,
    dt_max: float = 0.1,
    dt_floor: float = 1e-4,
) -> None:
    """Draw step sizes log-uniformly from [dt_min, dt_max]."""
    bound = dt_proj.in_features**-0.5
    dt_proj.weight.uniform_(-bound, bound)
    step = (
        torch.empty_like(dt_proj.bias)
        .uniform_(math.log(dt_min), math.log(dt_max))
        .exp_()
        .clamp_(min=dt_floor)
    )
    # The inverse of softplus, which the scan applies to the bias.
    dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))


@MODELS.register_module()
class MambaBlock(nn.Module):
    """Addition, norm, mixer: a block in the order of the published fused code.

    It takes the output of the previous mixer, and the residual stream without that
    output. It adds the two up, and returns the output of its own mixer and the stream.

    Args:
        channels: C of the sequence.
        drop_path: Probability that the incoming output of a sample is dropped. The
            first block has nothing to drop.
        residual_in_fp32: Keep the residual stream in float32.
        **mixer: Arguments of :class:`BidirectionalMamba`.
    """

    def __init__(
        self,
        channels: int,
        drop_path: float = 0.0,
        residual_in_fp32: bool = True,
        **mixer,
    ):
        super().__init__()
        self.drop_path = DropPath(drop_path)
        self.norm = AddRMSNorm(channels, residual_in_fp32=residual_in_fp32)
        self.mixer = BidirectionalMamba(channels, **mixer)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequence (B, L, C), stream or None -> output and stream, both (B, L, C)."""
        if residual is not None:
            x = self.drop_path(x)
        x, residual = self.norm(x, residual)
        return self.mixer(x), residual
