"""What whole models promise: errors, memory for backward, derivatives, FLOPs.

``docs/contracts.md`` has the tables; ``python -m pytest tests/test_contracts.py -s``
prints them.
"""

import copy
import functools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from compare import relative_error
from families import FAMILIES
from mmvssm.analysis.flops import count_flops
from mmvssm.backbones import MambaR, Vim, hierarchical, isotropic
from mmvssm.layers import MambaBlock, MLLABlock, VSSBlock
from mmvssm.ops import backend_status, use_backend

every_family = pytest.mark.parametrize('name', FAMILIES)
every_backend = pytest.mark.parametrize(
    'backend',
    [
        pytest.param(
            name, marks=[pytest.mark.skipif(reason is not None, reason=str(reason))]
        )
        for name, reason in backend_status().items()
        if name in ('cpu', 'torch')
    ],
)


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@functools.cache
def model(name):
    """Weights that are never changed; BatchNorm has seen an image."""
    torch.manual_seed(0)
    net = FAMILIES[name]().train()
    with torch.no_grad():
        net(random(2, 3, 48, 40, dtype=torch.float32))
    return net.eval()


# ------------------------------------------------------------------ errors
# Relative errors of the maps, and of all gradients together: twice what was measured.
ERRORS = {
    'vmamba_v0': dict(
        float32=(4e-7, 5e-7),
        bfloat16=(7e-3, 1e-2),
        float16=(9e-4, 1.4e-3),
        autocast=(9e-3, 1.1e-2),
    ),
    'vmamba_v05_noz': dict(
        float32=(5e-7, 9e-7),
        bfloat16=(1e-2, 1.5e-2),
        float16=(1.3e-3, 1.9e-3),
        autocast=(1.2e-2, 1.5e-2),
    ),
    'vim': dict(
        float32=(5e-7, 8e-7),
        bfloat16=(1.1e-2, 1.2e-2),
        float16=(1.4e-3, 1.5e-3),
        autocast=(1.3e-2, 1.4e-2),
    ),
    'mambar': dict(
        float32=(5e-7, 8e-7),
        bfloat16=(1.1e-2, 1.3e-2),
        float16=(1.4e-3, 1.5e-3),
        autocast=(1.3e-2, 1.4e-2),
    ),
    'mlla': dict(
        float32=(3e-7, 6e-7),
        bfloat16=(9e-3, 6e-2),
        float16=(1.2e-3, 5e-3),
        autocast=(1.1e-2, 5e-2),
    ),
}
CAST = {'bfloat16': torch.bfloat16, 'float16': torch.float16}


def maps_and_gradients(net, x, precision=None):
    """Maps, and the gradients of image and weights in one vector."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'autocast'):
        maps = net(x)
    weights = [random(*y.shape, seed=1).to(y) for y in maps]
    leaves = [x, *net.parameters()]
    grads = torch.autograd.grad(maps, leaves, weights)
    return [torch.cat([t.double().flatten() for t in ts]) for ts in (maps, grads)]


@every_family
@every_backend
@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'float16', 'autocast'])
def test_errors(name, backend, precision):
    """Against the definition, in float64, of the same weights and image."""
    if precision == 'float16' and backend == 'cpu':
        pytest.skip('its kernels read float32 and bfloat16')
    net = copy.deepcopy(model(name)).to(CAST.get(precision, torch.float32))
    x = random(2, 3, 48, 40).to(CAST.get(precision, torch.float32))
    with use_backend('reference'):
        truth = maps_and_gradients(copy.deepcopy(net).double(), x.double())
    with use_backend(backend):
        found = maps_and_gradients(net, x, precision)
    errors = [relative_error(a, b) for a, b in zip(found, truth)]
    print(f'| {name} | {backend} | {precision} | {errors[0]:.1e} | {errors[1]:.1e} |')
    bounds = ERRORS[name][precision]
    assert errors[0] < bounds[0] and errors[1] < bounds[1]


# ------------------------------------------------ memory for the backward pass
# Bytes saved by a block as multiples of those of the map or sequence that it takes, a
# tenth more than what was measured. Vim's and Mamba®'s block takes a stream, too.
BLOCKS = {
    'VSSBlock v0': lambda: (VSSBlock(32, 16, 2.0, gated=True, mlp_ratio=0.0), 2),
    'VSSBlock v05_noz': lambda: (VSSBlock(32), 2),
    'MambaBlock': lambda: (MambaBlock(32), 1),
    'MLLABlock': lambda: (MLLABlock(32, 2), 2),
}
SAVED = {
    'VSSBlock v0': dict(cpu=29, torch=47),
    'VSSBlock v05_noz': dict(cpu=20, torch=28),
    'MambaBlock': dict(cpu=16, torch=62),
    'MLLABlock': dict(cpu=26, torch=26),
}


def bytes_saved(function, parameters):
    """Result of a function, and the bytes it saves: each memory once, no parameters."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    seen = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            # Kept, so that no other tensor gets this memory meanwhile.
            seen[storage.data_ptr()] = storage
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        result = function()
    return result, sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize('kind', BLOCKS)
@every_backend
def test_bytes_saved_by_a_block(kind, backend):
    torch.manual_seed(0)
    block, axes = BLOCKS[kind]()
    if axes == 2:
        x = random(2, 32, 24, 24, dtype=torch.float32)
        inputs = (x.contiguous(memory_format=torch.channels_last).requires_grad_(),)
    else:
        x = random(2, 576, 32, dtype=torch.float32)
        inputs = (x.requires_grad_(), random(*x.shape, dtype=torch.float32))
    with use_backend(backend):
        _, saved = bytes_saved(lambda: block(*inputs), block.parameters())
    times = saved / (4 * x.numel())
    print(f'| {kind} | {backend} | {times:.1f} |')
    assert 1 < times < SAVED[kind][backend]


@every_family
def test_checkpointed_blocks_save_their_input(name, monkeypatch):
    found = []
    checkpoint = hierarchical.checkpoint

    def watched(block, *inputs, **options):
        result, saved = bytes_saved(
            lambda: checkpoint(block, *inputs, **options), net.parameters()
        )
        found.append((saved, sum(x.nbytes for x in inputs if x is not None)))
        return result

    monkeypatch.setattr(hierarchical, 'checkpoint', watched)
    monkeypatch.setattr(isotropic, 'checkpoint', watched)
    net = FAMILIES[name](with_cp=True)
    x = random(2, 3, 48, 40, dtype=torch.float32)
    sum(y.sum() for y in net(x)).backward()
    assert len(found) == 2
    assert all(0 < saved <= given for saved, given in found), found


# ------------------------------------------------------------------ derivatives
# Of functions of the image and the weights together, in float64.


def function_of(net):
    """Maps in one vector as a function of leaves, and the leaves."""
    names = list(dict(net.named_parameters()))
    buffers = dict(net.named_buffers())

    def maps(x, *weights):
        state = dict(zip(names, weights)) | buffers
        return torch.cat([y.flatten() for y in functional_call(net, state, (x,))])

    leaves = [p.detach() for p in net.parameters()]
    return maps, (random(2, 3, 16, 12), *leaves)


def moved(leaves, direction, step):
    return [x + step * v for x, v in zip(leaves, direction)]


def directions(leaves):
    return [random(*x.shape, seed=i) for i, x in enumerate(leaves)]


def differences(function, leaves, direction, step):
    """Derivative of a function along a direction, by central differences."""
    ahead, behind = (function(*moved(leaves, direction, s)) for s in (step, -step))
    return (ahead - behind) / (2 * step)


@every_family
def test_jvp(name):
    maps, leaves = function_of(copy.deepcopy(model(name)).double())
    direction = directions(leaves)
    _, got = torch.func.jvp(maps, tuple(leaves), tuple(direction))
    with torch.no_grad():
        want = differences(maps, leaves, direction, 1e-6)
    assert relative_error(got, want) < 1e-6


@every_family
@every_backend
def test_func_grad(name, backend):
    net = model(name)
    x = random(2, 3, 16, 12, dtype=torch.float32)
    maps, (_, *leaves) = function_of(net)
    with use_backend(backend):
        found = torch.func.grad(lambda ps: maps(x, *ps).square().mean())(leaves)
        want = torch.autograd.grad(
            torch.cat([y.flatten() for y in net(x)]).square().mean(),
            list(net.parameters()),
        )
    vectors = [torch.cat([t.flatten() for t in ts]) for ts in (found, want)]
    assert relative_error(*vectors) < 1e-5


@every_family
def test_double_backward(name):
    """Of a penalty on the gradient, by all leaves."""
    maps, leaves = function_of(copy.deepcopy(model(name)).double())
    direction = directions(leaves)

    def gradient(*leaves, create_graph=False):
        leaves = [x.detach().requires_grad_() for x in leaves]
        loss = maps(*leaves).square().mean()
        grads = torch.autograd.grad(loss, leaves, create_graph=create_graph)
        return leaves, grads

    def flat(ts):
        return torch.cat([t.flatten() for t in ts])

    at, grads = gradient(*leaves, create_graph=True)
    along = sum((g * v).sum() for g, v in zip(grads, direction))
    got = flat(torch.autograd.grad(along, at))
    want = differences(lambda *ps: flat(gradient(*ps)[1]), leaves, direction, 1e-6)
    assert relative_error(got, want) < 1e-5


@every_family
def test_vmap(name):
    net = model(name)
    images = random(3, 3, 16, 12, dtype=torch.float32)
    with torch.no_grad():
        found = torch.func.vmap(lambda x: tuple(y[0] for y in net(x[None])))(images)
        for i, x in enumerate(images):
            for got, want in zip(found, net(x[None]), strict=True):
                assert relative_error(got[i], want[0]) < 2e-6


# ------------------------------------------------------------------ FLOPs
# Of whole terms of the scan's own formula, which has no products.
SCANS = ('ss2d_scan: scan', 'bidirectional_scan: scans')
# The widths of the published models: tensor code has Vim's convolutions as products
# of elements, which torch does not count, and they weigh less the wider a model is.
WIDE = dict(embed_dims=192, depth=2)


@every_family
@every_backend
def test_flop_counter_sees_the_work(name, backend):
    """torch counts a multiply-add as two, and neither norms nor resizing."""
    wide = {'vim': Vim, 'mambar': MambaR}.get(name)
    net = model(name) if wide is None else wide(WIDE).eval()
    shape = (2, 3, 64, 48)
    terms = count_flops(net, shape).by_operator
    want = sum(
        flops if term in SCANS else 2 * flops
        for term, flops in terms.items()
        if not term.startswith('native')
    )
    with use_backend(backend), FlopCounterMode(display=False) as counter:
        net(torch.zeros(shape))
    found = counter.get_total_flops()
    print(f'| {name} | {backend} | {found / want - 1:+.2%} |')
    assert found == pytest.approx(want, rel=0.02)
