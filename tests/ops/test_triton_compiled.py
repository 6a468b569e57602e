"""The Triton backend without a GPU: compiled, and launched but not run."""

import subprocess
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmvssm.ops.add_norm.declaration import NormInputs, NormOptions
from mmvssm.ops.add_norm.triton_backend import TritonNorm
from mmvssm.ops.bidirectional_scan.declaration import (
    BidirectionalInputs,
    BidirectionalOptions,
)
from mmvssm.ops.bidirectional_scan.direction import Direction
from mmvssm.ops.bidirectional_scan.triton_backend import TritonBidirectional
from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions
from mmvssm.ops.selective_scan.triton_backend import TritonScan
from mmvssm.ops.ss2d_scan.declaration import Ss2dInputs, Ss2dOptions
from mmvssm.ops.ss2d_scan.triton_backend import TritonSs2d
from mmvssm.ops.triton import runtime

pytestmark = pytest.mark.skipif(
    find_spec('triton') is None, reason='Triton is not installed'
)
compiles = pytest.mark.skipif(
    runtime.INTERPRETED, reason='TRITON_INTERPRET=1 leaves nothing to compile'
)
TARGET = ('cuda', 90, 32)
# Constants that tell compiled kernels apart.
VARIANTS = ('STATES', 'RANK', 'ROUTE', 'TAPS', 'BLOCK_C')
TYPES = {
    torch.float32: '*fp32',
    torch.bfloat16: '*bf16',
    torch.float16: '*fp16',
    torch.int32: '*i32',
}


class Recorder:
    """Stands for a kernel; keeps the arguments of launches in a list."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(**given):
            names = [n for n in given if n.isupper() or n == 'num_warps']
            constants = {name: given.pop(name) for name in names}
            args = [given[name] for name in self.kernel.arg_names if name in given]
            assert len(args) == len(given), given.keys()
            self.launches.append((self.kernel, args, constants))

        return launch


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """Launches of kernels, which are not run."""
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    launches = []
    for op in ('selective_scan', 'bidirectional_scan', 'add_norm'):
        module = import_module(f'mmvssm.ops.{op}.triton_kernels')
        for name, kernel in vars(module).items():
            if name.endswith('_kernel'):
                recorder = Recorder(kernel, launches)
                monkeypatch.setattr(module, name, recorder)
    return launches


def describe(value, path, constants, attributes):
    """Type of an argument as Triton would find it at the launch."""
    if isinstance(value, tuple):
        items = [
            describe(item, (*path, i), constants, attributes)
            for i, item in enumerate(value)
        ]
        return type(value)(*items) if hasattr(value, '_fields') else tuple(items)
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return 'constexpr'
    if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
        attributes[path] = [['tt.divisibility', 16]]
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return 'fp32'
    return 'i32' if value < 2**31 else 'i64'


def resources(kernel, args, constants):
    """Registers and bytes of stack of a thread, by the compiled code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {'num_warps': constants.pop('num_warps')}
    names = kernel.arg_names
    constexprs, attributes = {}, {}
    signature = {
        name: describe(value, (i,), constexprs, attributes)
        for i, (name, value) in enumerate(zip(names, args))
    }
    for name, value in constants.items():
        signature[name] = 'constexpr'
        constexprs[names.index(name),] = value
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget(*TARGET), options=options)
    tool = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        report = subprocess.run(
            [tool, '-res-usage', file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = dict(word.split(':') for word in report.split() if word.count(':') == 1)
    return int(numbers['REG']), int(numbers['STACK'])


@compiles
@pytest.mark.parametrize(
    'states,gated,length', [(1, False, 3136), (8, True, 49), (16, True, 6085)]
)
def test_compiles_without_spilling(launches, states, gated, length):
    """Every kernel for sm_90, with what models give it; the long ones in stretches."""

    def activation(*shape):
        return torch.empty(shape, dtype=torch.bfloat16).mT

    u, delta, z, grad = (activation(1, length, 768) for _ in range(4))
    B, C = (torch.empty(1, length, 1, states).permute(0, 2, 3, 1) for _ in 'BC')
    vector, A = torch.empty(768), torch.empty(768, states)
    inputs = ScanInputs(u, delta, A, B, C, vector, z if gated else None, vector)
    both_passes(TritonScan(), inputs, ScanOptions(True, torch.bfloat16), grad)
    assert len(launches) == (2 if length < 1000 else 6)
    assert_nothing_spills(launches)


def both_passes(backend, inputs, options, grad):
    """Forward and backward without the kernels."""
    outputs, saved, _ = backend.forward(inputs, options, True)
    grads = (grad, *outputs[1:])
    backend.backward(inputs, options, saved, grads, inputs)


def run_ss2d(channels, rank, states, orders='cross'):
    """On a map of 14 x 14."""
    half = torch.bfloat16
    x, grad = (
        torch.empty(1, 14, 14, channels, dtype=half).permute(0, 3, 1, 2) for _ in 'xy'
    )
    inputs = Ss2dInputs(
        x=x,
        x_proj_weight=torch.empty(4, rank + 2 * states, channels, dtype=half),
        dt_projs_weight=torch.empty(4, channels, rank, dtype=half),
        dt_projs_bias=torch.empty(4, channels),
        A=torch.empty(4 * channels, states),
        Ds=torch.empty(4 * channels),
    )
    both_passes(TritonSs2d(), inputs, Ss2dOptions(orders, half, half), grad)


def run_bidirectional_scan(channels, rank, states):
    """On a sequence of 197."""
    half = torch.bfloat16
    x, z, grad = (torch.empty(1, 197, channels, dtype=half).mT for _ in range(3))
    weights = Direction(
        conv_weight=torch.empty(channels, 4),
        conv_bias=torch.empty(channels),
        x_proj_weight=torch.empty(rank + 2 * states, channels, dtype=half),
        dt_proj_weight=torch.empty(channels, rank, dtype=half),
        dt_proj_bias=torch.empty(channels),
        A=torch.empty(channels, states),
        D=torch.empty(channels),
    )
    inputs = BidirectionalInputs(x, z, weights, weights)
    options = BidirectionalOptions(True, half, half)
    both_passes(TritonBidirectional(), inputs, options, grad)


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor that any operation of torch makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.flip.default
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor):
                elements = x.untyped_storage().nbytes() // x.element_size()
                self.largest = max(self.largest, elements)
        return found


@pytest.mark.parametrize('orders', ['cross', 'hilbert'])
@pytest.mark.parametrize('rank', [6, 24])
def test_ss2d_never_has_all_scans_in_memory(launches, rank, orders):
    """The largest array is one map, forward and backward."""
    with Allocations() as seen:
        run_ss2d(16 * rank, rank, 1, orders)
    assert len(launches) == 8
    assert seen.largest == 14 * 14 * 16 * rank


def test_bidirectional_scan_flips_nothing(launches):
    """The largest array is one sequence or the states that are kept of both."""
    with Allocations() as seen:
        run_bidirectional_scan(384, 12, 1)
    assert len(launches) == 7
    assert seen.largest == 197 * 384


@compiles
@pytest.mark.parametrize('rank', [12, 24])
def test_ss2d_compiles_without_spilling(launches, rank):
    run_ss2d(16 * rank, rank, 1)
    routes = {route: [] for route in range(4)}
    for launch in launches:
        routes[launch[2]['ROUTE']].append(launch)
    assert [len(route) for route in routes.values()] == [2] * 4
    # The one that computes most: from the end, column by column.
    assert_nothing_spills(routes[3])


@compiles
@pytest.mark.parametrize('rank', [12, 24])
def test_ss2d_by_a_table_compiles_without_spilling(launches, rank):
    run_ss2d(16 * rank, rank, 1, 'hilbert')
    assert len(launches) == 8
    # One forward and one backward; the others differ in nothing but numbers.
    assert_nothing_spills([launches[0], launches[-1]])


@compiles
def test_bidirectional_scan_compiles_without_spilling(launches):
    run_bidirectional_scan(384, 12, 16)
    assert [kernel.__name__.split('_')[0] for kernel, *_ in launches] == (
        ['conv', 'forward', 'forward', 'conv', 'backward', 'backward', 'conv']
    )
    assert_nothing_spills(launches)


@compiles
@pytest.mark.parametrize('channels', [192, 1024])
def test_norm_compiles_without_spilling(launches, channels):
    x = torch.empty(197, channels, dtype=torch.bfloat16)
    weight, residual = torch.empty(channels), torch.empty(197, channels)
    dtypes = (x.dtype, residual.dtype, residual.dtype)
    inputs = NormInputs(x, weight, residual)
    both_passes(TritonNorm(), inputs, NormOptions(1e-5, *dtypes, True), x)
    assert len(launches) == 2
    assert_nothing_spills(launches)


def assert_nothing_spills(launches):
    spills = {}
    for kernel, args, constants in launches:
        given = (f'{k}={v}' for k, v in constants.items() if k in VARIANTS)
        name = f'{kernel.__name__}({", ".join(given)})'
        registers, stack = resources(kernel, args, dict(constants))
        print(f'{name}: {registers} registers, {stack} bytes of stack')
        spills[name] = stack
    assert set(spills.values()) == {0}, spills
