"""Gradients by the CUDA kernel for one state a channel, emulated on the CPU.

Numbers against the definition in float64, and races: the same bits in any order of
warps and CTAs, other ones or none with any barrier left out.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmvssm.ops.cuda import kernels, nvrtc, one_state
from mmvssm.ops.cuda.scan import Scan
from mmvssm.ops.selective_scan.cuda_backend import CudaScan
from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions
from mmvssm.ops.selective_scan.reference import ReferenceScan

from .cuda_emulation import AVAILABLE, SEED_VARIABLE, Emulator
from .scan_inputs import OPTIONAL, relative_error, scan_inputs
from .scan_order_inputs import compare as compare_maps
from .scan_order_inputs import order_inputs

pytestmark = pytest.mark.skipif(not AVAILABLE, reason='needs a C++ compiler on Linux')
ROOT = Path(__file__).parents[2]
WITHOUT_VARIABLE = 'MMVSSM_EMULATION_WITHOUT'
# How many multiprocessors there are says how a scan is shared out.
WAYS = {'whole': 0, 'look-back': 10**6}
SOURCE = nvrtc.FOLDER / 'one_state_backward.cu'
BARRIERS = sorted(set(re.findall(r'sync_\w+\("(.*?)"\)', SOURCE.read_text())))


class Gpu(Emulator):
    """One with a number of multiprocessors.

    Attributes:
        launched: Names of the kernels, and whether their CTAs look back.
    """

    def __init__(self, multiprocessors):
        self._multiprocessors, self.launched = multiprocessors, []

    def multiprocessors(self, on):
        return self._multiprocessors

    def launch(self, launch, on):
        args = getattr(launch.args, 'inputs', launch.args)
        looks_back = bool(getattr(args, 'published', None))
        self.launched.append((launch.kernel.entry, looks_back))
        super().launch(launch, on)


@pytest.fixture(autouse=True)
def nan_in_new_memory():
    """What a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=WAYS)
def way(request):
    """CTAs walk whole sequences, or each chunk has one that looks back."""
    with kernels.use_machine(Gpu(WAYS[request.param])):
        yield request.param


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(inputs, grads, softplus=True):
    """Of all inputs by the kernels, for gradients of the output and the last state."""
    inputs, options = ScanInputs(**inputs), ScanOptions(softplus, torch.float32, True)
    saved = CudaScan().forward(inputs, options, keep=True).saved
    return CudaScan().backward(inputs, options, saved, grads, wanted=inputs)


def by_the_definition(inputs, grads, softplus=True):
    """The same in float64."""
    inputs = {name: x.double().requires_grad_() for name, x in inputs.items()}
    options = ScanOptions(softplus, torch.float64, True)
    results = ReferenceScan().forward(ScanInputs(**inputs), options, keep=False).outputs
    total = sum(
        (x * grad.double()).sum() for x, grad in zip(results, grads) if grad is not None
    )
    if not isinstance(total, torch.Tensor):
        return {name: torch.zeros_like(x) for name, x in inputs.items()}
    found = torch.autograd.grad(total, [*inputs.values()], allow_unused=True)
    return {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(inputs.items(), found)
    }


def grouped(inputs):
    """Without a graph, B and C with an axis for groups."""
    inputs = {name: x.detach() for name, x in inputs.items()}
    if inputs['B'].ndim == 3:
        inputs |= dict(B=inputs['B'][:, None], C=inputs['C'][:, None])
    return inputs


def default_gradients(inputs):
    grad_out = torch.empty_like(inputs['u']).copy_(normal(*inputs['u'].shape))
    return grad_out, normal(*inputs['u'].shape[:2], 1, seed=1)


def compare(inputs, softplus=True, tolerance=2e-6, grads=None):
    inputs = grouped(inputs)
    grads = grads or default_gradients(inputs)
    got = gradients(inputs, grads, softplus)
    want = by_the_definition(inputs, grads, softplus)
    errors = {
        name: relative_error(getattr(got, name), grad) for name, grad in want.items()
    }
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, wrong
    return got


# Numbers


@pytest.mark.parametrize('length', [1, 7, 63, 64, 65, 200])
@pytest.mark.parametrize('channels', [96, 192])
def test_lengths(way, length, channels):
    compare(
        scan_inputs(2, channels, length, 1, channels_last=True, dtype=torch.float32)
    )


@pytest.mark.parametrize('channels_last', [True, False])
@pytest.mark.parametrize('groups', [None, 1, 3])
@pytest.mark.parametrize('channels', [1, 5, 100])
@pytest.mark.parametrize('optional', [(), OPTIONAL], ids=['plain', 'all'])
def test_options_and_layouts(way, channels, groups, channels_last, optional):
    if groups == 3:
        channels *= 3
    compare(
        scan_inputs(
            *(2, channels, 70, 1, groups),
            optional=optional,
            channels_last=channels_last,
            dtype=torch.float32,
        )
    )


@pytest.mark.parametrize('given', ['output', 'state', 'nothing'])
def test_some_gradients_only(way, given):
    inputs = scan_inputs(1, 8, 130, 1, channels_last=True, dtype=torch.float32)
    grad_out = normal(1, 130, 8).mT if given == 'output' else None
    grad_state = normal(1, 8, 1) if given == 'state' else None
    compare(inputs, grads=(grad_out, grad_state))


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('length', [60, 64, 130])
def test_without_softplus(way, length, bias):
    inputs = scan_inputs(1, 8, length, 1, channels_last=True, dtype=torch.float32)
    inputs['delta'] = inputs['delta'].detach().abs() / 4
    inputs['delta_bias'] = inputs['delta_bias'].detach().abs()
    if not bias:
        del inputs['delta_bias']
    compare(inputs, softplus=False)


def test_small_steps(way):
    """The derivative of the softplus is accurate in relative terms."""
    inputs = grouped(scan_inputs(1, 8, 200, 1, optional=(), dtype=torch.float32))
    inputs['delta'] -= 9
    compare(inputs)


@pytest.mark.parametrize('rate', [-1e4, -1.0, -1e-6, 0.0, 0.05])
def test_decays_far_from_one(way, rate):
    """A dt from -1e4 to -1e-8, and growth."""
    inputs = grouped(scan_inputs(1, 8, 200, 1, channels_last=True, dtype=torch.float32))
    inputs['A'].fill_(rate)
    inputs['delta'][:, 4:] -= 5
    compare(inputs, tolerance=4e-6)


def test_growth_of_what_is_zero(way):
    """A positive A may overflow the growth of positions, not zeros."""
    inputs = scan_inputs(1, 8, 200, 1, optional=(), dtype=torch.float32)
    inputs = grouped(inputs)
    inputs['A'].fill_(40.0)
    inputs['delta'].fill_(1.0)
    inputs['u'].zero_()
    found = gradients(inputs, (torch.zeros(1, 8, 200), None), softplus=False)
    for name in inputs:
        grad = getattr(found, name)
        assert torch.equal(grad, torch.zeros_like(grad)), name


def test_more_chunks_than_one_looks_back_at(way):
    length = one_state.CHUNK * 35 + 9
    inputs = scan_inputs(1, 4, length, 1, channels_last=True, dtype=torch.float32)
    inputs = grouped(inputs)
    # Gradients live long enough to be seen from far.
    inputs['A'] *= 1e-3
    compare(inputs, tolerance=1e-5)


ALL = ('u', 'delta', 'z', 'B', 'C')


@pytest.mark.parametrize(
    ('dtype', 'narrow'),
    [
        *((torch.bfloat16, names) for names in (('u', 'z'), ('delta',), ('z',), ALL)),
        (torch.float16, ALL),
    ],
)
def test_dtypes(way, dtype, narrow):
    """Gradients have the dtype of what they are of; sums are float32."""
    inputs = grouped(scan_inputs(1, 16, 70, 1, channels_last=True, dtype=torch.float32))
    for name in narrow:
        inputs[name] = inputs[name].to(dtype)
    got = compare(inputs, tolerance=torch.finfo(dtype).eps)
    for name in ('u', 'delta', 'z'):
        assert getattr(got, name).dtype == inputs[name].dtype
    # They are not rounded to 16 bits, and what is rounded before is no larger.
    want = by_the_definition(inputs, default_gradients(inputs))
    for name in ('A', 'B', 'C', 'D', 'delta_bias'):
        assert relative_error(getattr(got, name), want[name]) < 2e-5, name


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layout', ['as u', 'other', 'expanded'])
def test_gradient_of_the_output(way, dtype, layout):
    """Of any dtype and layout."""
    inputs = scan_inputs(2, 16, 70, 1, channels_last=True, dtype=torch.float32)
    grad_out = normal(2, 70, 16).to(dtype).mT
    if layout == 'other':
        grad_out = grad_out.contiguous()
    if layout == 'expanded':
        grad_out = grad_out[:1, :1, :1].expand(2, 16, 70)
    compare(inputs, grads=(grad_out, None))


# Maps


@pytest.mark.parametrize('rank', [1, 6, 12, 17, 24, 48, 65])
def test_ranks(way, rank):
    """In one launch, and one after the other."""
    inputs = order_inputs('cross', (1, 12, 9, 8), rank, dtype=torch.float32)
    compare_maps(inputs, 'cross', 'cuda', 3e-6)


@pytest.mark.parametrize('rank', [6, 65])
@pytest.mark.parametrize('orders', ['cross', 'windows2'])
def test_one_after_the_other_in_chunks(orders, rank):
    """A scan's chunks fill the GPU, but not CTAs that walk all of it."""
    gpu = Gpu(1)
    inputs = order_inputs(orders, (1, 64, 11, 13), rank, dtype=torch.float32)
    with kernels.use_machine(gpu):
        compare_maps(inputs, orders, 'cuda', 3e-6)
    count = len(inputs['dt_projs_weight'])
    assert gpu.launched[-count:] == [('one_state_backward', True)] * count


@pytest.mark.parametrize('shape', [(2, 32, 5, 7), (1, 5, 13, 1), (1, 8, 1, 70)])
@pytest.mark.parametrize(
    'orders', ['cross', 'windows2', ['hilbert', 'corners']], ids=['cross', 'pad', 'six']
)
def test_orders(way, orders, shape):
    inputs = order_inputs(orders, shape, rank=4, dtype=torch.float32)
    compare_maps(inputs, orders, 'cuda', 3e-6)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('rank', [12, 17])
@pytest.mark.parametrize('add', [False, True])
def test_low_rank_of_16_bits(way, dtype, rank, add):
    """The weights, float32, are not rounded to 16 bits; gradients may be added."""
    batch, channels, length = 2, 36, 100
    low_rank = normal(batch, length, rank + 2).to(dtype)[..., :rank].mT
    weight = normal(channels, rank, seed=1) / rank**0.5
    inputs = dict(
        u=normal(batch, length, channels).to(dtype).mT,
        A=-torch.exp(normal(channels, 1)),
        B=normal(batch, 1, 1, length).to(dtype),
        C=normal(batch, 1, 1, length, seed=2).to(dtype),
        D=normal(channels),
    )
    bias = normal(channels, seed=3)
    grad_out = normal(batch, length, channels, seed=4).to(dtype).mT
    scan = Scan(**inputs, bias=bias, dt_low_rank=low_rank, dt_weight=weight)
    saved = torch.empty(one_state.saved_shape(batch, length, 1, channels))
    one_state.forward(scan, torch.empty_like(grad_out), saved=saved)
    before = normal(batch, length, channels, seed=5).mT
    by_u, by_delta = torch.empty_like(before), torch.empty_like(before)
    if add:
        by_u.copy_(before)
    rows = by_u, by_delta, None
    rest = one_state.backward(scan, saved, grad_out, None, rows, add)
    delta = (weight.double() @ low_rank.double()).float()
    want = by_the_definition(dict(inputs, delta=delta, delta_bias=bias), (grad_out,))
    if add:
        want['u'] += before
    names = 'u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias'
    for name, grad in zip(names, (by_u, by_delta, *rest)):
        grad = grad.mT if name in ('B', 'C') else grad
        assert relative_error(grad, want[name]) < 5e-5, name


# Memory


def test_nothing_is_written_that_is_not_there(way):
    """Rows of gradients between which there is something else."""
    inputs = grouped(scan_inputs(1, 20, 70, 1, channels_last=True, dtype=torch.float32))
    memory = torch.full((3, 70, 24), 7.0)
    by_u, by_delta, by_z = (x[:, :20].mT[None] for x in memory)
    grads = default_gradients(inputs)
    want = by_the_definition(inputs, grads)
    bias = inputs.pop('delta_bias')
    scan = Scan(**inputs, bias=bias)
    out, last = torch.empty_like(inputs['u']), torch.empty(1, 20, 1)
    saved = torch.empty(one_state.saved_shape(1, 70, 1, 20))
    one_state.forward(scan, out, last, saved)
    one_state.backward(scan, saved, *grads, (by_u, by_delta, by_z))
    for name, grad in dict(u=by_u, delta=by_delta, z=by_z).items():
        assert relative_error(grad, want[name]) < 2e-6
    assert torch.equal(memory[..., 20:], torch.full((3, 70, 4), 7.0))


# Races


def results():
    """Of two scans, with and without a rank, each in both ways."""
    length, channels = 300, 40
    low_rank = normal(1, length, 6).bfloat16().mT
    kinds = (
        dict(dt_low_rank=low_rank, dt_weight=normal(channels, 6, seed=1)),
        dict(delta=normal(1, length, channels, seed=2).bfloat16().mT),
    )
    found = []
    for kind in kinds:
        scan = Scan(
            u=normal(1, length, channels).bfloat16().mT,
            A=-normal(channels, 1).abs(),
            B=normal(1, 1, 1, length, seed=3),
            C=normal(1, 1, 1, length, seed=4),
            D=normal(channels),
            bias=normal(channels),
            **kind,
        )
        saved = torch.empty(one_state.saved_shape(1, length, 1, channels))
        grad_out = normal(1, length, channels, seed=5).bfloat16().mT
        for count in WAYS.values():
            by_u = normal(1, length, channels, seed=6).mT
            by_delta = torch.empty_like(by_u)
            with kernels.use_machine(Gpu(count)):
                one_state.forward(scan, torch.empty_like(by_u), saved=saved)
                rows = by_u, by_delta, None
                state = normal(1, channels, 1)
                rest = one_state.backward(scan, saved, grad_out, state, rows, add=True)
            found += [by_u, by_delta, *rest]
    return found


def equal_bits_in_all_orders(seeds=20):
    truth = None
    for seed in range(seeds):
        os.environ[SEED_VARIABLE] = str(seed)
        found = results()
        truth = truth or found
        if not all(map(torch.equal, found, truth)):
            return False
    return not any(x.isnan().any() for x in truth)


def test_same_bits_in_any_order(monkeypatch):
    monkeypatch.setenv(SEED_VARIABLE, '0')
    assert equal_bits_in_all_orders()


def test_barriers_are_known():
    names = 'inputs pointers rows sides steps sums taken teams'
    assert BARRIERS == names.split()


def is_needed(barrier):
    """Whether without it some order gives something else, or ends otherwise."""
    child = os.fork()
    if child == 0:
        os.environ[WITHOUT_VARIABLE] = barrier
        os._exit(0 if equal_bits_in_all_orders(8) else 3)
    return os.waitpid(child, 0)[1] != 0


def test_every_barrier_is_needed():
    """In a process without threads, which may fork."""
    code = (
        'from tests.ops import test_cuda_one_state_backward as t; '
        'print([name for name in ["none", *t.BARRIERS] if not t.is_needed(name)])'
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        env=os.environ
        | {'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')])},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "['none']\n", done.stderr
