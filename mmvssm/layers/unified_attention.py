"""Linear attention and the selective scan as two settings of one formula.

Equations 11 and 12 of arXiv 2405.16605 differ in an input gate, a forget gate,
a shortcut, a normalisation and the number of heads. Each is a switch here.
"""

import math

import torch
from torch import Tensor, nn

from mmvssm.layers.bimamba import init_step_size
from mmvssm.layers.linear_attention import DepthwiseConv2d
from mmvssm.layers.maps import Linear2d
from mmvssm.layers.rotary import rotary_tables
from mmvssm.ops import autocast, linear_attention, selective_scan
from mmvssm.ops.deterministic_math import elu_plus_one, softplus
from mmvssm.ops.rotary import rotate

# The smallest initial step size of Mamba.
SMALLEST_STEP = 1e-4


def unified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int = 1,
    *,
    delta: Tensor | None = None,
    input_gate: bool = False,
    A: Tensor | None = None,
    D: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    normalise: bool = True,
    feature_map: bool = True,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    r"""Linear attention with any of Mamba's gates (arXiv 2405.16605, section 4).

    In channel c of a head, with :math:`\phi(x) = \mathrm{elu}(x) + 1` and the
    rotation :math:`R_i` of position i,

    .. math::
        y_i = \frac{\sum_j \langle R_i \phi(q_i),
                    a_{ij} \odot R_j \phi(k_j) \rangle \, g_j v_j}
                   {\sum_j \langle \phi(q_i), a_{ij} \odot \phi(k_j) \rangle
                    + \epsilon} + D v_i.

    - Input gate: :math:`g_j = \Delta_j`, without it 1.
    - Forget gate: :math:`a_{ij} = \exp(A \sum_{t=j+1}^{i} \Delta_t)`, one
      factor for each channel of the key, and the sums run over :math:`j \le
      i`. This is a recurrence, computed by :func:`mmvssm.ops.selective_scan`:
      the keys are B, the queries are C, the heads are groups, and there are as
      many states as a key has channels. Without the gate :math:`a_{ij} = 1` and
      the sums run over all j.
    - Shortcut: :math:`D v_i`.
    - Without normalisation there is only the numerator. If there is no forget
      gate either, it is a mean over j instead of a sum.

    With q, k and v only, this is :func:`mmvssm.ops.linear_attention`. With both gates,
    a shortcut, one head and no normalisation it is ``selective_scan(v, delta, A, k, q,
    D)`` of :math:`\phi(k)` and :math:`\phi(q)`; with ``feature_map=False`` it takes k
    and q without :math:`\phi`.

    Args:
        q: Queries (B, L, heads * N), any strides, floating-point.
        k: Keys of q's shape.
        v: Values (B, L, C), C a multiple of heads.
        heads: Number of heads, each of N and C / heads neighbouring channels.
        delta: Step sizes Δ > 0 of v's shape; both gates need them.
        input_gate: Multiply the values by Δ.
        A: Decay rates (C, N), negative. With A there is a forget gate.
        D: Weights (C,) of the shortcut.
        rotary: See :func:`mmvssm.ops.linear_attention`. The normaliser has no
            rotation.
        normalise: Make the weights of the values sum up to 1.
        feature_map: Take :math:`\phi` of queries and keys. It may only be False with a
            forget gate and without normalisation.
        eps: :math:`\epsilon`. Without the forget gate it is added to the mean
            over j, not to the sum.
        backend: See :func:`mmvssm.ops.selective_scan`.

    Returns:
        (B, L, C) in v's dtype, under autocast in float32. The recurrence and
        all sums are float32 (float64 for a float64 input).

    Note:
        The scan multiplies its input by Δ. So with a forget gate and no input gate its
        input is :math:`v_j / \Delta_j`. To prevent an overflow, :math:`g_j` is
        :math:`10^4 \Delta_j` instead of 1 if Δ is below 1e-4.

    Raises:
        TypeError: A tensor is not floating-point.
        ValueError: A shape does not fit, or a gate has no step sizes.
    """
    _check(v, delta, input_gate, A, D, normalise, feature_map)
    if A is None:
        gated = delta * v if input_gate else v
        y = linear_attention(
            q,
            k,
            gated,
            heads,
            rotary,
            normalise=normalise,
            eps=eps,
            backend=backend,
        )
        y = y if D is None else y + D * v
    else:
        if feature_map:
            q, k = (elu_plus_one(_full(x)) for x in (q, k))
        turned = (q, k) if rotary is None else (rotate(x, *rotary) for x in (q, k))
        whole = input_gate and not normalise
        u = v if input_gate else _full(v) / delta.clamp(min=SMALLEST_STEP)
        y = _scan(*turned, u, delta, A, heads, D if whole else None, backend)
        if normalise:
            ones = 1 / _full(delta).clamp(min=SMALLEST_STEP)
            y = y / (_scan(q, k, ones, delta, A, heads, None, backend) + eps)
        y = y if D is None or whole else y + D * v
    return y if autocast.is_enabled(v) else y.to(v.dtype)


def _scan(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    heads: int,
    D: Tensor | None,
    backend: str | None,
) -> Tensor:
    """The scan over tokens (B, L, C); keys and queries are in groups."""
    B, C = (x.unflatten(2, (heads, -1)).permute(0, 2, 3, 1) for x in (k, q))
    return selective_scan(u.mT, delta.mT, A, B, C, D, backend=backend).mT


def _full(x: Tensor) -> Tensor:
    """Convert to float32, or keep float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(
    v: Tensor,
    delta: Tensor | None,
    input_gate: bool,
    A: Tensor | None,
    D: Tensor | None,
    normalise: bool,
    feature_map: bool,
) -> None:
    if (input_gate or A is not None) and delta is None:
        raise ValueError('unified_attention: the gates need step sizes delta')
    if delta is not None and delta.shape != v.shape:
        raise ValueError(
            f"unified_attention: delta must have v's shape {tuple(v.shape)}, got "
            f'{tuple(delta.shape)}'
        )
    if D is not None and D.shape != v.shape[2:]:
        raise ValueError(
            f'unified_attention: D must be {tuple(v.shape[2:])}, one for each '
            f'channel of v, got {tuple(D.shape)}'
        )
    if not feature_map and (A is None or normalise):
        raise ValueError(
            'unified_attention: feature_map=False needs a forget gate (A) and '
            'normalise=False'
        )


class StepSize2d(nn.Module):
    """Step sizes Δ = softplus(W2 W1 x + b) of a map, (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        open_at_start: Start with Δ near 1. Otherwise Δ starts between 0.001 and 0.1, as
            in Mamba. Use it for an input gate without a recurrence: the small step
            sizes of a recurrence would almost close the gate.
    """

    def __init__(self, channels: int, open_at_start: bool = False):
        super().__init__()
        rank = math.ceil(channels / 16)
        self.open_at_start = open_at_start
        self.down = Linear2d(channels, rank, bias=False)
        self.up = Linear2d(rank, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights of the second layer and its bias."""
        init_step_size(self.up)
        if self.open_at_start:
            nn.init.constant_(self.up.bias, math.log(math.expm1(1)))

    def forward(self, x: Tensor) -> Tensor:
        return softplus(_full(self.up(self.down(x))))


class UnifiedAttention2d(nn.Module):
    """:func:`unified_attention` over the positions of a map, row by row.

    Queries, keys and step sizes are projections of the map; the values are the
    map itself, or a projection of it.

    Args:
        channels: C of the map and of the values.
        heads: Number of heads; 1 if ``single_head``.
        head_dim: Channels N of a query and a key in each head.
        project_values: Use a projection of the map as values.
        input_gate: Multiply the values by the step sizes.
        forget_gate: Attend by a recurrence with decay.
        shortcut: Add the values, times one learned weight for each channel.
        normalise: Make the weights of the values sum up to 1.
        rope: Rotate queries and keys by their position, as in MLLA.
        lepe: Add a depthwise convolution of the values.
        feature_map: Take elu + 1 of queries and keys.

    Raises:
        ValueError: ``heads`` does not divide the channels, the rotation does not fit
            the channels, or a feature map is needed and missing.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        *,
        project_values: bool = False,
        input_gate: bool = False,
        forget_gate: bool = False,
        shortcut: bool = False,
        normalise: bool = True,
        rope: bool = False,
        lepe: bool = False,
        feature_map: bool = True,
    ):
        super().__init__()
        width = heads * head_dim
        if heads < 1 or channels % heads:
            raise ValueError(f'heads must divide the {channels} channels, got {heads}')
        if rope and (width % 4 or head_dim % 2):
            raise ValueError(
                f'the rotation needs an even head_dim and a multiple of 4 channels in '
                f'all, got {heads} heads of {head_dim}'
            )
        if not feature_map and (normalise or not forget_gate):
            raise ValueError(
                'feature_map=False needs forget_gate=True and normalise=False'
            )
        self.heads = heads
        self.input_gate = input_gate
        self.normalise = normalise
        self.rope = rope
        self.feature_map = feature_map
        self.qk = Linear2d(channels, 2 * width)
        self.v = Linear2d(channels, channels) if project_values else None
        gated = input_gate or forget_gate
        self.step = StepSize2d(channels, not forget_gate) if gated else None
        self.A_log = self.D = None
        if forget_gate:
            rates = torch.arange(1.0, head_dim + 1).log()
            self.A_log = nn.Parameter(rates.repeat(channels, 1))
        if shortcut:
            self.D = nn.Parameter(torch.ones(channels))
        self.lepe = DepthwiseConv2d(channels) if lepe else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) -> map (B, C, H, W), fast in channels-last memory."""
        q, k = _tokens(self.qk(x)).chunk(2, dim=-1)
        v = x if self.v is None else self.v(x)
        rotary = None
        if self.rope:
            rotary = rotary_tables(*x.shape[2:], q.shape[2], like=x).unbind()
        # Read once: a parametrisation computes them each time.
        A_log, D = self.A_log, self.D
        y = unified_attention(
            q,
            k,
            _tokens(v),
            self.heads,
            delta=None if self.step is None else _tokens(self.step(x)),
            input_gate=self.input_gate,
            A=None if A_log is None else -_full(A_log).exp(),
            D=None if D is None else _full(D),
            rotary=rotary,
            normalise=self.normalise,
            feature_map=self.feature_map,
        )
        y = y.to(x.dtype).mT.unflatten(2, x.shape[2:])
        return y if self.lepe is None else y + self.lepe(v)

    def extra_repr(self) -> str:
        return (
            f'heads={self.heads}, input_gate={self.input_gate}, '
            f'normalise={self.normalise}, rope={self.rope}, '
            f'feature_map={self.feature_map}'
        )


def _tokens(x: Tensor) -> Tensor:
    """Map (B, C, H, W) -> tokens (B, H * W, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
