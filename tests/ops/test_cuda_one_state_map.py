"""The CUDA kernel that merges the scans of a map on chip, emulated on the CPU.

Numbers against the definition in float64, what is kept against the other kernels, and
races: the same bits in any order of warps and CTAs, other ones or none with any barrier
left out.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmvssm.ops import scan_order, ss2d_scan
from mmvssm.ops.cuda import kernels, nvrtc, one_state
from mmvssm.ops.cuda.scan import Scan

from .cuda_emulation import AVAILABLE, SEED_VARIABLE, Emulator
from .scan_inputs import relative_error
from .scan_order_inputs import by_definition, order_inputs

pytestmark = pytest.mark.skipif(not AVAILABLE, reason='needs a C++ compiler on Linux')
ROOT = Path(__file__).parents[2]
WITHOUT_VARIABLE = 'MMVSSM_EMULATION_WITHOUT'
BARRIERS = sorted(
    {
        name
        for source in nvrtc.FOLDER.glob('one_state_map.*')
        for name in re.findall(r'sync_\w+\("(.*?)"\)', source.read_text())
    }
)


class Gpu(Emulator):
    """One with some shared memory, and so few multiprocessors that any map fills it.

    Attributes:
        launched: Constants of the launches of the kernel, None of those of others.
    """

    def __init__(self, shared_memory=kernels.SHARED_MEMORY, multiprocessors=0):
        self._shared_memory, self._multiprocessors = shared_memory, multiprocessors
        self.launched = []

    def shared_memory(self, on):
        return self._shared_memory

    def multiprocessors(self, on):
        return self._multiprocessors

    def launch(self, launch, on):
        is_map = launch.kernel.entry == 'one_state_map'
        self.launched.append(launch.constants if is_map else None)
        super().launch(launch, on)


def shape_of(gpu):
    """Sets, parts and batch elements of a CTA of the one launch, None: of others."""
    if len(gpu.launched) != 1 or gpu.launched[0] is None:
        return None
    found = gpu.launched[0]
    elements = found['ELEMENTS']
    return found['CHANNELS'] // 16, found['POSITIONS'] // 64 // elements, elements


def check_map(shape, orders='cross', rank=4, dtype=torch.float32):
    """The shape of CTAs, with numbers that are right."""
    inputs = order_inputs(orders, shape, rank, dtype=dtype)
    gpu = Gpu()
    with kernels.use_machine(gpu), torch.no_grad():
        got = ss2d_scan(**inputs, orders=orders, backend='cuda')
        double = {name: x.double() for name, x in inputs.items()}
        want = by_definition(scan_order(orders, *shape[2:]), **double)
    assert relative_error(got, want) < 2e-6
    return shape_of(gpu)


# Numbers


@pytest.mark.parametrize(
    ('shape', 'cta'),
    [
        ((1, 16, 1, 1), (4, 1, 4)),
        ((5, 68, 7, 7), (4, 1, 4)),
        ((4, 20, 5, 9), (4, 1, 4)),
        ((3, 20, 12, 9), (4, 1, 4)),
        ((1, 64, 15, 19), (4, 4, 1)),
        ((1, 20, 25, 21), (2, 8, 1)),
        ((1, 16, 33, 31), (1, 16, 1)),
        ((2, 12, 32, 33), (1, 16, 1)),
    ],
)
def test_sizes(shape, cta):
    assert check_map(shape) == cta


@pytest.mark.parametrize('rank', [1, 8, 14, 15, 16, 33])
def test_ranks(rank):
    assert check_map((1, 16, 5, 13), rank=rank) is not None


@pytest.mark.parametrize('orders', ['windows2', 'zigzag', 'unidi'])
@pytest.mark.parametrize('shape', [(1, 16, 9, 7), (1, 16, 31, 33)])
def test_orders(orders, shape):
    """Along tables, with padded places and without."""
    assert check_map(shape, orders) is not None


def scans_of(
    shape,
    rank,
    dtype=torch.bfloat16,
    u_dtype=None,
    skip=True,
    bias=True,
    apart=False,
    seed=0,
):
    """Four routes over a map (batch, channels, height, width)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    batch, channels, height, width = shape
    places = height * width
    u = normal(batch, places, channels).to(u_dtype or dtype).mT
    projected = normal(batch, places, 4 * (rank + 2)).to(dtype)
    scans = []
    for route, piece in enumerate(projected.chunk(4, dim=2)):
        low_rank, B, C = (x.mT for x in piece.split((rank, 1, 1), dim=2))
        scans.append(
            Scan(
                u=u,
                A=-torch.exp(normal(channels, 1)),
                B=(B.clone() if apart else B)[:, None],
                C=C[:, None],
                D=normal(channels) if skip else None,
                bias=normal(channels) - 1 if bias else None,
                dt_low_rank=low_rank,
                dt_weight=normal(channels, rank) / rank**0.5,
                width=width,
                route=route,
            )
        )
    return scans


def merged(scans, gpu, dtype=torch.float32):
    """The output, and the states that are kept."""
    batch, channels, places = scans[0].u.shape
    out = torch.empty(batch, places, channels, dtype=dtype).mT
    shape = one_state.saved_shape(batch, places, 1, channels)
    saved = [torch.empty(shape) for _ in scans]
    with kernels.use_machine(gpu):
        one_state.forward_merged(scans, out, saved)
    return out, torch.stack(saved)


def in_float64(scans):
    """The merged output."""
    batch, channels, places = scans[0].u.shape
    total = torch.zeros(batch, channels, places, dtype=torch.float64)
    numbers = torch.arange(places).view(-1, scans[0].width)
    routes = (numbers.flatten(), numbers.t().flatten())
    for scan in scans:
        order = routes[scan.route % 2]
        order = order.flip(0) if scan.route >= 2 else order
        u, low, B, C = (
            x.double()[..., order]
            for x in (scan.u, scan.dt_low_rank, scan.B[:, 0], scan.C[:, 0])
        )
        raw = scan.dt_weight.double() @ low
        if scan.bias is not None:
            raw = raw + scan.bias.double()[:, None]
        dt = torch.logaddexp(raw, torch.zeros_like(raw))
        state = torch.zeros(batch, channels, dtype=torch.float64)
        for t in range(places):
            state = (scan.A[:, 0].double() * dt[..., t]).exp() * state
            state = state + dt[..., t] * u[..., t] * B[..., t]
            y = state * C[..., t]
            if scan.D is not None:
                y = y + scan.D.double() * u[..., t]
            total[..., order[t]] += y
    return total


@pytest.mark.parametrize(
    ('dtype', 'rank'),
    [
        *((torch.bfloat16, rank) for rank in (5, 12, 16, 64)),
        *((torch.float16, rank) for rank in (6, 24)),
    ],
)
def test_16_bits(dtype, rank):
    """Weights and bias, float32, are not rounded to 16 bits."""
    scans, gpu = scans_of((2, 20, 9, 8), rank, dtype), Gpu()
    out, _ = merged(scans, gpu)
    assert shape_of(gpu) is not None
    assert relative_error(out, in_float64(scans)) < 1e-5


@pytest.mark.parametrize('u_dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('options', [{}, dict(skip=False), dict(bias=False)])
def test_options(u_dtype, options):
    scans, gpu = scans_of((2, 20, 9, 8), 6, torch.float32, u_dtype, **options), Gpu()
    out, _ = merged(scans, gpu)
    assert shape_of(gpu) is not None
    assert relative_error(out, in_float64(scans)) < 2e-6


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_output_is_rounded_once(dtype):
    scans = scans_of((1, 20, 9, 8), 6, dtype)
    wide, _ = merged(scans, Gpu())
    narrow, _ = merged(scans, Gpu(), dtype)
    assert torch.equal(narrow, wide.to(dtype))


@pytest.mark.parametrize('shape', [(3, 20, 9, 15), (1, 20, 16, 20), (1, 16, 32, 33)])
def test_keeps_what_the_other_kernels_keep(shape):
    scans, gpu, other = scans_of(shape, 6), Gpu(), Gpu(shared_memory=0)
    out, saved = merged(scans, gpu)
    want, want_saved = merged(scans, other)
    assert shape_of(gpu) is not None and set(other.launched) == {None}
    assert relative_error(saved, want_saved) < 2e-5
    assert relative_error(out, want) < 2e-5


def test_growth_from_a_zero_state():
    """A positive A may overflow the growth of positions, not a state of zero."""
    scans = scans_of((1, 16, 32, 32), 6)
    for scan in scans:
        scan.A.fill_(10.0)
        scan.u.zero_()
    for x in merged(scans, Gpu()):
        assert torch.equal(x, torch.zeros_like(x))


def test_nothing_is_kept_that_is_not_wanted():
    scans = scans_of((1, 16, 9, 8), 6)
    out = torch.empty(1, 72, 16).mT
    with kernels.use_machine(Gpu()):
        one_state.forward_merged(scans, out, None)
    assert torch.equal(out, merged(scans, Gpu())[0])


# When it is launched


@pytest.mark.parametrize(
    ('options', 'gpu'),
    [
        ({}, dict(shared_memory=20 * 1024)),
        ({}, dict(multiprocessors=132)),
        (dict(apart=True), {}),
    ],
    ids=['too large', 'too few', 'B elsewhere'],
)
def test_others_take_the_other_kernels(options, gpu):
    scans, gpu = scans_of((1, 20, 9, 8), 6, **options), Gpu(**gpu)
    out, _ = merged(scans, gpu)
    assert shape_of(gpu) is None
    assert relative_error(out, in_float64(scans)) < 1e-5


def test_of_a_model():
    """All stages of VMamba-T at 224, batch 128, on an H100: one launch each."""
    for channels, rank, size in (96, 6, 56), (192, 12, 28), (384, 24, 14), (768, 48, 7):
        e = [
            torch.empty(128, size**2, n, device='meta')
            for n in (channels, 4 * rank + 8)
        ]
        u, projected = (x.bfloat16() for x in e)
        scans = []
        for route, piece in enumerate(projected.chunk(4, dim=2)):
            low_rank, B, C = (x.mT for x in piece.split((rank, 1, 1), dim=2))
            ones = [torch.empty(channels, n, device='meta') for n in (1, rank)]
            scans.append(
                Scan(
                    u=u.mT,
                    A=ones[0],
                    B=B[:, None],
                    C=C[:, None],
                    D=ones[0][:, 0],
                    bias=ones[0][:, 0],
                    dt_low_rank=low_rank,
                    dt_weight=ones[1],
                    width=size,
                    route=route,
                )
            )
        with kernels.recording() as launches:
            one_state.forward_merged(scans, torch.empty_like(u).mT)
        (launch,) = launches
        assert launch.kernel.entry == 'one_state_map'
        assert launch.grid * launch.threads // 32 >= 132 * 8


# Races


def results():
    """Of maps that CTAs of each shape have."""
    shapes = (5, 20, 7, 11), (1, 36, 15, 19), (1, 16, 32, 33)
    return [x for shape in shapes for x in merged(scans_of(shape, 6), Gpu())]


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
    names = ['exchange', 'low rank', 'parameters', 'pointers', 'scans', 'sum']
    assert BARRIERS == names


def is_needed(barrier):
    """Whether without it some order gives something else, or never ends."""
    child = os.fork()
    if child == 0:
        os.environ[WITHOUT_VARIABLE] = barrier
        os._exit(0 if equal_bits_in_all_orders(4) else 3)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code in (3, -signal.SIGABRT, -signal.SIGSEGV)


def test_every_barrier_is_needed():
    """In a process without threads, which may fork."""
    code = (
        'from tests.ops import test_cuda_one_state_map as t; '
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
