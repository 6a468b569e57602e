"""The CUDA kernels of the scan with several states a channel, emulated on the CPU.

Numbers and gradients against the definition in float64, and races: the same bits in any
order of warps and CTAs, other ones or none with any barrier left out.
"""

import re
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

from mmvssm.ops import scan_order
from mmvssm.ops.cuda import kernels, many_states, many_states_call, nvrtc
from mmvssm.ops.cuda.scan import Scan
from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions
from mmvssm.ops.selective_scan.reference import ReferenceScan

from .bidirectional_inputs import call, make_inputs
from .cuda_emulation import AVAILABLE, Emulator
from .cuda_emulation.guarded import guarded, stays_inside
from .cuda_emulation.orders import differs_in_some_order, fail_without
from .scan_inputs import as_double, gradients, relative_error

pytestmark = pytest.mark.skipif(not AVAILABLE, reason='needs a C++ compiler on Linux')
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
# How many multiprocessors there are says how a sequence is cut.
WAYS = {'whole': 0, 'split': 10**6}
ROWS = ('u', 'delta', 'z', 'dt_low_rank')
GRADIENTS = ('u', 'delta', 'z', 'A', 'B', 'C', 'D', 'bias')


class Gpu(Emulator):
    """One with a number of multiprocessors."""

    def __init__(self, multiprocessors):
        self._multiprocessors = multiprocessors

    def multiprocessors(self, on):
        return self._multiprocessors


@pytest.fixture(params=WAYS)
def way(request):
    """CTAs walk whole sequences, or each chunk has one that looks back."""
    with kernels.use_machine(Gpu(WAYS[request.param])):
        yield request.param


@pytest.fixture
def split():
    with kernels.use_machine(Gpu(WAYS['split'])):
        yield


def make_scan(
    batch,
    channels,
    length,
    states,
    groups=1,
    rank=0,
    without=(),
    channels_last=True,
    dtype=FLOAT,
    softplus=True,
    **order,
):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def rows(*shape):
        x = normal(*shape).to(dtype)
        return x.movedim(-1, 1).contiguous().movedim(1, -1) if channels_last else x

    parameters = dict(D=normal(channels), bias=normal(channels) - 1)
    rows_of_all = dict(u=rows(batch, channels, length), z=rows(batch, channels, length))
    if rank:
        rows_of_all['dt_low_rank'] = rows(batch, rank, length)
        parameters['dt_weight'] = normal(channels, rank) / rank**0.5
    else:
        rows_of_all['delta'] = rows(batch, channels, length)
    if not softplus:
        rows_of_all['delta'] = rows_of_all['delta'].abs() / 4
        parameters['bias'] = parameters['bias'].abs()
    inputs = {**rows_of_all, **parameters}
    return Scan(
        **{name: x for name, x in inputs.items() if name not in without},
        A=-torch.exp(normal(channels, states)),
        B=rows(batch, groups, states, length),
        C=rows(batch, groups, states, length),
        softplus=softplus,
        **order,
    )


def definition(scan, add=0.0, scale=1.0):
    """Output and last state, in float64 and differentiable."""
    places = scan.u.shape[2]
    if scan.order is not None:
        order = scan.order.long()
    else:
        order = torch.arange(places)
        if scan.route % 2 == 1:
            order = order.view(-1, scan.width).mT.flatten()
        if scan.route >= 2:
            order = order.flip(0)
    there = order >= 0

    def along(x):
        return x[..., order.clamp(min=0)] * there

    inputs = ScanInputs(
        u=along(scan.u),
        delta=along(scan.delta),
        A=scan.A,
        B=along(scan.B),
        C=along(scan.C),
        D=scan.D,
        delta_bias=scan.bias,
    )
    options = ScanOptions(scan.softplus, torch.float64)
    y, state = ReferenceScan().forward(inputs, options, keep=False).outputs
    out = torch.zeros_like(scan.u).index_add(2, order[there], y[..., there]) + add
    return out if scan.z is None else out * F.silu(scan.z) * scale, state


def run(scan, out_dtype=FLOAT, add=None, scale=1.0, put_total=False):
    """Output, last state, and what is kept."""
    batch, channels, _ = scan.u.shape
    states = scan.A.shape[1]
    out = torch.empty_like(scan.u, dtype=out_dtype)
    last = torch.empty(batch, channels, states)
    saved = torch.empty(many_states.saved_shape(batch, scan.length, states, channels))
    many_states.forward(scan, out, last, saved, add, scale, put_total)
    return out, last, saved


def run_backward(scan, saved, grad_out, grad_last, grad_u=None, **kwargs):
    """Gradients by name."""
    dtype = scan.u.dtype
    found = dict(u=torch.empty_like(scan.u) if grad_u is None else grad_u)
    found['delta'] = torch.empty_like(scan.u, dtype=scan.B.dtype)
    found['z'] = None if scan.z is None else torch.empty_like(scan.u, dtype=dtype)
    rest = many_states.backward(
        *(scan, saved, grad_out, grad_last),
        rows=(found['u'], found['delta'], found['z']),
        **kwargs,
    )
    found.update(zip('ABCD', rest), bias=rest[4])
    found.update({name: found[name].mT for name in 'BC'})
    return found


def double(scan):
    """The same in float64, with whole step sizes, as leaves."""
    tensors = {
        field.name: getattr(scan, field.name)
        for field in fields(scan)
        if torch.is_tensor(getattr(scan, field.name)) and field.name != 'order'
    }
    tensors = {name: x.detach().double() for name, x in tensors.items()}
    if scan.delta is None:
        weight, low_rank = tensors.pop('dt_weight'), tensors.pop('dt_low_rank')
        tensors['delta'] = weight @ low_rank
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    return replace(scan, **leaves, dt_low_rank=None, dt_weight=None), leaves


def compare(scan, tolerance=2e-6, rounded=None, last_grad=True):
    """Outputs and gradients with those of the definition.

    Args:
        scan: The inputs.
        tolerance: Of errors.
        rounded: Of those that are rounded to the dtype of the inputs.
        last_grad: Whether there is a gradient of the last state.
    """
    generator = torch.Generator().manual_seed(1)
    out, last, saved = run(scan)
    wide, leaves = double(scan)
    want = definition(wide)
    for got, right in zip((out, last), want):
        assert relative_error(got, right) < tolerance
    grads = [torch.randn(x.shape, generator=generator) for x in want]
    grads[0] = torch.empty_like(scan.u).copy_(grads[0])
    if not last_grad:
        grads[1] = torch.zeros_like(grads[1])
    got = run_backward(scan, saved, grads[0], grads[1] if last_grad else None)
    right = torch.autograd.grad(
        want, list(leaves.values()), [g.double() for g in grads]
    )
    errors = {name: relative_error(got[name], x) for name, x in zip(leaves, right)}
    for name, error in errors.items():
        bound = rounded if rounded and name in ROWS else tolerance
        assert error < bound, errors


# Numbers


@pytest.mark.parametrize('states', [2, 3, 5, 8, 13, 16, 17, 40, 64, 200, 256])
def test_states(split, states):
    compare(make_scan(1, 8, 35, states))


@pytest.mark.parametrize('length', [1, 15, 16, 17, 100])
@pytest.mark.parametrize('channels', [5, 100])
def test_sizes(way, channels, length):
    compare(make_scan(2, channels, length, 16, without=('z',)))


@pytest.mark.parametrize('groups', [1, 3])
@pytest.mark.parametrize('channels_last', [True, False])
@pytest.mark.parametrize('without', [(), ('D', 'z', 'bias')], ids=['all', 'plain'])
def test_options_and_layouts(split, without, channels_last, groups):
    compare(make_scan(1, 8 * groups, 37, 8, groups, 0, without, channels_last))


def test_without_softplus(way):
    compare(make_scan(1, 32, 37, 16, softplus=False))


def test_without_a_gradient_of_the_last_state(split):
    compare(make_scan(2, 32, 40, 16), last_grad=False)


@pytest.mark.parametrize('route', [0, 1, 2, 3])
def test_routes(way, route):
    compare(make_scan(1, 8, 48, 16, rank=3, without=('z',), route=route, width=8))


def test_a_table_with_padded_places(split):
    order = scan_order('windows2', 5, 7)
    for row in order.int()[:2]:
        assert (row < 0).any()
        scan = make_scan(1, 8, 35, 16, rank=3, without=('z',), order=row.contiguous())
        compare(scan)


@pytest.mark.parametrize('rank', [1, 12, 24, 48, 65])
def test_ranks(split, rank):
    compare(make_scan(1, 40, 37, 16, rank=rank, without=('z',)))


@pytest.mark.parametrize(('dtype', 'rank'), [(BF16, 0), (HALF, 12), (BF16, 48)])
def test_16_bits(split, dtype, rank):
    """Products of 16-bit numbers are exact, sums are float32, results rounded once."""
    scan = make_scan(1, 32, 37, 16, rank=rank, dtype=dtype)
    compare(scan, tolerance=1e-5, rounded=1e-2)
    wide, _, _ = run(scan)
    got, _, _ = run(scan, out_dtype=dtype)
    assert torch.equal(got, wide.to(dtype))


def test_weights_of_16_bits(split):
    """They take one term, and are as exact as in float32."""
    scan = make_scan(1, 32, 37, 16, rank=12, dtype=BF16)
    scan.dt_weight = scan.dt_weight.to(BF16)
    narrow, *_ = run(scan)
    wide, *_ = run(replace(scan, dt_weight=scan.dt_weight.float()))
    assert relative_error(narrow, wide) < 2e-7


@pytest.mark.parametrize('states', [16, 17])
def test_terms_that_are_added(split, states):
    """Before a gate with a factor; backwards, to the gradient of u."""
    scan = make_scan(1, 32, 37, states)
    generator = torch.Generator().manual_seed(1)
    add, grad_out, grad_u = (
        torch.empty_like(scan.u).copy_(torch.randn(scan.u.shape, generator=generator))
        for _ in range(3)
    )
    wide, leaves = double(scan)
    want, _ = definition(wide, add.double(), 0.5)
    before = add.clone()
    out, _, saved = run(scan, add=add, scale=0.5)
    assert torch.equal(add, before)
    assert relative_error(out, want) < 2e-6
    assert torch.equal(run(scan, add=add, scale=0.5, put_total=True)[0], out)
    total, _ = definition(replace(wide, z=None), before.double())
    assert relative_error(add, total) < 2e-6
    got = run_backward(
        *(scan, saved, grad_out, None, grad_u.clone()), add=True, total=add, scale=0.5
    )
    right = dict(
        zip(leaves, torch.autograd.grad(want, list(leaves.values()), grad_out.double()))
    )
    right['u'] = right['u'] + grad_u
    for name in GRADIENTS:
        assert relative_error(got[name], right[name]) < 2e-6, name


def test_more_splits_than_one_looks_back_at(split):
    scan = make_scan(1, 4, 16 * 20 + 5, 4)
    # States live long enough to be seen from far.
    scan.A *= 1e-3
    compare(scan)


def test_growth_from_a_zero_state(way):
    """A positive A may overflow the growth of a split, not a state of zero."""
    scan = make_scan(1, 4, 200, 4, without=('z', 'bias'), softplus=False)
    scan.A.fill_(40.0)
    scan.delta.fill_(1.0)
    scan.u.zero_()
    for x in run(scan):
        assert torch.equal(x, torch.zeros_like(x))


def test_an_empty_batch(way):
    scan = make_scan(0, 8, 20, 16)
    out, last, saved = run(scan)
    assert not out.numel() and not last.numel()
    got = run_backward(scan, saved, torch.empty_like(scan.u), None)
    assert torch.equal(got['A'], torch.zeros(8, 16))


@pytest.mark.parametrize(('states', 'average'), [(5, False), (16, True)])
def test_bidirectional_scan(split, states, average):
    inputs = make_inputs(2, 24, 37, 12, states, 4, dtype=FLOAT)
    wide = as_double(inputs)
    got = call(inputs, average=average, backend='cuda')
    want = call(wide, average=average, backend='reference')
    assert relative_error(got, want) < 2e-6
    right = gradients([want], wide)
    for name, x in gradients([got], inputs).items():
        assert relative_error(x, right[name]) < 2e-6, name


def test_bidirectional_scan_in_16_bits(split):
    inputs = make_inputs(1, 32, 20, 12, 16, 4, dtype=BF16)
    wide = as_double(inputs)
    got = call(inputs, backend='cuda')
    want = call(wide, backend='reference')
    assert relative_error(got, want) < 2e-2
    right = gradients([want], wide)
    for name, x in gradients([got], inputs).items():
        assert x.dtype == BF16
        assert relative_error(x, right[name]) < 5e-2, name


# Memory and races


def run_guarded(at_end):
    def guard(x):
        # Rows of channels, as they lie in memory.
        x = x.movedim(-1, 1) if x.ndim > 2 else x
        x = guarded(x.contiguous(), at_end)
        return x.movedim(1, -1) if x.ndim > 2 else x

    for rank, channels in ((12, 40), (0, 5)):
        scan = make_scan(1, channels, 20, 16, rank=rank)
        tensors = {
            field.name: guard(getattr(scan, field.name))
            for field in fields(scan)
            if torch.is_tensor(getattr(scan, field.name))
        }
        scan = replace(scan, **tensors)
        out, last = guard(torch.empty_like(scan.u)), torch.empty(1, channels, 16)
        last = guarded(last, at_end)
        shape = many_states.saved_shape(1, 20, 16, channels)
        saved = guarded(torch.empty(shape), at_end)
        many_states.forward(scan, out, last, saved)
        rows = [guard(torch.empty_like(scan.u)) for _ in range(3)]
        many_states.backward(scan, saved, out, last, tuple(rows))


def test_stays_inside_its_arrays():
    assert stays_inside(run_guarded)


def share_out(*run_on):
    """Results on GPUs of so many multiprocessors, for lengths of a sequence."""

    def results(backward):
        found = []
        for multiprocessors, length in run_on:
            scan = make_scan(1, 64, length, 4, rank=3)
            with kernels.use_machine(Gpu(multiprocessors)):
                out, last, saved = run(scan)
                found += [out, last, saved]
                if backward:
                    found += run_backward(scan, saved, out, last).values()
        return found

    return results


# A whole sequence, and four splits of two chunks.
SHARED_OUT = share_out((0, 40), (1, 120))
# Splits of nine chunks: memory has the places of eight.
LONG_SPLITS = share_out((1, 36 * 16))


def forward_results():
    return SHARED_OUT(backward=False)


def backward_results():
    return SHARED_OUT(backward=True)


def backward_of_long_splits():
    return LONG_SPLITS(backward=True)


def barriers_of(name):
    source = (nvrtc.FOLDER / f'many_states_{name}.cu').read_text()
    return set(re.findall(r'sync_\w+\("(.*?)"\)', source))


@pytest.mark.parametrize('results', [backward_results, backward_of_long_splits])
def test_same_bits_in_any_order(results):
    assert not differs_in_some_order(results)


def test_every_barrier_of_forward_is_needed():
    barriers = barriers_of('forward')
    assert {*fail_without(sorted(barriers), forward_results)} == barriers


def test_every_barrier_of_backward_is_needed():
    barriers = barriers_of('backward')
    assert {*fail_without(sorted(barriers), backward_results)} == barriers


# How the work is shared out


def test_one_long_sequence_fills_a_gpu():
    """Vim-S at 1248 x 1248: 6,085 positions of 768 channels, one image."""
    scan = make_scan(1, 768, 16, 16, rank=24, dtype=BF16)
    long = {
        name: None if x is None else x[..., :1].expand(*x.shape[:-1], 6085)
        for name in (*ROWS, 'B', 'C')
        for x in [getattr(scan, name)]
    }
    scan = replace(scan, **long)
    with kernels.recording(multiprocessors=132) as launches:
        run(scan)
    (launch,) = launches
    assert launch.grid * launch.threads // 32 >= 132 * 8


def test_sizes_make_no_kernels():
    found = set()
    for batch, length in ((1, 16), (2, 50), (64, 197), (3, 33)):
        scan = make_scan(batch, 96, length, 16, rank=12, dtype=BF16)
        with kernels.recording(multiprocessors=1) as launches:
            run(scan)
        found |= {launch.binary for launch in launches}
    assert len(found) == 1


@pytest.mark.parametrize('limit', [48, 99, 227])
@pytest.mark.parametrize('rank, dtype', [(0, BF16), (24, BF16), (48, FLOAT)])
def test_shared_memory_is_what_a_gpu_has(monkeypatch, rank, dtype, limit):
    """All that the kernels run on have 99 KiB, whatever torch says."""
    monkeypatch.setattr(kernels, 'SHARED_MEMORY', limit * 1024)
    scan = make_scan(1, 128, 40, 16, rank=rank, dtype=dtype)
    with kernels.recording() as launches:
        out, last, saved = run(scan, out_dtype=dtype)
        run_backward(scan, saved, out, last)
    assert len(launches) == 2
    assert all(x.shared <= max(limit, 99) * 1024 for x in launches)


def test_states_are_kept_as_often_as_is_said(split, monkeypatch):
    monkeypatch.setattr(many_states_call, 'KEPT', 4)
    assert many_states.saved_shape(1, 33, 16, 8)[1] == 8
    compare(make_scan(1, 8, 33, 16))
