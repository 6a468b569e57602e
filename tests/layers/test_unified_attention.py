from itertools import product

import pytest
import torch
import torch.nn.functional as F

from mmvssm.layers import rotary_tables
from mmvssm.layers.unified_attention import (
    StepSize2d,
    UnifiedAttention2d,
    unified_attention,
)
from mmvssm.ops import linear_attention, selective_scan
from mmvssm.ops.rotary import rotate

SWITCHES = ('input_gate', 'forget_gate', 'shortcut', 'normalise', 'single_head', 'rope')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(heads=2, channels=8, width=4, size=(3, 4), dtype=torch.float64):
    """q, k, v, Δ, A and D for maps of that size."""
    length = size[0] * size[1]
    q, k = torch.randn(2, 2, length, heads * width, dtype=dtype)
    v = torch.randn(2, length, channels, dtype=dtype)
    delta = F.softplus(torch.randn(2, length, channels, dtype=dtype))
    A = -torch.rand(channels, width, dtype=dtype) - 0.1
    D = torch.randn(channels, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, delta, A, D)]


def definition(q, k, v, delta, A, D, heads, rotary, normalise, feature_map=True):
    """The formula, with every weight of every two positions and channel.

    ``delta`` and ``A`` are pairs, of the tensor and whether its gate is there.
    """
    (delta, input_gate), (A, forget_gate) = delta, A
    length, channels = v.shape[1:]
    if feature_map:
        q, k = F.elu(q) + 1, F.elu(k) + 1
    factors = torch.ones(1, length, length, *A.shape, dtype=v.dtype)
    if forget_gate:
        # The sum of the steps behind j up to i, (B, i, j, C).
        total = delta.cumsum(1)
        steps = total[:, :, None] - total[:, None]
        factors = (steps[..., None] * A).exp()
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        factors = factors.masked_fill(future[None, :, :, None, None], 0)

    def weights(q, k):
        q, k = (
            x.unflatten(2, (heads, -1)).repeat_interleave(channels // heads, 2)
            for x in (q, k)
        )
        return torch.einsum('bicn,bjcn,bijcn->bijc', q, k, factors.expand(2, *[-1] * 4))

    turned = (q, k) if rotary is None else (rotate(x, *rotary) for x in (q, k))
    gated = delta * v if input_gate else v
    y = (weights(*turned) * gated[:, None]).sum(2)
    # What cannot be seen in a ratio: means without the forget gate.
    count = 1 if forget_gate else length
    y = y / count
    if normalise:
        y = y / (weights(q, k).sum(2) / count + 1e-6)
    return y if D is None else y + D * v


@pytest.mark.parametrize(
    'on',
    list(product((False, True), repeat=6)),
    ids=lambda on: ''.join('01'[x] for x in on),
)
def test_every_setting_against_the_definition(on):
    switch = dict(zip(SWITCHES, on))
    heads = 1 if switch['single_head'] else 2
    leaves = inputs(heads, size=(2, 3))
    q, k, v, delta, A, D = leaves
    D = D if switch['shortcut'] else None
    rotary = None
    if switch['rope']:
        rotary = rotary_tables(2, 3, q.shape[2], like=q).unbind()
    got = unified_attention(
        q,
        k,
        v,
        heads,
        delta=delta,
        input_gate=switch['input_gate'],
        A=A if switch['forget_gate'] else None,
        D=D,
        rotary=rotary,
        normalise=switch['normalise'],
    )
    want = definition(
        q,
        k,
        v,
        (delta, switch['input_gate']),
        (A, switch['forget_gate']),
        D,
        heads,
        rotary,
        switch['normalise'],
    )
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(got)
    got, want = (
        torch.autograd.grad(y, leaves, grad, materialize_grads=True)
        for y in (got, want)
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('feature_map', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_one_setting_is_the_selective_scan(feature_map, dtype):
    q, k, v, delta, A, D = inputs(1, 6, 16, (5, 8), dtype)
    got = unified_attention(
        q,
        k,
        v,
        delta=delta,
        input_gate=True,
        A=A,
        D=D,
        normalise=False,
        feature_map=feature_map,
    )
    B, C = (F.elu(x) + 1 if feature_map else x for x in (k, q))
    want = selective_scan(v.mT, delta.mT, A, B.mT, C.mT, D).mT
    if feature_map:
        # The features are rounded in another way here.
        torch.testing.assert_close(got, want)
    else:
        assert torch.equal(got, want)


def test_all_off_is_linear_attention():
    q, k, v, *_ = inputs(4, 8, 4, dtype=torch.float32)
    assert torch.equal(unified_attention(q, k, v, 4), linear_attention(q, k, v, 4))


def test_tiny_steps_overflow_nothing():
    """A step of nothing shuts the input out, and keeps the state as it is."""
    q, k, v, delta, A, _ = (x.detach().float() for x in inputs(1))
    delta[:, 3:] = 0
    y = unified_attention(q, k, v, delta=delta, A=A, normalise=False)
    assert y.isfinite().all()
    q[:, 3:] = q[:, 2:3]
    y = unified_attention(q, k, v, delta=delta, A=A, normalise=False)
    torch.testing.assert_close(y[:, 3:], y[:, 2:3].expand_as(y[:, 3:]))
    y = unified_attention(q, k, v, delta=delta, A=A)
    assert y.isfinite().all()


def test_the_future_is_not_seen_with_a_forget_gate():
    q, k, v, delta, A, _ = (x.detach() for x in inputs())
    later = v.clone()
    later[:, 6:] += 1
    for rates, same in ((A, True), (None, False)):
        a, b = (unified_attention(q, k, x, 2, delta=delta, A=rates) for x in (v, later))
        assert torch.allclose(a[:, :6], b[:, :6]) is same


@pytest.mark.parametrize('forget', [True, False])
def test_autocast(forget):
    q, k, v, delta, A, D = (x.detach().float() for x in inputs(dtype=torch.float32))
    kwargs = dict(delta=delta, input_gate=True, A=A if forget else None, D=D)
    want = unified_attention(q, k, v, 2, **kwargs)
    half = [x.bfloat16() for x in (q, k, v)]
    got = unified_attention(*half, 2, **kwargs)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.05, rtol=0.05)
    with torch.autocast('cpu', torch.bfloat16):
        got = unified_attention(*half, 2, **kwargs)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)


def test_what_does_not_fit_is_refused():
    q, k, v, delta, A, D = inputs()
    with pytest.raises(ValueError, match='need step sizes'):
        unified_attention(q, k, v, 2, input_gate=True)
    with pytest.raises(ValueError, match='need step sizes'):
        unified_attention(q, k, v, 2, A=A)
    with pytest.raises(ValueError, match=r"v's shape \(2, 12, 8\)"):
        unified_attention(q, k, v, 2, delta=delta[:, 1:], A=A)
    with pytest.raises(ValueError, match='one for each channel'):
        unified_attention(q, k, v, 2, D=D[:3])
    with pytest.raises(ValueError, match='feature_map=False needs a forget gate'):
        unified_attention(q, k, v, 2, feature_map=False)
    with pytest.raises(ValueError, match='heads must divide'):
        UnifiedAttention2d(8, 3, 4)
    with pytest.raises(ValueError, match='even head_dim'):
        UnifiedAttention2d(8, 4, 1, rope=True)
    with pytest.raises(ValueError, match='needs forget_gate=True'):
        UnifiedAttention2d(8, 2, 4, feature_map=False)


def test_layer_is_mambas_scan_in_its_setting():
    """From the map to the output, with the parameters of the layer."""
    layer = UnifiedAttention2d(
        8,
        1,
        4,
        input_gate=True,
        forget_gate=True,
        shortcut=True,
        normalise=False,
        feature_map=False,
    )
    x = torch.randn(2, 8, 3, 5)
    tokens = x.flatten(2)
    C, B = F.linear(tokens.mT, layer.qk.weight, layer.qk.bias).mT.chunk(2, 1)
    low = F.linear(tokens.mT, layer.step.down.weight)
    delta = F.linear(low, layer.step.up.weight).mT
    want = selective_scan(
        tokens,
        delta,
        -layer.A_log.exp(),
        B,
        C,
        layer.D,
        delta_bias=layer.step.up.bias,
        delta_softplus=True,
    )
    torch.testing.assert_close(layer(x).flatten(2), want)


@pytest.mark.parametrize('project', [True, False])
def test_layer_is_linear_attention_with_nothing_on(project):
    layer = UnifiedAttention2d(8, 2, 4, project_values=project, lepe=True)
    assert layer.step is layer.A_log is layer.D is None
    x = torch.randn(2, 8, 3, 5)
    tokens = x.flatten(2).mT
    q, k = F.linear(tokens, layer.qk.weight, layer.qk.bias).chunk(2, -1)
    v = F.linear(tokens, layer.v.weight, layer.v.bias) if project else tokens
    want = linear_attention(q, k, v, 2).mT + layer.lepe(
        v.mT.unflatten(2, (3, 5))
    ).flatten(2)
    torch.testing.assert_close(layer(x).flatten(2), want)


def test_steps_at_the_start():
    x = torch.zeros(1, 32, 2, 2)
    slow = StepSize2d(32)(x)
    assert 1e-4 <= slow.min() and slow.max() <= 0.1001 and slow.unique().numel() > 8
    torch.testing.assert_close(
        StepSize2d(32, open_at_start=True)(x), torch.ones(x.shape)
    )
