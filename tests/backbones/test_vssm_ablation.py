"""The switches of VMamba's published ablation, its mixers and its scan orders."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmvssm import load_checkpoint
from mmvssm.analysis.flops import count_flops, scan_flops
from mmvssm.backbones import VSSM
from mmvssm.backbones.vssm import ARCH_ZOO
from mmvssm.engine.training.layer_decay import find_depths
from mmvssm.heads import ClassificationHead, ImageClassifier
from mmvssm.layers import SS2D, CascadeSS2D, VSSBlock
from mmvssm.layers import ss2d as module
from mmvssm.layers.cascade_scan import cascade_scan
from mmvssm.ops import backend_status, scan_order, ss2d_scan

TINY = dict(depths=(1, 1, 1, 1), dims=8, drop_path_rate=0.0)
# The published key names are those of all of them, but for the convolution.
KEYS = {
    'norm.weight',
    'norm.bias',
    'norm2.weight',
    'norm2.bias',
    'op.in_proj.weight',
    'op.conv2d.weight',
    'op.x_proj_weight',
    'op.dt_projs_weight',
    'op.dt_projs_bias',
    'op.A_logs',
    'op.Ds',
    'op.out_norm.weight',
    'op.out_norm.bias',
    'op.out_proj.weight',
    'mlp.fc1.weight',
    'mlp.fc1.bias',
    'mlp.fc2.weight',
    'mlp.fc2.bias',
}
SWITCHES = {
    'unidi': dict(forward_type='v051d_noz'),
    'bidi': dict(forward_type='v052d_noz'),
    'cascade': dict(forward_type='v052dc_noz'),
    'no convolution': dict(ssm_conv=-1),
    'cascade, no convolution': dict(forward_type='v052dc_noz', ssm_conv=-1),
    'random': dict(ssm_init='v1'),
    'zero': dict(ssm_init='v2', ssm_d_state=2),
    'gelu': dict(ssm_act_layer='gelu'),
    'relu': dict(ssm_act_layer='relu'),
    'ratios': dict(ssm_ratio=1.5, mlp_ratio=3.0, ssm_d_state=8),
}


# Scan orders and how many rows they have.
def inwards(height, width):
    """From the first place and the last one in turns, and the reverse."""
    places = torch.arange(height * width)
    order = torch.stack((places, places.flip(0)), dim=1).flatten()[: height * width]
    return torch.stack((order, order.flip(0), order))


ORDERS = {
    'corners': ('corners', 4),
    'zigzag': ('zigzag', 4),
    'windows2': ('windows2', 4),
    'windows7': ('windows7', 4),
    'diagonals': ('diagonals', 4),
    'hilbert': ('hilbert', 4),
    'spiral': ('spiral', 4),
    'two': (['hilbert', 'cross'], 8),
    'function': (inwards, 3),
}
every_order = pytest.mark.parametrize('orders, sets', ORDERS.values(), ids=list(ORDERS))
every = pytest.mark.parametrize('switches', SWITCHES.values(), ids=list(SWITCHES))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def loss(maps):
    return sum(x.square().mean() for x in maps)


def randomise(net, std=0.3):
    """Other numbers in every parameter: the published ones hide much."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=std)
    return net


def assert_all_learn(net):
    """No parameter that a loss does not reach, none with a gradient of NaN."""
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# ------------------------------------------------------------- the cascade mixer
def loop_scan(sequence, x_proj, dt_proj, dt_bias, A, D):
    """One sequence (C, L) by one set of weights, position by position."""
    rank, states = dt_proj.shape[1], A.shape[1]
    state, out = sequence.new_zeros(len(sequence), states), []
    for x in sequence.T:
        dt_low_rank, B, C = (x_proj @ x).split((rank, states, states))
        dt = F.softplus(dt_proj @ dt_low_rank + dt_bias)
        state = (dt[:, None] * A).exp() * state + (dt * x)[:, None] * B
        out.append(state @ C + D * x)
    return torch.stack(out, dim=1)


def loop_lines(lines, first, second):
    """Each of (n, C, L) forwards by the first set, backwards by the second."""
    return torch.stack(
        [
            loop_scan(line, *first) + loop_scan(line.flip(1), *second).flip(1)
            for line in lines
        ]
    )


def loop_norm(x):
    """Layer norm of (C, H, W) over C, without weights."""
    centred = x - x.mean(0)
    return centred / (centred.square().mean(0) + 1e-5).sqrt()


def loop_cascade(x, x_proj, dt_proj, dt_bias, A, Ds):
    sets = [*zip(x_proj, dt_proj, dt_bias, A.chunk(4), Ds.chunk(4))]
    maps = []
    for image in x:
        rows = loop_lines(loop_norm(image).transpose(0, 1), *sets[:2])
        columns = loop_norm(rows.transpose(0, 1)).permute(2, 0, 1)
        maps.append(loop_lines(columns, *sets[2:]).permute(1, 2, 0))
    return torch.stack(maps)


def cascade_inputs(height, width, batch=2, channels=5, rank=2, states=3):
    shapes = (
        (batch, channels, height, width),
        (4, rank + 2 * states, channels),
        (4, channels, rank),
        (4, channels),
        (4 * channels, states),
        (4 * channels,),
    )
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs[4] = -inputs[4].exp()
    return [x.requires_grad_() for x in inputs]


@pytest.mark.parametrize('size', [(3, 4), (5, 2), (1, 6), (7, 1), (1, 1)])
def test_cascade_is_the_loop(size):
    inputs = cascade_inputs(*size)
    got, want = cascade_scan(*inputs), loop_cascade(*inputs)
    weight = torch.randn_like(want)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    gradients = zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((want * weight).sum(), inputs),
    )
    for k, (a, b) in enumerate(gradients):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8, msg=f'input {k}')


@pytest.mark.parametrize('backend', ['reference', 'torch', 'cpu'])
@pytest.mark.parametrize('channels_last', [False, True])
def test_cascade_by_each_backend(backend, channels_last):
    if backend_status()[backend]:
        pytest.skip(backend_status()[backend])
    inputs = cascade_inputs(5, 9)
    want = loop_cascade(*inputs)
    x, *weights = (t.detach().float() for t in inputs)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    got = cascade_scan(x, *weights, backend=backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


def test_states_of_a_row_do_not_reach_another():
    inputs = [t.detach() for t in cascade_inputs(4, 3, batch=1)]
    x, weights = inputs[0], inputs[1:]
    weights = [w.clone() for w in weights]
    # Without inputs to its states the second pass hands the first one through.
    weights[0][2:], weights[4] = 0, torch.ones_like(weights[4])
    other = x.clone()
    other[:, :, 2] = torch.randn_like(other[:, :, 2])
    changed = (cascade_scan(x, *weights) != cascade_scan(other, *weights)).any(1)[0]
    assert changed[2].all() and not changed[[0, 1, 3]].any()


def test_wrong_cascade_inputs():
    x, *weights = cascade_inputs(2, 2)
    for inputs in (
        (x[0], *weights),
        (x[:, :, :0], *weights),
        (x, weights[0][:3], *weights[1:]),
    ):
        with pytest.raises(ValueError, match='cascade_scan: x must be'):
            cascade_scan(*inputs)


def test_cascade_mixer_uses_the_cascade():
    op = randomise(CascadeSS2D(8, d_state=2, ssm_ratio=1.5))
    x = torch.randn(2, 8, 5, 7)
    y = cascade_scan(
        F.silu(op.conv2d(op.in_proj(x))),
        op.x_proj_weight,
        op.dt_projs_weight,
        op.dt_projs_bias,
        -op.A_logs.exp(),
        op.Ds,
    )
    torch.testing.assert_close(op(x), op.out_proj(op.out_norm(y)))
    assert op.orders is None
    cross = SS2D(8, d_state=2, ssm_ratio=1.5)
    cross.load_state_dict(op.state_dict())
    assert not torch.allclose(cross(x), op(x), rtol=0.01)


def test_cascade_scans_in_float32_under_autocast():
    op = CascadeSS2D(16)
    x, entered = torch.randn(2, 16, 6, 5), []
    for layer in (op.out_norm, op.out_proj):
        layer.register_forward_pre_hook(
            lambda _, inputs: entered.append(inputs[0].dtype)
        )
    want = op(x)
    entered.clear()
    with torch.autocast('cpu', torch.bfloat16):
        got = op(x)
    assert entered == [torch.float32, torch.bfloat16]
    assert (got - want).abs().max() < 0.02 * want.abs().max()
    got.square().mean().backward()
    assert_all_learn(op)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_cascade_with_half_weights(dtype):
    op = CascadeSS2D(16)
    x = torch.randn(2, 16, 6, 5)
    want, got = op(x), op.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert (got.float() - want).abs().max() < 0.02 * want.abs().max()


def test_flops_of_the_cascade():
    """Every term written out for one mixer."""
    channels, states, pixels = 32, 4, 2 * 6 * 10
    found = count_flops(CascadeSS2D(channels, states), (2, channels, 6, 10))
    terms, rank = found.by_operator, 2
    assert terms['selective_scan'] == scan_flops(2, 4 * channels, 60, states)
    # Two norms without weights, and out_norm.
    assert terms['native_layer_norm'] == pixels * (4 + 4 + 5) * channels
    projections = 4 * channels * (rank + 2 * states + rank)
    products = terms.get('linear', 0) + terms.get('mm', 0) + terms.get('bmm', 0)
    assert products == pixels * (2 * channels**2 + projections)
    assert terms['convolution'] == pixels * 9 * channels
    assert found.flops == sum(terms.values())
    assert found.params == count_flops(SS2D(channels, states), (1, 32, 2, 2)).params


# ----------------------------------------------------------------- the switches
@every
@pytest.mark.parametrize('size', [(64, 32), (33, 47), (1, 1)])
def test_sizes_and_gradients(switches, size):
    net = VSSM({**TINY, **switches})
    maps = net(torch.randn(2, 3, *size))
    assert [x.shape[:2] for x in maps] == [(2, 8 * 2**i) for i in range(4)]
    for i, x in enumerate(maps):
        assert x.shape[2:] == tuple(math.ceil(side / 2 ** (i + 2)) for side in size)
        assert x.isfinite().all() and x.is_contiguous()
    loss(maps).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@every
def test_every_parameter_learns(switches):
    net = randomise(VSSM({**TINY, **switches}))
    maps = net(torch.randn(2, 3, 96, 64))
    sum((x * torch.randn_like(x)).sum() for x in maps).backward()
    assert_all_learn(net)


@every
def test_keys_are_the_published_ones(switches):
    keys = set(VSSBlock(8).state_dict())
    assert keys == KEYS
    net = VSSM({**TINY, **switches})
    block = net.layers[0].blocks[0]
    without = {'op.conv2d.weight'} if switches.get('ssm_conv') == -1 else set()
    assert set(block.state_dict()) == KEYS - without


@every
def test_published_checkpoints_load(switches):
    def classifier():
        net = VSSM({**TINY, **switches}, out_indices=(3,), out_norm=False)
        return ImageClassifier(net, ClassificationHead(64, 5))

    source = randomise(classifier())
    state = {
        key.removeprefix('backbone.'): value
        for key, value in source.state_dict().items()
    }
    target = classifier()
    report = load_checkpoint(target, dict(model=state))
    assert not report.missing and not report.unexpected
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(source.eval()(x), target.eval()(x))


@every
def test_layer_decay_knows_every_parameter(switches):
    names = {name for name, _ in VSSM({**TINY, **switches}).named_parameters()}
    depths, last = find_depths(names, 'the test')
    assert set(depths) == names and last == 5
    for stage in range(4):
        op = {n for n in names if n.startswith(f'layers.{stage}.blocks.0.op.')}
        assert len(op) >= 8
        assert {depths[name] for name in op} == {stage + 1}


@pytest.mark.parametrize('cascade', [False, True])
def test_with_cp_gives_the_same_gradients(cascade):
    arch = dict(TINY, forward_type='v052dc_noz' if cascade else 'v052d_noz')
    plain, saving = VSSM(arch), VSSM(arch, with_cp=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 33, 47)
    for net in (plain, saving):
        loss(net(x)).backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        assert a.grad.isfinite().all(), name
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_no_convolution_is_a_convolution_that_does_nothing():
    with_it = randomise(VSSM(TINY))
    for name, parameter in with_it.named_parameters():
        if 'op.conv2d' in name:
            parameter.data.zero_()
            parameter.data[:, :, 1, 1] = 1.0
    without = VSSM(dict(TINY, ssm_conv=-1))
    state = {k: v for k, v in with_it.state_dict().items() if '.op.conv2d' not in k}
    without.load_state_dict(state)
    x = torch.randn(2, 3, 33, 47)
    for a, b in zip(without(x), with_it(x)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    'name, act', [('silu', nn.SiLU()), ('gelu', nn.GELU()), ('relu', nn.ReLU())]
)
@pytest.mark.parametrize('gated', [False, True])
def test_activation(name, act, gated):
    op = randomise(SS2D(8, gated=gated, act_layer=name))
    x = torch.randn(2, 8, 5, 7)
    inner = op.in_proj(x)
    y, z = inner.chunk(2, dim=1) if gated else (inner, None)
    y = ss2d_scan(
        act(op.conv2d(y)),
        op.x_proj_weight,
        op.dt_projs_weight,
        op.dt_projs_bias,
        -op.A_logs.exp(),
        op.Ds,
    )
    y = op.out_norm(y) * (act(z) if gated else 1)
    torch.testing.assert_close(op(x), op.out_proj(y))


@torch.no_grad()
def test_initialisations():
    """Of table 11; x_proj_weight and the rest are the same in all of them."""
    random, zero = (SS2D(96, 4, 2.0, initialize=name) for name in ('v1', 'v2'))
    for op in (random, zero):
        assert (op.Ds == 1).all()
        assert op.x_proj_weight.abs().max() <= 192**-0.5
        assert op.x_proj_weight.std() == pytest.approx(192**-0.5 / 3**0.5, rel=0.05)
    assert random.A_logs.std() == pytest.approx(1.0, rel=0.1)
    assert random.A_logs.mean() == pytest.approx(0.0, abs=0.1)
    for steps in (random.dt_projs_weight, random.dt_projs_bias):
        assert steps.std() == pytest.approx(0.1, rel=0.1)
        assert steps.mean() == pytest.approx(0.0, abs=0.02)
    assert not zero.A_logs.any()
    for steps in (zero.dt_projs_weight, zero.dt_projs_bias):
        assert 0 <= steps.min() and steps.max() <= 0.1
        assert steps.mean() == pytest.approx(0.05, rel=0.05)
        assert steps.max() > 0.09


def test_defaults_are_the_published_ones():
    for arch in ARCH_ZOO.values():
        assert arch['ssm_conv'] == 3 and arch['ssm_init'] == 'v0'
        assert arch['ssm_act_layer'] == 'silu'


@pytest.mark.parametrize(
    'arch, message',
    [
        (dict(ssm_conv=5), r'ssm_conv must be one of \(3, -1\), got 5'),
        (dict(ssm_init='v3'), r"ssm_init must be one of \('v0', 'v1', 'v2'\)"),
        (dict(ssm_act_layer='tanh'), r"ssm_act_layer must be one of \('silu', 'gelu'"),
        (dict(forward_type='v32d'), "forward_type must be one of .*'v052dc_noz'"),
        (dict(ssm_activation='relu'), "unknown keys .'ssm_activation'.*ssm_act_layer"),
    ],
)
def test_unknown_switches(arch, message):
    with pytest.raises(ValueError, match=message):
        VSSM({**TINY, **arch})


@pytest.mark.parametrize(
    'options', [dict(d_conv=0), dict(act_layer='tanh'), dict(initialize='v3')]
)
def test_wrong_arguments_of_the_mixer(options):
    with pytest.raises(ValueError, match=f'SS2D: {next(iter(options))} must be one of'):
        SS2D(8, **options)


# -------------------------------------------------------------- the scan orders
@pytest.mark.parametrize(
    'forward_type, orders',
    [
        ('v0', 'cross'),
        ('v05_noz', 'cross'),
        ('v051d_noz', 'unidi'),
        ('v052d_noz', 'bidi'),
        ('v052dc_noz', None),
    ],
)
def test_forward_type_is_a_name_for_orders(forward_type, orders):
    net = VSSM(dict(TINY, forward_type=forward_type))
    ops = [block.op for stage in net.layers for block in stage.blocks]
    assert {op.orders for op in ops} == {orders}
    assert {type(op) for op in ops} == {SS2D if orders else CascadeSS2D}
    assert {op.gated for op in ops} == {forward_type == 'v0'}


@pytest.mark.parametrize('forward_type', ['v051d_noz', 'v052d_noz', 'v052dc_noz'])
def test_contradiction(forward_type):
    for orders in ('cross', 'hilbert', ['unidi', 'bidi'], lambda h, w: None):
        with pytest.raises(ValueError, match=f"'{forward_type}' says .*Leave one of"):
            VSSM(dict(TINY, forward_type=forward_type), orders=orders)


def test_the_same_twice_is_no_contradiction():
    net = VSSM(dict(TINY, forward_type='v051d_noz'), orders='unidi')
    assert net.layers[0].blocks[0].op.orders == 'unidi'


@every_order
@pytest.mark.parametrize('size', [(64, 32), (33, 47), (1, 1)])
def test_orders(orders, sets, size):
    net = VSSM(dict(TINY, ssm_d_state=2), orders=orders)
    op = net.layers[1].blocks[0].op
    assert op.x_proj_weight.shape == (sets, 1 + 4, 16)
    assert op.dt_projs_weight.shape == (sets, 16, 1)
    assert op.dt_projs_bias.shape == (sets, 16)
    assert op.A_logs.shape == (sets * 16, 2) and op.Ds.shape == (sets * 16,)
    assert set(net.layers[1].blocks[0].state_dict()) == KEYS
    maps = net(torch.randn(2, 3, *size))
    assert all(x.isfinite().all() for x in maps)
    loss(maps).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@every_order
def test_every_set_of_an_order_learns(orders, sets):
    op = randomise(SS2D(8, orders=orders))
    (op(torch.randn(2, 8, 5, 7)) * torch.randn(2, 8, 5, 7)).sum().backward()
    assert_all_learn(op)
    for parameter in (op.x_proj_weight, op.dt_projs_weight, op.dt_projs_bias):
        assert parameter.grad.flatten(1).any(1).all()


@every_order
def test_scans_by_the_order(orders, sets):
    """Each row on its own by the loop, on a map on which windows are padded."""
    op = randomise(SS2D(6, d_state=2, orders=orders)).double()
    x = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    inner = F.silu(op.conv2d(op.in_proj(x)))
    A, Ds = -op.A_logs.exp(), op.Ds
    weights = op.x_proj_weight, op.dt_projs_weight, op.dt_projs_bias
    sets_of_rows = [*zip(*weights, A.chunk(sets), Ds.chunk(sets))]
    want = []
    table = scan_order(orders, 5, 3)
    assert len(table) == sets
    for image in inner.flatten(2):
        # A padded place holds zeros and is dropped again.
        padded, total = F.pad(image, (0, 1)), 0
        for places, one in zip(table, sets_of_rows):
            out = torch.zeros_like(padded)
            out[:, places] = loop_scan(padded[:, places], *one)
            total = total + out[:, :-1]
        want.append(total.view(6, 5, 3))
    torch.testing.assert_close(op(x), op.out_proj(op.out_norm(torch.stack(want))))


@pytest.mark.parametrize('forward_type', ['v051d_noz', 'v052d_noz'])
def test_forward_type_scans_as_the_orders_do(forward_type):
    named = randomise(VSSM(dict(TINY, forward_type=forward_type)))
    orders = {'v051d_noz': 'unidi', 'v052d_noz': 'bidi'}[forward_type]
    ordered, cross = VSSM(TINY, orders=orders), VSSM(TINY)
    for net in (ordered, cross):
        net.load_state_dict(named.state_dict())
    x = torch.randn(1, 3, 64, 96)
    for a, b, c in zip(named(x), ordered(x), cross(x)):
        assert torch.equal(a, b) and not torch.allclose(a, c, rtol=0.01)


def test_gated_form_by_another_order():
    net = VSSM(dict(TINY, forward_type='v0'), orders='spiral')
    op = net.layers[0].blocks[0].op
    assert op.gated and op.orders == 'spiral' and op.conv2d.bias is not None
    loss(net(torch.randn(1, 3, 33, 47))).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_built_first_without_memory():
    """What is kept of a scan order is no tensor of the device it was asked on."""
    orders = ['hilbert', 'windows2']
    with torch.device('meta'):
        VSSM(TINY, orders=orders)
    count_flops(VSSM(TINY, orders=orders), (1, 3, 52, 76))
    maps = VSSM(TINY, orders=orders)(torch.randn(1, 3, 52, 76))
    assert all(x.isfinite().all() for x in maps)


@pytest.mark.parametrize('orders, sets', [('hilbert', 4), (['cross', 'spiral'], 8)])
def test_flops_count_the_sets(orders, sets):
    found = count_flops(SS2D(32, 4, orders=orders), (2, 32, 6, 10)).by_operator
    assert found['ss2d_scan: scan'] == scan_flops(2, sets * 32, 60, 4)
    assert found['ss2d_scan: projections'] == 120 * sets * 32 * (2 + 8 + 2)


def test_unknown_order():
    with pytest.raises(ValueError, match="no scan order 'diagonal'.*'diagonals'"):
        VSSM(TINY, orders='diagonal')


def test_default_calls_the_op_as_ever(monkeypatch):
    calls = []

    def record(*args):
        calls.append(args)
        return ss2d_scan(*args)

    monkeypatch.setattr(module, 'ss2d_scan', record)
    VSSM(TINY)(torch.randn(1, 3, 32, 32))
    VSSM(TINY, orders='cross')(torch.randn(1, 3, 32, 32))
    assert [len(args) for args in calls] == [6] * 8
