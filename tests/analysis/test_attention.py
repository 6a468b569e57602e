"""The matrices of mixers, against plain loops and against what the layers compute."""

import math

import pytest
import torch
import torch.nn.functional as F

from families import FAMILIES
from mmvssm.analysis.attention import (
    MODES,
    attention,
    raster_matrices,
    raster_rows,
    rollout,
    scan_matrix,
)
from mmvssm.analysis.routes import LinearRoute, ScanRoute, find_mixers, record_mixings
from mmvssm.backbones import VSSM, MambaR, Vim
from mmvssm.backbones.linear_attention_study import LinearAttentionStudy
from mmvssm.ops import list_scan_orders

TOLERANCE = dict(rtol=1e-5, atol=1e-12)
GATED = dict(input_gate=True, forget_gate=True, shortcut=True, single_head=True)
STUDIES = {
    'baseline': {},
    'input_gate': dict(input_gate=True),
    'forget_gate': dict(forget_gate=True),
    'forget_gate_rope': dict(forget_gate=True, position=('rope',)),
    'mamba': dict(GATED, normalise=False, feature_map=False, design='all'),
}


def capture(backbone, layer, child, image, side):
    """What a child of a mixer gets (side 0) or gives (side 1)."""
    seen = []
    module = backbone.get_submodule(layer).get_submodule(child)
    hook = module.register_forward_hook(
        lambda module, args, out: seen.append((args[0], out)[side])
    )
    with torch.no_grad():
        backbone.eval().compute_maps(image)
    hook.remove()
    return seen[0][0]


def mixed(mixing):
    """(D, places): what the routes make of their values, by full matrices."""
    outputs = 0
    for route in mixing.routes.values():
        if isinstance(route, LinearRoute):
            continue
        rows = [
            scan_matrix(route, d) @ route.values[d] for d in range(len(route.values))
        ]
        along = torch.stack(rows)
        real = route.places >= 0
        out = along.new_zeros(len(along), int(real.sum()))
        out[:, route.places[real]] = along[:, real]
        outputs = outputs + out
    return mixing.scale * outputs


@pytest.mark.parametrize('states', [1, 16])
@pytest.mark.parametrize(
    'orders', [*list_scan_orders(), ['spiral', 'windows2']], ids=str
)
def test_matrix_times_input_is_the_output_of_ss2d(orders, states):
    torch.manual_seed(0)
    arch = dict(depths=(1,), dims=4, ssm_d_state=states, mlp_ratio=0.0)
    net = VSSM(arch, out_indices=(0,), orders=orders).double()
    image = torch.randn(1, 3, 20, 28, dtype=torch.float64)
    (mixing,) = record_mixings(net, image)
    assert mixing.size == (5, 7) and mixing.position == (0, 0)
    want = capture(net, mixing.layer, 'out_norm', image, 0)
    torch.testing.assert_close(mixed(mixing), want.flatten(1), **TOLERANCE)


@pytest.mark.parametrize(
    'states,average,directions',
    [
        (1, True, 'both'),
        (16, True, 'both'),
        (16, False, 'both'),
        (16, True, 'shared_conv'),
        (16, True, 'alternate'),
    ],
)
def test_matrix_times_input_is_the_output_of_vim(states, average, directions):
    torch.manual_seed(0)
    arch = dict(embed_dims=4, depth=2, patch_size=4, stride=4, d_state=states)
    options = dict(average=average, directions=directions)
    net = Vim(arch, img_size=16, cls_token='middle', **options).double()
    image = torch.randn(1, 3, 12, 20, dtype=torch.float64)
    first, second = record_mixings(net, image)
    assert (first.position, second.position) == ((0,), (1,))
    if directions == 'alternate':
        assert [*first.routes, *second.routes] == ['forward', 'backward']
    for mixing in (first, second):
        assert mixing.size == (3, 5) and mixing.patches.tolist() == [
            place for place in range(16) if place != 7
        ]
        z = capture(net, mixing.layer, 'in_proj', image, 1).chunk(2, -1)[1]
        want = capture(net, mixing.layer, 'out_proj', image, 0)
        torch.testing.assert_close(mixed(mixing).mT * F.silu(z), want, **TOLERANCE)


def test_layers_that_adapters_changed():
    torch.manual_seed(0)
    net = FAMILIES['mambar']().double()
    image = torch.randn(1, 3, 16, 24, dtype=torch.float64)
    plain = list(record_mixings(net, image))
    for layer in find_mixers(net):
        net.get_submodule(layer).x_proj.register_forward_hook(lambda *args: None)
    for one, other in zip(plain, record_mixings(net, image), strict=True):
        assert one.size == (4, 6) and len(one.patches) == 24
        torch.testing.assert_close(mixed(other), mixed(one), **TOLERANCE)


def test_weights_times_values_is_the_output_of_mlla():
    torch.manual_seed(0)
    net = FAMILIES['mlla']().double()
    image = torch.randn(1, 3, 20, 28, dtype=torch.float64)
    for mixing in record_mixings(net, image):
        (route,) = mixing.routes.values()
        attn = net.get_submodule(mixing.layer)
        x = capture(net, mixing.layer, 'lepe', image, 0)
        values = x.flatten(1).unflatten(0, (attn.heads, -1))
        want = attn(x[None])[0] - attn.lepe(x[None])[0]
        found = torch.einsum('hts,hcs->hct', route.weights, values).flatten(0, 1)
        torch.testing.assert_close(found, want.flatten(1), **TOLERANCE)


@pytest.mark.parametrize('name', STUDIES)
def test_matrix_times_values_is_the_output_of_a_study_model(name):
    torch.manual_seed(0)
    options = dict(STUDIES[name], out_indices=(0,))
    arch = dict(depths=(1,), dims=8, head_dim=4)
    net = LinearAttentionStudy(arch, **options).double()
    image = torch.randn(1, 3, 12, 20, dtype=torch.float64)
    (mixing,) = record_mixings(net, image)
    (route,) = mixing.routes.values()
    attn = net.get_submodule(mixing.layer)
    child = 'v' if attn.v is not None else 'qk'
    values = capture(net, mixing.layer, child, image, int(child == 'v')).flatten(1)
    seen = []
    hook = attn.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        net.compute_maps(image)
    hook.remove()
    if isinstance(route, ScanRoute):
        torch.testing.assert_close(route.values, values)
        found = mixed(mixing)
    else:
        gated = values if route.dt is None else values * route.dt
        apart = gated.unflatten(0, (attn.heads, -1))
        found = torch.einsum('hts,hcs->hct', route.weights, apart).flatten(0, 1)
    torch.testing.assert_close(found, seen[0][0].flatten(1), **TOLERANCE)


def by_loops(route, mode):
    """The attention of a scan as the equation reads, one number after the other."""
    dt, A, B, C = (x.tolist() for x in (route.dt, route.A, route.B, route.C))
    channels, length, states = len(dt), len(dt[0]), len(A[0])
    found = torch.zeros(length, length, dtype=torch.float64)
    for t in range(length):
        for s in range(t + 1):
            for d in range(channels):
                group = d // (channels // len(B))
                for n in range(states):
                    value = C[group][n][t] * B[group][n][s]
                    if mode != 'CB':
                        value *= dt[d][s]
                    if mode == 'decayed':
                        value *= math.exp(A[d][n] * sum(dt[d][s + 1 : t + 1]))
                    found[t, s] += value / channels
    return found


@pytest.fixture
def route():
    torch.manual_seed(0)
    dt = torch.rand(4, 6, dtype=torch.float64)
    B, C = torch.randn(2, 2, 3, 6, dtype=torch.float64)
    A = -torch.rand(4, 3, dtype=torch.float64)
    places = torch.tensor([1, 0, -1, 2, 3, 4])
    return ScanRoute(places, torch.randn_like(dt), dt, A, B, C, A[:, 0], dt)


@pytest.mark.parametrize('mode', MODES)
def test_attention_by_loops(route, mode):
    want = by_loops(route, mode)
    torch.testing.assert_close(attention(route, mode), want, rtol=1e-12, atol=1e-14)
    some = attention(route, mode, [4, 0])
    torch.testing.assert_close(some, want[[4, 0]], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('name', ['baseline', 'input_gate'])
def test_linear_attention_by_loops(name):
    torch.manual_seed(0)
    arch = dict(depths=(1,), dims=8, head_dim=4)
    net = LinearAttentionStudy(arch, **STUDIES[name], out_indices=(0,)).double()
    image = torch.randn(1, 3, 8, 12, dtype=torch.float64)
    (mixing,) = record_mixings(net, image)
    (route,) = mixing.routes.values()
    q, k = ((F.elu(x[0]) + 1).tolist() for x in route.inputs[:2])
    length, heads = 6, 2
    for mode in MODES:
        want = torch.zeros(length, length, dtype=torch.float64)
        for h in range(heads):
            own = range(4 * h, 4 * h + 4)
            for t in range(length):
                dots = [sum(q[t][c] * k[s][c] for c in own) for s in range(length)]
                norm = 1.0
                if mode == 'decayed':
                    norm = length * (sum(dots) / length + 1e-6)
                for s in range(length):
                    gate = 1.0
                    if mode != 'CB' and route.dt is not None:
                        gate = sum(float(route.dt[c, s]) for c in own) / 4
                    want[t, s] += dots[s] / norm * gate / heads
        torch.testing.assert_close(attention(route, mode), want)
        some = attention(route, mode, [3, 1])
        torch.testing.assert_close(some, want[[3, 1]])


def test_blocks_of_channels(route, monkeypatch):
    want = attention(route, 'decayed')
    monkeypatch.setattr('mmvssm.analysis.attention._BLOCK', 1)
    torch.testing.assert_close(attention(route, 'decayed'), want)


def test_long_sequences_do_not_underflow():
    """The article's w[t] / w[s] is 0 / 0 here, and sums in float32 are too coarse."""
    length = 4000
    dt = torch.rand(1, length, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, 1, length)
    route = ScanRoute(
        torch.arange(length), dt, dt, -ones[0, :, :1], ones, ones, None, ones[0]
    )
    row = attention(route, 'decayed', [length - 1])[0]
    later = dt[0].double().flip(0).cumsum(0).flip(0) - dt[0]
    want = torch.exp(-later).float()
    near = want > 1e-30
    assert near.sum() > 100
    torch.testing.assert_close(row[near], want[near], rtol=1e-5, atol=0)
    assert row.isfinite().all()


def test_an_unknown_mode_is_refused(route):
    with pytest.raises(ValueError, match="mode must be one of .* got 'QK'"):
        attention(route, 'QK')


@pytest.mark.parametrize('orders', ['cross', 'windows2', 'hilbert'])
def test_raster_order(orders):
    """Entry (p, q) is that of the positions at which the scan visits p and q."""
    torch.manual_seed(0)
    net = VSSM(dict(depths=(1,), dims=4), out_indices=(0,), orders=orders).double()
    image = torch.randn(1, 3, 12, 20, dtype=torch.float64)
    (mixing,) = record_mixings(net, image)
    matrices = raster_matrices(mixing, 'decayed')
    total = 0
    for name, route in mixing.routes.items():
        along, places = attention(route, 'decayed'), route.places.tolist()
        want = torch.zeros(15, 15, dtype=torch.float64)
        for t, p in enumerate(places):
            for s, q in enumerate(places):
                if p >= 0 and q >= 0:
                    want[p, q] = along[t, s]
        torch.testing.assert_close(matrices[name], want)
        total = total + want
    torch.testing.assert_close(matrices['merged'], total)
    maps = raster_rows(mixing, 'decayed', 8)
    assert maps.keys() == matrices.keys()
    for name, found in maps.items():
        torch.testing.assert_close(found, matrices[name][8].view(3, 5))


def test_tokens_are_left_out_of_maps():
    torch.manual_seed(0)
    net = MambaR(
        dict(embed_dims=8, depth=1, patch_size=4, stride=4, registers=3), img_size=16
    ).double()
    image = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    (mixing,) = record_mixings(net, image)
    tokens = net.token_positions(16)
    patches = [place for place in range(19) if place not in tokens]
    matrices = raster_matrices(mixing, 'CB')
    forward = attention(mixing.routes['forward'], 'CB')[patches][:, patches]
    backward = attention(mixing.routes['backward'], 'CB').flip(0, 1)
    backward = backward[patches][:, patches]
    torch.testing.assert_close(matrices['forward'], forward)
    torch.testing.assert_close(matrices['backward'], backward)
    torch.testing.assert_close(matrices['merged'], (forward + backward) / 2)


def test_rollout_by_hand():
    a = torch.tensor([[2.0, -1.0], [0.0, 1.0]])
    one = torch.tensor([[1.0, 0.25], [0.0, 0.75]]) / torch.tensor([[1.25], [0.75]])
    torch.testing.assert_close(rollout([a]), one)
    b = torch.tensor([[0.0, 4.0], [4.0, 0.0]])
    other = torch.full((2, 2), 0.5)
    torch.testing.assert_close(rollout([a, b]), other @ one)
    torch.testing.assert_close(rollout([0 * a]), torch.eye(2))
    with pytest.raises(ValueError, match='one layer at least'):
        rollout([])


def test_what_cannot_be_looked_into():
    image = torch.zeros(1, 3, 32, 32)
    net = VSSM(dict(depths=(1,), dims=4, forward_type='v052dc_noz'), out_indices=(0,))
    with pytest.raises(ValueError, match='no one matrix'):
        list(record_mixings(net, image))
    net = FAMILIES['vim']()
    with pytest.raises(ValueError, match="no mixer 'head'; there are layers.0.mixer"):
        list(record_mixings(net, image, ['head']))
    with pytest.raises(ValueError, match='expected one image'):
        list(record_mixings(net, torch.zeros(2, 3, 32, 32)))
    with pytest.raises(ValueError, match='Linear has no selective scan'):
        find_mixers(torch.nn.Linear(1, 1))


def test_recording_changes_nothing():
    net = FAMILIES['vmamba_v0']()
    net.train()
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()
    )
    list(record_mixings(net, torch.zeros(1, 3, 32, 32)))
    assert net.training and hooks == sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()
    )
