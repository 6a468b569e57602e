"""When the mixer of Vim and Mamba® calls its modules; otherwise it costs nothing."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import utils
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from compare import relative_error
from mmvssm.layers import BidirectionalMamba
from mmvssm.layers import bimamba as module
from mmvssm.layers.linear import Linear
from mmvssm.ops import Direction, backend_status, bidirectional_scan, use_backend

CHILDREN = [
    name + end for name in ('conv1d', 'x_proj', 'dt_proj') for end in ('', '_b')
]
every_child = pytest.mark.parametrize('name', CHILDREN)
BACKENDS = [
    name
    for name, reason in backend_status().items()
    if name in ('cpu', 'torch', 'reference') and reason is None
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def fused(monkeypatch):
    """A list with an entry a call of the op that computes both directions."""
    calls = []

    def spy(*args, **kwargs):
        calls.append(args)
        return bidirectional_scan(*args, **kwargs)

    monkeypatch.setattr(module, 'bidirectional_scan', spy)
    return calls


def mixer(**options):
    net = BidirectionalMamba(8, 4, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return net


def watch(module, *args):
    """A hook that changes nothing."""


HOOKS = dict(
    forward=nn.Module.register_forward_hook,
    forward_pre=nn.Module.register_forward_pre_hook,
    backward=nn.Module.register_full_backward_hook,
    backward_pre=nn.Module.register_full_backward_pre_hook,
)
GLOBAL_HOOKS = dict(
    forward=torch_module.register_module_forward_hook,
    forward_pre=torch_module.register_module_forward_pre_hook,
    backward=torch_module.register_module_full_backward_hook,
    backward_pre=torch_module.register_module_full_backward_pre_hook,
)


# ------------------------------------------------------------------ the same numbers
def all_gradients(net, x):
    x = x.clone().requires_grad_()
    y = net(x)
    y.float().square().sum().backward()
    grads = [x.grad, *(p.grad for p in net.parameters())]
    return y, torch.cat([grad.double().flatten() for grad in grads])


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('length', [1, 3, 70])
@pytest.mark.parametrize(
    'options', [{}, {'average': False}, {'d_conv': 1}, {'d_conv': 7, 'expand': 3}]
)
def test_same_numbers(backend, length, options, fused):
    net = mixer(**options)
    called = copy.deepcopy(net)
    called.x_proj_b.register_forward_hook(watch)
    x = torch.randn(2, length, 8)
    with use_backend(backend):
        want, grads = all_gradients(net, x)
        assert len(fused) == 1
        got, called_grads = all_gradients(called, x)
    assert len(fused) == 1
    assert relative_error(got, want) < 1e-6
    assert relative_error(called_grads, grads) < 5e-6


@pytest.mark.parametrize('precision', ['bfloat16', 'float16', 'autocast', 'float64'])
def test_precisions(precision):
    """As exact as the op, or nearly; the same dtypes."""
    net = mixer()
    exact = copy.deepcopy(net).double()
    x = torch.randn(2, 40, 8)
    want, exact_grads = all_gradients(exact, x.double())
    dtype = torch.float32 if precision == 'autocast' else getattr(torch, precision)
    errors = []
    for hooked in (False, True):
        other = copy.deepcopy(net).to(dtype)
        if hooked:
            other.conv1d.register_forward_hook(watch)
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'autocast'):
            got, grads = all_gradients(other, x.to(dtype))
        assert got.dtype == (torch.bfloat16 if precision == 'autocast' else dtype)
        errors.append((relative_error(got, want), relative_error(grads, exact_grads)))
    for op, called in zip(*errors):
        assert called < 1.6 * op + 1e-12


@every_child
def test_bias_of_the_step_sizes_stays_in_float32(name, monkeypatch):
    """Unless ``dt_proj`` itself has to be called."""
    seen = []
    scan = module.selective_scan

    def spy(*args, **kwargs):
        seen.append(kwargs['delta_bias'])
        # The directions are added up in float32, too.
        assert args[0].dtype == torch.float32
        return scan(*args, **kwargs)

    monkeypatch.setattr(module, 'selective_scan', spy)
    net = mixer().bfloat16()
    getattr(net, name).register_forward_hook(watch)
    net(torch.randn(1, 5, 8).bfloat16())
    for bias, end in zip(seen, ('', '_b'), strict=True):
        if name == f'dt_proj{end}':
            assert bias is None
        else:
            assert bias.dtype == torch.float32
            assert torch.equal(bias, getattr(net, f'dt_proj{end}').bias.float())


def test_what_modules_see():
    """The sequence, for the backward direction from its end."""
    net = mixer()
    seen = {}
    for name in CHILDREN:
        getattr(net, name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: (args[0], out)})
        )
    x = torch.randn(2, 9, 8)
    net(x)
    into = net.in_proj(x).chunk(2, -1)[0]
    for end, sequence in (('', into), ('_b', into.flip(1))):
        assert torch.equal(seen[f'conv1d{end}'][0], sequence.mT)
        u = F.silu(seen[f'conv1d{end}'][1][..., :9]).mT
        torch.testing.assert_close(seen[f'x_proj{end}'][0], u)
        read = seen[f'x_proj{end}'][1]
        assert read.shape == (2, 9, 1 + 2 * 4)
        assert torch.equal(seen[f'dt_proj{end}'][0], read[..., :1])
        assert seen[f'dt_proj{end}'][1].shape == (2, 9, 16)
        # Causal: the first position sees itself alone.
        conv = getattr(net, f'conv1d{end}')
        first = conv.weight[:, 0, -1] * sequence[:, 0] + conv.bias
        torch.testing.assert_close(seen[f'conv1d{end}'][1][..., 0], first)


# ------------------------------------------------------------------ which way is taken
@every_child
@pytest.mark.parametrize('kind', HOOKS)
def test_hooks_fire(name, kind, fused):
    net = mixer()
    fired = []
    child = getattr(net, name)
    handle = HOOKS[kind](child, lambda *args: fired.append(name))
    net(torch.randn(1, 5, 8)).sum().backward()
    assert fired == [name] and not fused
    handle.remove()
    net(torch.randn(1, 5, 8)).sum().backward()
    assert fired == [name] and len(fused) == 1


@pytest.mark.parametrize('kind', GLOBAL_HOOKS)
def test_hooks_of_all_modules_fire(kind, fused):
    net = mixer()
    seen = []
    with GLOBAL_HOOKS[kind](lambda module, *args: seen.append(module) or None):
        net(torch.randn(1, 5, 8, requires_grad=True)).sum().backward()
    assert {*net.modules()} <= {*seen} and not fused
    net(torch.randn(1, 5, 8))
    assert len(fused) == 1


def test_counting_does_not_change_what_is_counted(fused):
    with FlopCounterMode(display=False):
        mixer()(torch.randn(1, 5, 8))
    assert len(fused) == 1


def test_forward_of_a_single_module_replaced(fused):
    net = mixer()
    want = net(torch.ones(1, 5, 8))
    forward = net.x_proj.forward
    net.x_proj.forward = lambda x: 2 * forward(x)
    fused.clear()
    got = net(torch.ones(1, 5, 8))
    assert not fused and relative_error(got, want) > 1e-3
    del net.x_proj.forward
    assert torch.equal(net(torch.ones(1, 5, 8)), want)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.filterwarnings('ignore:.*deprecated:FutureWarning')
@every_child
def test_computed_weights(name, fused):
    """The op reads what a parametrisation gives; what a hook computes needs calls."""
    x = torch.randn(1, 5, 8)
    for attach, args, remove, is_read in (
        (parametrizations.weight_norm, (), parametrize.remove_parametrizations, True),
        (parametrizations.spectral_norm, (), parametrize.remove_parametrizations, True),
        (utils.weight_norm, (), utils.remove_weight_norm, False),
        (utils.spectral_norm, (), utils.remove_spectral_norm, False),
        (prune.identity, ('weight',), prune.remove, False),
    ):
        net = mixer()
        child = getattr(net, name)
        attach(child, *args)
        fused.clear()
        net(x)
        assert bool(fused) == is_read, attach
        remove(child, 'weight')
        fused.clear()
        net(x)
        assert len(fused) == 1, attach


def test_parametrised_bias(fused):
    net = mixer()
    by_hand = copy.deepcopy(net)
    for name in ('conv1d', 'dt_proj_b'):
        parametrize.register_parametrization(getattr(net, name), 'bias', Double())
        with torch.no_grad():
            getattr(by_hand, name).bias.mul_(2)
    x = torch.randn(1, 5, 8)
    assert torch.equal(net(x), by_hand(x)) and len(fused) == 2


class OwnLinear(nn.Linear):
    """A subclass may do anything."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_subclass_with_a_parametrisation(fused):
    net = mixer()
    net.x_proj.__class__ = OwnLinear
    parametrize.register_parametrization(net.x_proj, 'weight', Double())
    net(torch.randn(1, 5, 8))
    assert not fused


def test_cached_parametrisation():
    """Within ``parametrize.cached`` the weight is computed once."""
    net = mixer()
    calls = []

    class Counting(nn.Module):
        def forward(self, weight):
            calls.append(1)
            return 2 * weight

    parametrize.register_parametrization(net.x_proj, 'weight', Counting())
    calls.clear()
    x = torch.randn(1, 5, 8)
    with parametrize.cached():
        first, second = net(x), net(x)
    assert len(calls) == 1 and torch.equal(first, second)
    net(x)
    net(x)
    assert len(calls) == 3


# ------------------------------------------------------------------ other modules
def depthwise(kernel, **options):
    return nn.Conv1d(16, 16, kernel, **{'groups': 16, 'padding': kernel - 1} | options)


@pytest.mark.parametrize(
    'name, layer, is_read',
    [
        ('conv1d', lambda: depthwise(2), True),
        ('conv1d', lambda: depthwise(4, bias=False), False),
        ('conv1d', lambda: depthwise(4, groups=1), False),
        ('conv1d', lambda: depthwise(3, dilation=2, padding=4), False),
        ('conv1d', lambda: depthwise(4, padding_mode='circular'), False),
        ('conv1d', lambda: depthwise(3, padding=1), False),
        ('x_proj_b', lambda: Linear(16, 9, bias=False), True),
        ('x_proj_b', lambda: nn.Linear(16, 9), False),
        ('x_proj_b', lambda: nn.Sequential(nn.Linear(16, 9)), False),
        ('dt_proj', lambda: nn.Linear(1, 16), True),
        ('dt_proj', lambda: nn.Linear(1, 16, bias=False), False),
    ],
)
def test_other_layers(name, layer, is_read, fused):
    """A layer that the op cannot compute is called."""
    net, layer = mixer(), layer()
    setattr(net, name, layer)
    called = copy.deepcopy(net)
    called.in_proj.register_forward_hook(watch)
    getattr(called, name).register_forward_hook(watch)
    x = torch.randn(2, 20, 8)
    got = net(x)
    assert bool(fused) == is_read
    assert relative_error(got, called(x)) < 1e-6
    got.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize('called', [False, True])
def test_another_rank(called, fused):
    """Of the low-rank form of the step sizes."""
    net, rank = mixer(), 3
    net.x_proj = nn.Linear(16, rank + 8, bias=False)
    net.dt_proj = nn.Linear(rank, 16)
    if called:
        net.dt_proj.register_forward_hook(watch)
    net(torch.randn(2, 20, 8)).square().sum().backward()
    assert bool(fused) != called
    assert net.x_proj.weight.grad.abs().amax(1).min() > 0


class Wrong(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


@pytest.mark.parametrize(
    'name, layer, message',
    [
        (
            'conv1d',
            depthwise(4, padding=0),
            r'conv1d must give .*\(2, 16, 17\).*padding',
        ),
        ('conv1d_b', depthwise(4, stride=2), r'conv1d must give \(2, 16, 20\)'),
        ('conv1d', Wrong(lambda x: (x, x)), 'conv1d must give .* tuple'),
        (
            'x_proj',
            nn.Linear(16, 8),
            r'x_proj must give .* R \+ 8 channels',
        ),
        ('x_proj', Wrong(lambda x: x[:, 1:, :9]), r'x_proj must give \(2, 20\)'),
        ('dt_proj', nn.Linear(1, 15), r'dt_proj must give \(2, 20, 16\)'),
        (
            'dt_proj',
            Wrong(lambda x: x),
            r'dt_proj must give \(2, 20, 16\).*\(2, 20, 1\)',
        ),
    ],
)
def test_wrong_shapes(name, layer, message):
    net = mixer()
    setattr(net, name, layer)
    if name.startswith('dt_proj'):
        net.x_proj.register_forward_hook(watch)
    with pytest.raises(ValueError, match=message):
        net(torch.randn(2, 20, 8))


# ------------------------------------------------------------------ no slower without
def direct(net, x):
    """The mixer without a look at its modules."""
    x, z = net.in_proj(x).chunk(2, dim=-1)
    y = bidirectional_scan(
        x.mT,
        z.mT,
        direction(net.conv1d, net.x_proj, net.dt_proj, net.A_log, net.D),
        direction(net.conv1d_b, net.x_proj_b, net.dt_proj_b, net.A_b_log, net.D_b),
        average=net.average,
    )
    return net.out_proj(y.mT)


def direction(conv, x_proj, dt_proj, A_log, D):
    return Direction(
        conv.weight.squeeze(1),
        conv.bias,
        x_proj.weight,
        dt_proj.weight,
        full(dt_proj.bias),
        -full(A_log).exp(),
        full(D),
    )


def full(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def python_calls(function):
    count = 0

    def look(frame, event, argument):
        nonlocal count
        count += event == 'call'

    sys.setprofile(look)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize('training', [False, True])
def test_no_more_calls_without_adapters(training):
    """Neither of torch nor of Python, forward and backward."""
    net, x = mixer(), torch.randn(1, 40, 8)
    counts, ops = [], []
    for function in (lambda: direct(net, x), lambda: net.forward(x)):

        def run(function=function):
            with torch.set_grad_enabled(training):
                y = function()
                if training:
                    y.sum().backward()

        run()
        counts.append(min(python_calls(run) for _ in range(3)))
        with Ops() as watched:
            run()
        ops.append(watched.seen)
    assert sorted(ops[0]) == sorted(ops[1])
    assert counts[1] <= counts[0]
