"""The CUDA kernels of the scan with one state a channel, emulated on the CPU.

Numbers against the definition in float64, and races: the same bits in any order of
warps and CTAs, other ones or none with any barrier left out.
"""

import mmap
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
from mmvssm.ops.cuda.merge import merge
from mmvssm.ops.cuda.scan import Scan, turns
from mmvssm.ops.scan_orders.tables import order_word
from mmvssm.ops.selective_scan.cuda_backend import CudaScan
from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions
from mmvssm.ops.selective_scan.reference import ReferenceScan
from mmvssm.ops.ss2d_scan.cuda_backend import CudaSs2d
from mmvssm.ops.ss2d_scan.declaration import Ss2dInputs, Ss2dOptions

from .cuda_emulation import AVAILABLE, SEED_VARIABLE, Emulator
from .scan_inputs import OPTIONAL, relative_error, scan_inputs
from .scan_order_inputs import by_definition, order_inputs

pytestmark = pytest.mark.skipif(not AVAILABLE, reason='needs a C++ compiler on Linux')
ROOT = Path(__file__).parents[2]
WITHOUT_VARIABLE = 'MMVSSM_EMULATION_WITHOUT'
# How many multiprocessors there are says how a scan is shared out.
WAYS = {'whole': 0, 'look-back': 10**6}
SOURCES = [nvrtc.FOLDER / 'one_state_forward.cu', *nvrtc.FOLDER.glob('one_state*.h')]
BARRIERS = sorted(
    {
        name
        for source in SOURCES
        for name in re.findall(r'sync_\w+\("(.*?)"\)', source.read_text())
    }
)


class Gpu(Emulator):
    """One with a number of multiprocessors, and some shared memory.

    Attributes:
        launched: Names of the kernels, and whether their CTAs look back.
    """

    def __init__(self, multiprocessors, shared_memory=kernels.SHARED_MEMORY):
        self._multiprocessors, self._shared_memory = multiprocessors, shared_memory
        self.launched = []

    def multiprocessors(self, on):
        return self._multiprocessors

    def shared_memory(self, on):
        return self._shared_memory

    def launch(self, launch, on):
        looks_back = bool(getattr(launch.args, 'published', None))
        self.launched.append((launch.kernel.entry, looks_back))
        super().launch(launch, on)


@pytest.fixture(params=WAYS)
def way(request):
    """CTAs walk whole sequences, or each chunk has one that looks back."""
    with kernels.use_machine(Gpu(WAYS[request.param])):
        yield request.param


def forward(inputs, softplus=True, out_dtype=torch.float32):
    """Outputs, last state, and states before the chunks."""
    if inputs['B'].ndim == 3:
        inputs = dict(inputs, B=inputs['B'][:, None], C=inputs['C'][:, None])
    options = ScanOptions(softplus, out_dtype, return_last_state=True)
    result = CudaScan().forward(ScanInputs(**inputs), options, keep=True)
    return (*result.outputs, result.saved[0])


def by_the_definition(inputs, softplus=True):
    """The same in float64."""
    inputs = {name: x.double() for name, x in inputs.items()}
    if inputs['B'].ndim == 3:
        inputs = dict(inputs, B=inputs['B'][:, None], C=inputs['C'][:, None])
    options = ScanOptions(softplus, torch.float64, return_last_state=True)

    def scan(length):
        part = {
            name: x[..., :length] if name in ('u', 'delta', 'B', 'C', 'z') else x
            for name, x in inputs.items()
        }
        return ReferenceScan().forward(ScanInputs(**part), options, keep=False).outputs

    length, chunk = inputs['u'].shape[2], one_state.CHUNK
    states = [scan(end)[1] for end in range(chunk, length, chunk)]
    empty = inputs['u'].new_empty((inputs['u'].shape[0], 0, inputs['u'].shape[1], 1))
    return *scan(length), torch.stack(states, dim=1) if states else empty


def compare(inputs, softplus=True, tolerance=2e-6, out_dtype=torch.float32):
    inputs = {name: x.detach() for name, x in inputs.items()}
    got = forward(inputs, softplus, out_dtype)
    want = by_the_definition(inputs, softplus)
    assert got[0].dtype == out_dtype
    errors = [relative_error(*pair) for pair in zip(got, want)]
    assert all(error < tolerance for error in errors), errors


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


@pytest.mark.parametrize('skip', OPTIONAL)
def test_each_option_alone(way, skip):
    optional = (skip,)
    compare(scan_inputs(1, 8, 66, 1, optional=optional, dtype=torch.float32))


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('length', [60, 64, 130])
def test_without_softplus(way, length, bias):
    inputs = scan_inputs(1, 8, length, 1, channels_last=True, dtype=torch.float32)
    inputs['delta'] = inputs['delta'].detach().abs() / 4
    inputs['delta_bias'] = inputs['delta_bias'].detach().abs()
    if not bias:
        del inputs['delta_bias']
    compare(inputs, softplus=False)


def test_step_sizes_far_from_one(way):
    """Accurate in relative terms: small ones, which a bias makes, and large ones."""
    inputs = scan_inputs(1, 8, 200, 1, optional=(), dtype=torch.float32)
    inputs['delta'] = inputs['delta'].detach() * 12 - 8
    compare(inputs)


def test_more_chunks_than_one_looks_back_at(way):
    length = one_state.CHUNK * 35 + 9
    inputs = scan_inputs(1, 4, length, 1, channels_last=True, dtype=torch.float32)
    # States live long enough to be seen from far.
    inputs['A'] = inputs['A'].detach() * 1e-3
    compare(inputs)


def test_growth_from_a_zero_state(way):
    """A positive A may overflow the growth of positions, not a state of zero."""
    inputs = scan_inputs(1, 8, 200, 1, optional=(), dtype=torch.float32)
    inputs = {name: x.detach() for name, x in inputs.items()}
    inputs['A'].fill_(40.0)
    inputs['delta'].fill_(1.0)
    inputs['u'].zero_()
    for x in forward(inputs, softplus=False):
        assert torch.equal(x, torch.zeros_like(x))


ALL = ('u', 'delta', 'z', 'B', 'C')


@pytest.mark.parametrize(
    ('dtype', 'narrow'),
    [
        *((torch.bfloat16, names) for names in (('u', 'z'), ('delta',), ('z',), ALL)),
        (torch.float16, ALL),
    ],
)
def test_dtypes(way, dtype, narrow):
    """Of what is read; sums are float32."""
    compare(narrowed(dtype, narrow))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_output_is_rounded_once(way, dtype):
    inputs = narrowed(dtype, ALL)
    wide, *_ = forward(inputs)
    got, *_ = forward(inputs, out_dtype=dtype)
    assert torch.equal(got, wide.to(dtype))


def narrowed(dtype, names):
    inputs = scan_inputs(1, 16, 70, 1, channels_last=True, dtype=torch.float32)
    return {
        name: x.detach().to(dtype if name in names else x.dtype)
        for name, x in inputs.items()
    }


# Maps


def check_map(inputs, orders='cross', tolerance=2e-6):
    with torch.no_grad():
        got = ss2d_scan(**inputs, orders=orders, backend='cuda')
        double = {name: x.double() for name, x in inputs.items()}
        want = by_definition(scan_order(orders, *got.shape[2:]), **double)
    assert relative_error(got, want) < tolerance


@pytest.mark.parametrize('rank', [1, 6, 12, 16, 17, 24, 48, 64, 65])
def test_ranks_in_one_launch(rank):
    with kernels.use_machine(Gpu(WAYS['look-back'])):
        check_map(order_inputs('cross', (1, 12, 9, 8), rank, dtype=torch.float32))


@pytest.mark.parametrize('rank', [17, 65])
def test_ranks_one_after_the_other(rank):
    with kernels.use_machine(Gpu(WAYS['whole'])):
        check_map(order_inputs('cross', (1, 12, 9, 8), rank, dtype=torch.float32))


def merged_map(inputs, gpu, orders='cross'):
    """The output, and states before the chunks; the sum has no room on chip."""
    dtype = inputs['x'].dtype
    options = Ss2dOptions(order_word(orders), dtype, dtype)
    with kernels.use_machine(gpu), torch.no_grad():
        found = CudaSs2d().forward(Ss2dInputs(**inputs), options, keep=True)
    return found.outputs[0], found.saved[1]


# Their chunks fill a GPU of one multiprocessor, but not CTAs that walk all of it.
CHUNKED = (1, 64, 11, 13)


@pytest.mark.parametrize('rank', [6, 17, 65])
@pytest.mark.parametrize(
    'orders', ['cross', 'windows2', ['hilbert', 'corners']], ids=['cross', 'pad', 'six']
)
def test_one_after_the_other_in_chunks(orders, rank):
    gpu = Gpu(1, shared_memory=0)
    inputs = order_inputs(orders, CHUNKED, rank, dtype=torch.float32)
    with kernels.use_machine(gpu):
        check_map(inputs, orders)
    count = len(inputs['dt_projs_weight'])
    assert gpu.launched == [('one_state_forward', True)] * count


def test_a_route_and_then_the_way_back():
    x = torch.empty(1, 1, 1)
    assert turns([Scan(x, x, x, x, route=route) for route in range(4)]) == [0, 2, 1, 3]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ('shape', 'in_turn', 'at_once', 'looks_back'),
    [
        (CHUNKED, 1, 10**6, True),
        ((1, 64, 9, 13), 0, 2, False),
    ],
)
def test_same_bits_one_after_the_other(shape, in_turn, at_once, looks_back, dtype):
    """Scans add up in the same order, whether they share a launch or not."""
    inputs = order_inputs('cross', shape, 6, dtype=dtype)
    one, other = Gpu(in_turn, shared_memory=0), Gpu(at_once, shared_memory=0)
    got, want = merged_map(inputs, one), merged_map(inputs, other)
    assert [name for name, _ in one.launched] == ['one_state_forward'] * 4
    assert [name for name, _ in other.launched] == ['one_state_forward', 'merge']
    assert {one.launched[0][1], other.launched[0][1]} == {looks_back}
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize('shape', [(2, 32, 5, 7), (1, 5, 13, 1), (1, 8, 1, 70)])
@pytest.mark.parametrize(
    'orders', ['cross', 'windows2', ['hilbert', 'corners']], ids=['cross', 'pad', 'six']
)
def test_orders(way, orders, shape):
    check_map(order_inputs(orders, shape, rank=4, dtype=torch.float32), orders)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('rank', [12, 17])
def test_low_rank_of_16_bits(way, dtype, rank):
    """The weights, float32, are not rounded to 16 bits."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    batch, channels, length = 2, 36, 100
    low_rank = normal(batch, length, rank + 2).to(dtype)[..., :rank].mT
    weight = normal(channels, rank) / rank**0.5
    inputs = dict(
        u=normal(batch, length, channels).to(dtype).mT,
        A=-torch.exp(normal(channels, 1)),
        B=normal(batch, 1, 1, length).to(dtype),
        C=normal(batch, 1, 1, length).to(dtype),
        D=normal(channels),
    )
    bias, add = normal(channels), normal(batch, length, channels).mT
    scan = Scan(**inputs, bias=bias, dt_low_rank=low_rank, dt_weight=weight)
    out = torch.empty_like(add)
    one_state.forward(scan, out, add=add)
    delta = (weight.double() @ low_rank.double()).float()
    want, *_ = by_the_definition(dict(inputs, delta=delta, delta_bias=bias))
    assert relative_error(out, want + add.double()) < 2e-5


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('size', [(3, 40), (1, 7)])
def test_merge(dtype, size):
    parts = torch.randn(5, *size, generator=torch.Generator().manual_seed(0))
    out = torch.empty(size, dtype=dtype)
    with kernels.use_machine(Gpu(0)):
        merge(parts, out)
    want = parts[0]
    for part in parts[1:]:
        want = want + part
    assert torch.equal(out, want.to(dtype))


# Memory


def test_more_than_2_31_elements():
    """Two batch elements lie far apart; most of the memory is never touched."""
    apart = 2**31 + 64
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, 'MAP_NORESERVE', 0)
    memory = mmap.mmap(-1, 4 * (apart + 4096), flags)
    storage = torch.frombuffer(memory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)

    def far(first, shape):
        x = storage[first:].as_strided(shape, (apart, 1, shape[1]))
        return x.copy_(torch.randn(shape, generator=generator))

    wide = scan_inputs(2, 8, 70, 1, optional=('D',), dtype=torch.float32)
    inputs = {name: x.detach() for name, x in wide.items()}
    inputs['u'], inputs['delta'] = far(0, (2, 8, 70)), far(1024, (2, 8, 70))
    inputs['B'] = far(2048, (2, 1, 70))
    out = far(3072, (2, 8, 70))
    scan = Scan(**dict(inputs, B=inputs['B'][:, None], C=inputs['C'][:, None]))
    with kernels.use_machine(Gpu(0)):
        one_state.forward(scan, out)
    want, *_ = by_the_definition(inputs)
    assert relative_error(out, want) < 2e-6


def test_nothing_is_written_that_is_not_there():
    """Rows of the output between which there is something else."""
    memory = torch.full((70, 24), 7.0)
    inputs = scan_inputs(1, 20, 70, 1, channels_last=True, dtype=torch.float32)
    inputs = {name: x.detach() for name, x in inputs.items()}
    del inputs['z']
    out = memory[:, :20].mT[None]
    bias = inputs.pop('delta_bias')
    B, C = inputs['B'][:, None], inputs['C'][:, None]
    with kernels.use_machine(Gpu(10**6)):
        one_state.forward(Scan(**dict(inputs, B=B, C=C), bias=bias), out)
    want, *_ = by_the_definition(dict(inputs, delta_bias=bias))
    assert relative_error(out, want) < 2e-6
    assert torch.equal(memory[:, 20:], torch.full((70, 4), 7.0))


# Races


def results():
    """Of two scans, with and without a rank, each in both ways; and of a map's."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    length, channels = 300, 40
    low_rank = normal(1, length, 6).bfloat16().mT
    kinds = (
        dict(dt_low_rank=low_rank, dt_weight=normal(channels, 6)),
        dict(delta=normal(1, length, channels).bfloat16().mT),
    )
    found = []
    for kind in kinds:
        scan = Scan(
            u=normal(1, length, channels).bfloat16().mT,
            A=-torch.rand(channels, 1, generator=generator),
            B=normal(1, 1, 1, length),
            C=normal(1, 1, 1, length),
            D=normal(channels),
            **kind,
        )
        add = normal(1, length, channels).mT
        for count in WAYS.values():
            out, last = torch.empty_like(add), torch.empty(1, channels, 1)
            saved = torch.empty(one_state.saved_shape(1, length, 1, channels))
            with kernels.use_machine(Gpu(count)):
                one_state.forward(scan, out, last, saved, add)
            found += [out, last, saved]
    inputs = order_inputs('cross', CHUNKED, 6, dtype=torch.bfloat16)
    return [*found, *merged_map(inputs, Gpu(1, shared_memory=0))]


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
    assert BARRIERS == ['dt', 'exchange', 'inputs', 'look back']


def is_needed(barrier):
    """Whether without it some order gives something else, or never ends."""
    child = os.fork()
    if child == 0:
        os.environ[WITHOUT_VARIABLE] = barrier
        os._exit(0 if equal_bits_in_all_orders(8) else 3)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code in (3, -signal.SIGABRT)


def test_every_barrier_is_needed():
    """In a process without threads, which may fork."""
    code = (
        'from tests.ops import test_cuda_one_state as t; '
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
